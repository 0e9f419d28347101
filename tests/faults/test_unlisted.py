"""Faults that no list names: files of a run folder that rot, vanish or turn into something else, links that lead
nowhere, terminals that close, limits of the shell. The run goes on, or one sentence says what is wrong and how to mend
it."""

import contextlib
import errno
import json
import os
import signal
import threading

import pytest
import torch

from hpcssl import cli, config, door, files, journal, launch
from hpcssl.errors import HpcsslError, ResumeError, SubmitError, WorldError, sentence
from hpcssl.files import LineFile, RunDir
from hpcssl.signals import StopFlag
from hpcssl.train import main, recipe
from hpcssl.train.saved import folders, newest_valid
from hpcssl.world import World
from slurm import chain, records, watch

ROTTEN = (b"", b"\xfa\xff\x00", b"[1, 2]", b"7", b"null", b"{}", b'{"step"', b"[" * 100_000)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def test_lines_that_are_no_records_are_left_out(run):
    run.journal.write_bytes(b"\n".join(ROTTEN[1:]) + b'\n{"step": 1}\n{"step": "x"}\n"tail')
    assert files.read_lines(run.journal) == [{}, {"step": 1}, {"step": "x"}]
    journal.cut_back(run.journal, 5)
    assert files.read_lines(run.journal) == [{"step": 1}]
    assert files.read_lines(run.journal, "event") == []
    run.jobs.write_text('{"event": "submit"}\n{"event": "allow-pipe"}\n')
    assert records.every(run) == [] and records.allowed_pipe(run) == ""


@pytest.mark.parametrize("body", ROTTEN)
def test_a_rotten_end_is_no_end(run, body):
    run.done.write_bytes(body)
    assert run.finished is None
    run.data.write_bytes(body)
    assert main.digest_of(run) is None


@pytest.mark.parametrize("body", ROTTEN)
def test_a_rotten_chain_of_evaluations_is_told(run, body):
    assert chain.read(run)["entries"] == {}
    run.chain.write_bytes(body)
    with pytest.raises(SubmitError, match="to mend: remove it, and submit again"):
        chain.read(run)


def test_an_end_is_one(run):
    run.done.write_text('{"step": 9, "weights": "weights/step-00000009.safetensors"}')
    assert run.finished["step"] == 9
    run.done.unlink()
    run.done.mkdir()
    assert run.finished is None


@pytest.mark.parametrize("body", [b"", b"\xff:::", b"[1]", b"a: [", b"method: {name: msf}\nnobody: 1\n"])
def test_a_rotten_recipe_says_that_it_may_go(run, body):
    run.config.write_bytes(body)
    with pytest.raises(ResumeError, match=r"config\.yaml.*to mend: remove the file and give the same command"):
        recipe.read(run.config)


@pytest.mark.parametrize("kind", ["dangling", "circle", "file"])
def test_checkpoints_that_are_elsewhere_are_not_begun_again(run, kind):
    if kind == "file":
        run.checkpoints.write_text("")
    else:
        run.checkpoints.symlink_to("/nowhere/scratch" if kind == "dangling" else "checkpoints")
    with pytest.raises(ResumeError, match="see whether its disk is there; or remove it"):
        newest_valid(run)
    with pytest.raises(NotADirectoryError) as told:
        files.make_folder(run.checkpoint(10))
    assert told.value.filename == str(run.checkpoints)


def test_folders_of_others_are_no_checkpoints(run):
    for name in ("step-²", "step-x", "step-00000010", "step-"):
        (run.checkpoints / name).mkdir(parents=True)
    assert [step for step, _ in folders(run)] == [10]


def test_a_journal_that_is_moved_away_is_begun_anew(run):
    file = LineFile(run.journal)
    file.add({"step": 1})
    run.journal.rename(run.root / "mine.jsonl")
    assert file.add({"step": 2}) is None and file.add({"step": 3}) is None
    assert files.read_lines(run.journal) == [{"step": 2}, {"step": 3}]
    run.root.rename(run.root.with_name("moved"))
    run.root.symlink_to("/nowhere")
    assert file.add({"step": 4}) == os.strerror(errno.ENOTDIR)
    run.root.unlink()
    run.root.with_name("moved").rename(run.root)
    assert file.close() is None
    assert [line["step"] for line in files.read_lines(run.journal)] == [2, 3, 4]


