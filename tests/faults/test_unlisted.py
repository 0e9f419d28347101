"""Rare faults: damaged or missing files of a run folder, broken symlinks, closed terminals, limits of the shell.

The run continues, or one line says what is wrong and how to fix it.
"""

import contextlib
import errno
import json
import os
import signal
import threading

import pytest
import torch

from hpcssl import cli, cli_runner, config, files, journal, json_lines
from hpcssl.checkpoint.reader import folders, latest_valid
from hpcssl.distributed import launch
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, HpcsslError, ResumeError, SubmitError, WorldError, describe_error
from hpcssl.json_lines import JsonLinesWriter
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.storage.folders import make_folder
from hpcssl.train import main, recipe, replicas
from hpcssl.train.start import run_files
from slurm.log import job_log
from slurm.manage import evaluations, status
from tests.printed import printed_error

DAMAGED = (b"", b"\xfa\xff\x00", b"[1, 2]", b"7", b"null", b"{}", b'{"step"', b"[" * 100_000)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def test_lines_that_are_not_records_are_skipped(run):
    run.journal.write_bytes(b"\n".join(DAMAGED[1:]) + b'\n{"step": 1}\n{"step": "x"}\n"tail')
    assert files.read_lines(run.journal) == [{}, {"step": 1}, {"step": "x"}]
    json_lines.truncate_after(run.journal, 5)
    assert run.journal.read_bytes().endswith(b'\n{"step": 1}\n')
    assert files.read_lines(run.journal) == [{}, {"step": 1}]
    assert files.read_lines(run.journal, {"event": str}) == []
    run.jobs.write_text('{"event": "submit"}\n{"event": "allow-pipe"}\n')
    assert job_log.all_jobs(run) == [] and job_log.read_allowed_pipe(run) == ""


@pytest.mark.parametrize("body", DAMAGED)
def test_damaged_files_about_the_end_and_the_data_are_ignored(run, body):
    run.done.write_bytes(body)
    assert run.finished is None
    run.data.write_bytes(body)
    assert run_files.recorded_data_digest(run) is None


@pytest.mark.parametrize("body", DAMAGED)
def test_a_damaged_plan_of_evaluations_is_refused(run, body):
    assert evaluations.read_plan(run)["entries"] == {}
    run.chain.write_bytes(body)
    with pytest.raises(SubmitError) as caught:
        evaluations.read_plan(run)
    assert str(run.chain) in caught.value.what and "--evals" in caught.value.fix


def test_a_run_is_finished_if_its_file_about_the_end_is_valid(run):
    run.done.write_text('{"step": 9, "weights": "weights/step-00000009.safetensors"}')
    assert run.finished["step"] == 9
    run.done.unlink()
    run.done.mkdir()
    assert run.finished is None


@pytest.mark.parametrize("body", [b"", b"\xff:::", b"[1]", b"a: [", b"method: {name: msf}\nnobody: 1\n"])
def test_a_damaged_recipe_is_refused_and_may_be_removed(run, body):
    run.config.write_bytes(body)
    with pytest.raises(ResumeError) as caught:
        recipe.read(run.config)
    assert str(run.config) in caught.value.what and "remove" in caught.value.fix


@pytest.mark.parametrize("kind", ["broken", "cyclic", "file"])
def test_a_run_does_not_restart_if_its_checkpoints_cannot_be_reached(run, kind):
    if kind == "file":
        run.checkpoints.write_text("")
    else:
        run.checkpoints.symlink_to("/nowhere/scratch" if kind == "broken" else "checkpoints")
    with pytest.raises(ResumeError) as caught:
        latest_valid(run)
    assert str(run.checkpoints) in caught.value.what and ("symlink" in caught.value.got) == (kind != "file")
    assert "disk" in caught.value.fix and "remove" in caught.value.fix
    with pytest.raises(NotADirectoryError) as not_a_folder:
        make_folder(run.checkpoint(10))
    assert not_a_folder.value.filename == str(run.checkpoints)


def test_folders_with_other_names_are_not_checkpoints(run):
    for name in ("step-²", "step-x", "step-00000010", "step-"):
        (run.checkpoints / name).mkdir(parents=True)
    assert [step for step, _ in folders(run)] == [10]


