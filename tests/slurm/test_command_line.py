"""The first word of a command line: a verb, a misspelled verb, or a recipe to submit."""

import pytest

from hpcssl.errors import EXIT_USAGE, ConfigError
from slurm import command_line


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("statsu", "status"),
        ("statusx", "status"),
        ("cancelx", "cancel"),
        ("log", "logs"),
        ("premept", "preempt"),
        ("subit", "submit"),
    ],
)
def test_a_misspelled_verb_is_refused_with_the_right_one(word, verb):
    with pytest.raises(ConfigError) as caught:
        command_line.add_default_verb([word, "runs/x"])
    assert caught.value.got == repr(word) and repr(verb) in caught.value.fix
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    "word", ["digits_msf", "digits_mfs", "./status.yaml", "statsu.yaml", "runs/statsu", "--run", "-N2"]
)
def test_any_other_first_word_begins_a_submission(word):
    assert command_line.add_default_verb([word, "--run", "r"]) == ["submit", word, "--run", "r"]


@pytest.mark.parametrize("words", [[], ["--help"], ["status"], ["submit", "digits_msf"]])
def test_a_command_line_with_a_verb_is_not_changed(words):
    assert command_line.add_default_verb(words) == words
