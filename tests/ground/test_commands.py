"""Misspelled commands, retired options and keys, and errors that are sent from rank to rank."""

import json
import subprocess
import sys

import pytest
import torch

from hpcssl import cli, cli_runner, config
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, DataError, HpcsslError, RankLost, require_choice
from tests.printed import printed_error


@pytest.fixture
def run_hpcssl(capsys):
    """run_hpcssl(*arguments) -> (exit code, stderr)."""

    def run(*argv):
        with pytest.raises(SystemExit) as caught:
            cli.main(list(argv))
        return caught.value.code, capsys.readouterr().err

    return run


def test_a_misspelled_command_is_refused_with_a_suggestion(run_hpcssl):
    code, error = run_hpcssl("trian", "digits_msf")
    assert code == 2 and "'train'" in error


def test_digest_takes_the_run_folder_as_an_option_like_other_commands(run_hpcssl, tmp_path):
    code, error = run_hpcssl("digest", str(tmp_path))
    assert code == 2 and "--run" in error


def test_a_retired_option_is_refused_with_the_new_name(run_hpcssl, monkeypatch):
    monkeypatch.setitem(cli_runner.RETIRED_OPTIONS, "hpcssl --folder", "--run")
    code, error = run_hpcssl("digest", "--folder=x")
    parts = printed_error(error)
    assert (code, parts.program, parts.what, parts.expected) == (2, "hpcssl", "--folder", "--run")
    assert "--run" in parts.fix
    code, error = run_hpcssl("digest", "--foldr=x")
    assert code == 2 and "--foldr" in error and "--folder" not in error


def test_a_retired_key_or_value_is_refused_with_the_new_name():
    renames = config.Renames(keys={"optim.lr_per": "optim.lr_scaling"}, values={"optim.lr_scaling": {"whole": "none"}})
    for values, fix in (
        ({"lr_per": 1}, "write optim.lr_scaling=1"),
        ({"lr_per": "whole"}, "write optim.lr_scaling=none"),
        ({"lr_scaling": "whole"}, "write optim.lr_scaling=none"),
    ):
        with pytest.raises(ConfigError) as caught:
            renames.check({"optim": values}, "recipe")
        assert caught.value.fix == fix and caught.value.what == f"recipe, key optim.{next(iter(values))}"
    renames.check({"optim": {"lr_scaling": "none"}}, "recipe")


def test_a_value_that_is_not_a_choice_is_refused_with_a_suggestion():
    require_choice("model.norm", "local", ("local", "sync"))
    with pytest.raises(ConfigError) as caught:
        require_choice("model.norm", "synk", ("local", "sync"))
    assert caught.value.what == "model.norm" and caught.value.got == "'synk'"
    assert "local" in caught.value.expected and "sync" in caught.value.expected
    assert "'sync'" in caught.value.fix


@pytest.mark.parametrize("kind", [DataError, RankLost])
def test_an_error_of_any_class_reaches_the_other_ranks(kind):
    """Rank 1 raises the error of rank 0, also if its class is defined outside hpcssl.errors."""

    class WorldOfTwo(World):
        def broadcast_text(self, text, source=0):
            return text or json.dumps(raised.to_json())

    raised = kind("a shard", got="nothing", expected="a shard", fix="write it")
    for rank in (0, 1):
        with pytest.raises(kind) as caught:
            WorldOfTwo(rank, 2, rank, torch.device("cpu")).run_on_main(lambda: (_ for _ in ()).throw(raised))
        assert caught.value.args == raised.args and type(caught.value) is kind


def test_an_error_of_an_unknown_class_keeps_its_parts():
    error = HpcsslError.from_json(["elsewhere.Unknown", "a", "b", "c", ""])
    assert type(error) is HpcsslError and (error.what, error.got, error.expected, error.fix) == ("a", "b", "c", "")
    assert str(error) == "a: b (expected c)."


def test_a_process_ends_with_its_code_while_a_thread_waits_for_the_store():
    """With ``sys.exit`` it aborts on Python before 3.14, when the call returns during the teardown."""
    script = """
import threading
from datetime import timedelta
from torch import distributed
from hpcssl import cli_runner

store, waiting = distributed.TCPStore("127.0.0.1", 0, is_master=True), threading.Event()

def wait():
    while True:
        waiting.set()
        try:
            store.wait(["a key that nobody sets"], timedelta(milliseconds=1))
        except distributed.DistStoreError:
            pass

threading.Thread(target=wait, daemon=True).start()
waiting.wait()
print("written before the end", end="")
cli_runner.end_process(3)
"""
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (3, "written before the end"), ended.stderr