@pytest.mark.parametrize(("error", "mend"), [
    (MemoryError(), "give the process more"),
    (RuntimeError("unable to mmap 46 bytes from file <x>: Cannot allocate memory (12)"), "give the process more"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "give the process more"),
    (RuntimeError("can't start new thread"), "ulimit -u"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"), "ulimit -n"),
    (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "x"), "ulimit -f"),
    (OSError(errno.EIO, os.strerror(errno.EIO), "x"), "file system is well"),
    (OSError(errno.EISDIR, os.strerror(errno.EISDIR), "x"), "move the folder of that name away"),
])
def test_limits_and_file_systems_have_their_mends(error, mend):
    told = sentence(error)
    assert mend in told.partition("to mend:")[2]
    if isinstance(error, OSError) and "mem" not in os.strerror(error.errno):
        with pytest.raises(HpcsslError, match=mend.replace("(", r"\(")):
            World.alone().on_main(lambda: _raise(error))


def _raise(error):
    raise error


def test_other_errors_are_no_sentence():
    assert sentence(KeyError("x")) is None


def test_a_closed_terminal_and_the_end_of_cpu_time_are_stops():
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGXCPU)}
    for number in before:
        stop = StopFlag().install(keyboard=True)
        try:
            os.kill(os.getpid(), number)
            assert stop.reason == number.name
        finally:
            stop.restore()
    assert {n: signal.getsignal(n) for n in before} == before


def test_nohup_is_believed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopFlag().install(keyboard=True)
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_closed_streams_are_opened_before_a_file_gets_their_number(tmp_path, closed):
    pid = os.fork()
    if not pid:
        code = 9
        try:
            for number in closed:
                os.close(number)
            door._three_streams()
            with open(tmp_path / "file", "w") as file:
                code = 0 if file.fileno() > 2 and all(os.fstat(n) for n in range(3)) else 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("argv", [["--run", ""], ["--run="]])
def test_an_empty_run_is_not_this_folder(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "digits_msf", *argv])
    assert left.value.code == 2
    assert "--run: got nothing; expected a folder; to mend: see whether" in capsys.readouterr().err


def test_a_sentence_that_nobody_can_read_keeps_its_code(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        assert door._say("hpcssl", "a sentence", 2, False) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_a_port_that_is_none_is_told():
    with pytest.raises(WorldError, match="got MASTER_PORT 99999"):
        launch.find({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"})


def test_a_thread_that_a_full_disk_ends_prints_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", journal._thread_died)
    for error in (OSError(errno.ENOSPC, "full"), ValueError("a bug")):
        thread = threading.Thread(target=_raise, args=(error,))
        thread.start()
        thread.join()
    told = capsys.readouterr().err
    assert "a bug" in told and "full" not in told


def test_attempts_are_counted_on_over_rotten_lines(run):
    run.attempts.write_text('{"event": "end"}\n{"event": "start"}\n[3]\n{"event": "start", "attempt": 4}')
    assert main._Attempt(run, World.alone(), {}).about["attempt"] == 5


def test_ranks_of_two_recipes_do_not_train_together():
    class Two(World):
        def gather_text(self, text):
            return [text, next(others)]

    mine, other = {"optim": {"lr": 0.1}, "seed": 0}, {"optim": {"lr": 0.3}, "seed": 0}
    for theirs in (mine, other):
        others = iter([config.fingerprint(theirs), json.dumps(theirs)])
        world = Two(0, 2, 0, torch.device("cpu"))
        if theirs is mine:
            main.one_for_all(world, "recipe", mine)
        else:
            with pytest.raises(WorldError, match=r"rank 1's recipe: got other values than rank 0's: optim\.lr;"):
                main.one_for_all(world, "recipe", mine)


def test_a_training_that_outlived_its_supervisor_is_complete(run):
    job = records.Job("local-1", records.TRAIN, "local", {})
    records.note(run, "submit", job.job, what=job.what, kind="local")
    records.note(run, "supervisor", job.job, pid=2**22 + 1, started=0, host=os.uname().nodename)
    assert watch.state_of(run, job).name == "LOST"
    run.done.write_text('{"step": 3}')
    assert watch.state_of(run, job).name == "COMPLETED"
