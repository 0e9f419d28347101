"""The verb of a command line of ``hpcssl-submit``."""

from __future__ import annotations

import difflib

from hpcssl.errors import ConfigError

VERBS = ("submit", "sweep", "table", "status", "top", "cancel", "logs", "preempt", "doctor")


def add_default_verb(words: list[str]) -> list[str]:
    """Return the words with ``submit`` before them if they do not begin with a verb.

    Raises:
        ConfigError: The first word is a misspelled verb.
    """
    if not words or words[0] in (*VERBS, "--help"):
        return words
    verb = _similar_verb(words[0])
    if verb is not None:
        raise ConfigError(
            "command",
            got=repr(words[0]),
            expected=f"{', '.join(VERBS)}, or a recipe to submit",
            fix=f"did you mean {verb!r}",
        )
    return ["submit", *words]


def _similar_verb(word: str) -> str | None:
    """The verb that a word misspells; None if the word is an option, a path, a recipe, or closer to a recipe."""
    if word.startswith("-") or not difflib.get_close_matches(word, VERBS, n=1):
        return None
    from hpcssl.train import recipe  # imports torch, so only for a word that looks like a verb

    names = recipe.names()
    if word in names or "/" in word or word.endswith((".yaml", ".yml")):
        return None
    closest = difflib.get_close_matches(word, [*VERBS, *names], n=1)[0]
    return closest if closest in VERBS else None