def test_a_moved_journal_is_created_again(run):
    file = JsonLinesWriter(run.journal)
    file.add({"step": 1})
    run.journal.rename(run.root / "moved.jsonl")
    assert file.add({"step": 2}) is None and file.add({"step": 3}) is None
    assert files.read_lines(run.journal) == [{"step": 2}, {"step": 3}]
    run.root.rename(run.root.with_name("moved"))
    run.root.symlink_to("/nowhere")
    assert file.add({"step": 4}) == os.strerror(errno.ENOTDIR)
    run.root.unlink()
    run.root.with_name("moved").rename(run.root)
    assert file.close() is None
    assert [line["step"] for line in files.read_lines(run.journal)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (MemoryError(), "--mem"),
        (RuntimeError("unable to mmap 46 bytes from file <x>: Cannot allocate memory (12)"), "--mem"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "--mem"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"), "ulimit -n"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "x"), "ulimit -f"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "x"), "file system"),
        (OSError(errno.EISDIR, os.strerror(errno.EISDIR), "x"), "a folder exists"),
    ],
)
def test_each_error_of_the_system_has_its_fix(error, fix):
    described = printed_error(f"hpcssl: {describe_error(error)}")
    assert fix in described.fix
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        assert (described.what, described.got) == ("x", os.strerror(error.errno))
        with pytest.raises(HpcsslError) as caught:
            World.single_process().run_on_main(lambda: raise_error(error))
        assert caught.value.what == "x" and fix in caught.value.fix


def raise_error(error):
    raise error


def test_other_errors_are_not_described():
    assert describe_error(KeyError("x")) is None


def test_a_closed_terminal_and_the_limit_of_cpu_time_stop_the_run():
    for number in (signal.SIGHUP, signal.SIGXCPU):
        before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
        stop = StopFlag().install(keyboard=True)
        try:
            os.kill(os.getpid(), number)
            assert stop.reason == number.name
        finally:
            stop.restore()
            assert signal.signal(number, before) == signal.SIG_DFL


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopFlag().install(keyboard=True)
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_closed_streams_are_opened_before_files_get_their_numbers(tmp_path, closed):
    pid = os.fork()
    if not pid:
        code = 9
        try:
            for number in closed:
                os.close(number)
            cli_runner._open_streams()
            with open(tmp_path / "file", "w") as file:
                code = 0 if file.fileno() > 2 and all(os.fstat(n) for n in range(3)) else 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("argv", [["--run", ""], ["--run="]])
def test_an_empty_run_option_is_not_the_current_folder(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "digits_msf", *argv])
    assert caught.value.code == ConfigError.exit_code == 2
    error = printed_error(capsys.readouterr().err)
    assert (error.program, error.what) == ("hpcssl", "--run") and "empty" in error.got


def test_an_error_that_cannot_be_printed_keeps_its_exit_code(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        assert cli_runner._fail("hpcssl", "an error", 2, False) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_an_invalid_port_is_refused():
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}
    with pytest.raises(WorldError) as caught:
        launch.detect_launcher(variables)
    assert "MASTER_PORT 99999" in caught.value.got and "MASTER_PORT" in caught.value.expected


def test_a_thread_that_ends_because_of_a_full_disk_prints_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", journal._report_thread_error)
    for error in (OSError(errno.ENOSPC, "full"), ValueError("a bug")):
        thread = threading.Thread(target=raise_error, args=(error,))
        thread.start()
        thread.join()
    printed = capsys.readouterr().err
    assert "a bug" in printed and "full" not in printed


def test_attempts_are_counted_across_damaged_lines(run):
    run.attempts.write_text('{"event": "end"}\n{"event": "start"}\n[3]\n{"event": "start", "attempt": 4}')
    assert main.AttemptRecord(run, World.single_process(), {}).fields["attempt"] == 5


def test_ranks_with_different_recipes_do_not_train_together():
    class WorldOfTwo(World):
        def all_gather_text(self, text):
            return [text, next(others)]

    mine, other = {"optim": {"lr": 0.1}, "seed": 0}, {"optim": {"lr": 0.3}, "seed": 0}
    for theirs in (mine, other):
        others = iter([config.fingerprint(theirs), json.dumps(theirs)])
        world = WorldOfTwo(0, 2, 0, torch.device("cpu"))
        if theirs is mine:
            replicas.check_equal_on_all_ranks(world, "recipe", mine)
        else:
            with pytest.raises(WorldError) as caught:
                replicas.check_equal_on_all_ranks(world, "recipe", mine)
            assert caught.value.what == "rank 1's recipe" and "rank 0" in caught.value.got
            assert "optim.lr" in caught.value.got and "seed" not in caught.value.got


def test_a_training_that_outlived_its_supervisor_counts_as_completed(run):
    job = job_log.Job("local-1", job_log.TRAIN, "local", {})
    job_log.record_event(run, "submit", job.id, what=job.what, kind="local")
    job_log.record_event(run, "supervisor", job.id, pid=2**22 + 1, started=0, host=os.uname().nodename)
    assert status.query_job(run, job).name == "LOST"
    run.done.write_text('{"step": 3}')
    assert status.query_job(run, job).name == "COMPLETED"
