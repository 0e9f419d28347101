"""One writer per run folder: the kernel's file lock, and the heartbeat on file systems without one."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcssl import files
from hpcssl.checkpoint.manager import CheckpointManager, CheckpointState
from hpcssl.checkpoint.reader import latest_valid
from hpcssl.distributed.world import World
from hpcssl.errors import EXIT_FAILED, ResumeError, Stopped
from hpcssl.run_dir import RunDir
from hpcssl.signals import Requeue, StopFlag
from hpcssl.storage import folders
from hpcssl.train import loop, main, recipe
from hpcssl.train.attempt import run_lock
from hpcssl.train.attempt.lock_file import read_holder
from hpcssl.train.attempt.run_lock import RunLock
from tests.waiting import PATIENCE_S, wait_until

BEAT = 0.5
"""Seconds between two heartbeats. A holder without a heartbeat for STALE_BEATS of them counts as dead, so they must
last longer than a busy machine keeps a thread waiting."""
HOLDER = """
import fcntl, os, sys, time
from hpcssl.run_dir import RunDir
from hpcssl.train.attempt import run_lock
from hpcssl.storage import folders
def refuse(fd, how):
    raise OSError({errno}, os.strerror({errno}))
if {errno}:
    fcntl.flock = refuse
os.fsync = lambda fd: None
run_lock._pid_namespace = lambda: {place!r} or run_lock.socket.gethostname()
held = run_lock.RunLock(RunDir({run!r}), "17", attempt=3, beat_s={beat}, on_loss=lambda: print("lost", flush=True))
held.take(0.0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def holder(run):
    """holder(number=0, place="") -> a process that holds the lock as job 17, attempt 3.

    ``number`` is the errno with which its ``flock`` fails, 0 if it works. ``place`` is its host and its namespace of
    process ids, by default those of the test.
    """
    started = []

    def start(number=0, place=""):
        code = HOLDER.format(errno=int(number), run=str(run.root), beat=BEAT, place=place)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[2],
            )
        )
        assert started[-1].stdout.readline() == b"held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def no_flock(monkeypatch):
    """Let ``flock`` fail, as on a file system without locks."""
    monkeypatch.setattr(fcntl, "flock", raise_os_error(errno.ENOLCK))


@pytest.fixture(autouse=True)
def same_host(monkeypatch):
    """Put the test and its holders on one host, and let no slow disk delay a heartbeat."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(run_lock, "_pid_namespace", lambda: run_lock.socket.gethostname())


def lock_of_job_18(run, **options):
    return RunLock(run, "18", beat_s=BEAT, **options)


def raise_os_error(number):
    """Return a function that raises ``OSError(number)``, whatever its arguments."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def assert_names_holder(error, run, pid):
    """Check that an error names the run folder and the holder: job, process, host, start and last heartbeat."""
    assert str(run.root) in error.what
    holder = read_holder(run.lock)
    assert f"job 17, process {pid} on {holder['host']}" in error.got
    assert holder["started"] in error.got
    # of the last heartbeat only the day: another one may have been sent since
    assert holder["time"][:10] in error.got.rpartition("started")[2].partition(",")[2]


def test_a_second_process_is_refused_and_the_holder_is_named(run, holder):
    first = holder()
    with pytest.raises(ResumeError) as caught:
        lock_of_job_18(run).take(0.0)
    assert_names_holder(caught.value, run, first.pid)
    assert "--run" in caught.value.fix and "\n" not in str(caught.value)


def test_a_wait_for_the_holder_can_be_stopped(run, holder):
    first = holder()
    stop_requests = iter([False, True, True])
    waiting = lock_of_job_18(run)
    with pytest.raises(Stopped) as caught:
        waiting.take(600.0, lambda: next(stop_requests))
    assert_names_holder(caught.value, run, first.pid)
    waiting.release()


def test_a_full_disk_is_reported_and_the_lock_can_be_taken_later(run, monkeypatch):
    lock = lock_of_job_18(run)
    monkeypatch.setattr(os, "pwrite", raise_os_error(errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        lock.take(0.0)
    assert caught.value.errno == errno.ENOSPC
    lock.release()  # as an attempt does whenever it ends
    monkeypatch.undo()
    other = lock_of_job_18(run)
    other.take(0.0)
    other.release()


def test_the_holder_sends_heartbeats_and_the_file_is_always_complete(run):
    lock = RunLock(run, "18", beat_s=0.1)
    lock.take(0.0)
    beats = set()

    def has_several_beats():
        beats.add(json.loads(run.lock.read_text())["beat"])
        return len(beats) > 3

    wait_until(has_several_beats, lambda: f"more heartbeats than {beats}", pause=0.001)
    assert run.lock.stat().st_size == 1024
    lock.release()
    assert json.loads(run.lock.read_text())["over"]
    lock.release()  # a second release does nothing


@pytest.mark.parametrize("number", [0, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_the_lock_of_a_killed_holder_can_be_taken(run, holder, monkeypatch, number):
    first = holder(number)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    if number:
        monkeypatch.setattr(fcntl, "flock", raise_os_error(number))
    lock = lock_of_job_18(run)
    lock.take(0.0)
    assert json.loads(run.lock.read_text())["job"] == "18"
    lock.release()


def test_without_file_locks_the_heartbeat_keeps_others_out(run, holder, no_flock, caplog):
    first = holder(errno.ENOLCK)
    with pytest.raises(ResumeError) as caught:
        lock_of_job_18(run).take(0.0)
    assert_names_holder(caught.value, run, first.pid)
    assert json.loads(run.lock.read_text())["job"] == "17"
    run_lock.LOG.propagate = True
    first.communicate(b"")  # it ends without a release
    lock_of_job_18(run).take(0.0)
    assert [
        record for record in caplog.records if record.levelname == "WARNING" and str(run.lock) in record.getMessage()
    ]


def test_a_file_lock_of_one_host_only_is_supplemented_by_the_heartbeat(run, holder):
    """As on Lustre with ``localflock``: both hosts get the kernel's lock, and only the file names the other holder."""
    first = holder(errno.ENOLCK, "another host")
    with pytest.raises(ResumeError) as caught:
        lock_of_job_18(run).take(0.0)
    assert_names_holder(caught.value, run, first.pid)
    os.kill(first.pid, signal.SIGSTOP)
    began = time.monotonic()
    lock = lock_of_job_18(run)
    lock.take(0.0)
    assert time.monotonic() - began > run_lock.STALE_BEATS * BEAT  # the file was watched; no clocks were compared
    os.kill(first.pid, signal.SIGCONT)
    assert first.stdout.readline() == b"lost\n"
    lock.check()  # the resumed holder has not overwritten the new holder's record
    assert json.loads(run.lock.read_text())["job"] == "18"
    lock.release()


def test_a_requeued_job_does_not_wait_for_its_earlier_attempt(run, holder, no_flock):
    first = holder(errno.ENOLCK, "another host")
    for other in (
        RunLock(run, "17", attempt=3, requeued=True, beat_s=BEAT),
        RunLock(run, "17", attempt=4, beat_s=BEAT),
    ):
        with pytest.raises(ResumeError) as caught:
            other.take(0.0)
        assert_names_holder(caught.value, run, first.pid)
    # with so long an interval, watching the holder would take longer than any test may
    lock = RunLock(run, "17", attempt=4, requeued=True, beat_s=3600.0)
    began = time.monotonic()
    lock.take(0.0)
    assert time.monotonic() - began < run_lock.STALE_BEATS * 3600.0
    lock.release()


def test_of_several_processes_without_file_locks_one_gets_the_lock(run, no_flock):
    # each writes its record, waits half an interval and looks again: a thread that is delayed for longer than that
    # between its first look and its writing would get the lock as well
    locks = [RunLock(run, str(number), beat_s=2.0) for number in range(4)]
    winners = []

    def take(lock):
        try:
            lock.take(0.0)
            winners.append(lock)
        except ResumeError:
            pass

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    winners[0].check()
    winners[0].release()


def test_a_process_that_lost_the_run_saves_nothing(run):
    """A suspended process finds another holder in the file: its next save raises on all ranks and leaves no file."""
    lost = threading.Event()
    first = RunLock(run, "17", beat_s=BEAT, on_loss=lost.set)
    first.take(0.0)
    checkpoints = CheckpointManager(run, World.single_process(), guard=first.check)
    assert checkpoints.save(CheckpointState(1, {}, {}, "f", {}, {})) is None
    checkpoints.begin(CheckpointState(2, {}, {}, "f", {}, {}))
    run.lock.unlink()  # the kernel's lock is on the removed file, as with a host that came back
    other = lock_of_job_18(run)
    other.take(0.0)
    assert lost.wait(PATIENCE_S)
    for save in (checkpoints.finish, lambda: checkpoints.save(CheckpointState(3, {}, {}, "f", {}, {}))):
        with pytest.raises(ResumeError) as caught:
            save()
        assert str(run.root) in caught.value.what and f"job 18, process {os.getpid()} on " in caught.value.got
    assert not run.checkpoint(3).exists() and not (run.checkpoint(2) / "manifest.json").exists()
    first.release()
    assert json.loads(run.lock.read_text())["job"] == "18" and "over" not in json.loads(run.lock.read_text())
    other.release()


@pytest.mark.parametrize("text", ["", "{", '{"job": "old", "host": "h", "pid": 1}', "\0" * 50])
def test_a_lock_file_without_a_living_holder_is_taken(run, text):
    run.root.mkdir()
    run.lock.write_text(text)
    lock = lock_of_job_18(run)
    lock.take(0.0)
    lock.check()
    lock.release()


def move_away(run):
    """Rename the run folder."""
    moved = run.root.with_name("moved")
    run.root.rename(moved)
    return moved


def swap_link(run):
    """Let the link through which the run was started point to a copy of the folder, as of another run."""
    moved = run.root.resolve()
    other = moved.with_name("other")
    shutil.copytree(moved, other)
    run.root.unlink()
    run.root.symlink_to(other)
    return moved


def replace(run):
    """Rename the run folder, and create an empty one in its place."""
    moved = move_away(run)
    run.root.mkdir()
    return moved


def list_files(folder):
    """Names and sizes of the files below a folder."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("move", [move_away, swap_link, replace])
def test_a_run_folder_that_is_moved_during_training_is_not_created_again(tmp_path, shards, monkeypatch, move):
    """The loss of the lock stops the training; the folder has all that was written until then, and nothing is lost."""
    home = tmp_path / "home"
    home.mkdir()
    run = RunDir(tmp_path / "run")
    run.root.symlink_to(home) if move is swap_link else run.root.mkdir()
    moved, stop, journals = [], StopFlag(), []
    launch_step, journal_class = loop.launch_step, main.Journal

    def move_after_step_3(training, *rest):
        if training.step == 3:
            journals[0]._events.flush()  # TensorBoard's thread appends to the path, on a busy machine at any time
            moved.append((move(run), list_files(run.root) if run.root.exists() else None))
            wait_until(stop.is_set, "the loss of the lock")
        return launch_step(training, *rest)

    monkeypatch.setattr(
        main, "Journal", lambda *words, **more: journals.append(journal_class(*words, **more)) or journals[0]
    )
    monkeypatch.setattr(loop, "launch_step", move_after_step_3)
    monkeypatch.setattr(RunLock.__init__, "__kwdefaults__", RunLock.__init__.__kwdefaults__ | {"beat_s": 0.05})
    overrides = [
        f"data.train={shards.root}",
        *("machine.devices=cpu", "views.size=16", "optim.batch=16", "bank.size=24", "schedule.steps=20"),
        *("machine.checkpoint_steps=2", "machine.log_steps=1", "machine.checkpoint_minutes=0"),
    ]
    with pytest.raises(ResumeError) as caught:
        main.train(run, recipe.compose("digits_msf", overrides), stop=stop)
    assert caught.value.what == f"run folder {run.root}" and caught.value.exit_code == EXIT_FAILED
    ((folder, before),) = moved
    assert (list_files(run.root) if run.root.exists() else None) == before, "nothing is written at the old path"
    assert latest_valid(RunDir(folder))[0].step == 2
    follower = RunLock(RunDir(folder), "18")
    follower.take(0.0)  # the kernel's lock is free
    follower.release()


def test_a_run_that_was_taken_over_during_the_start_gets_no_further_attempt(tmp_path, shards, monkeypatch):
    """A process without a sign of life for a minute, as on a suspended node, has lost the run to another one."""
    run, stop, taken, requests = RunDir(tmp_path / "run"), StopFlag(), [], []
    load_state = main.load_state

    def lose_lock(*words):
        run.lock.unlink()
        taken.append(lock_of_job_18(run))
        taken[0].take(0.0)
        wait_until(stop.is_set, "the loss of the lock")
        return load_state(*words)

    monkeypatch.setattr(main, "load_state", lose_lock)
    monkeypatch.setattr(RunLock.__init__, "__kwdefaults__", RunLock.__init__.__kwdefaults__ | {"beat_s": 0.05})
    overrides = [f"data.train={shards.root}", "machine.devices=cpu", "views.size=16", "optim.batch=16", "bank.size=24"]
    composed = recipe.compose("digits_msf", [*overrides, "schedule.steps=5"])
    with pytest.raises(ResumeError) as caught:
        main.train(run, composed, stop=stop, requeue=lambda signals: requests.append(signals) or Requeue("stopped"))
    assert "job 18" in caught.value.got and requests == []
    assert [line.get("cause") for line in files.read_lines(run.attempts)] == [None, "error"]
    taken[0].release()


def test_only_what_is_below_a_pinned_folder_is_refused(tmp_path):
    run, other = tmp_path / "run", tmp_path / "run-2"
    run.mkdir()
    assert folders.pin_folder(run) and not folders.pin_folder(run)
    try:
        files.append_line(run / "a" / "b.jsonl", {})
        run.rename(tmp_path / "moved")
        for write in (
            lambda: files.append_line(run / "c.jsonl", {}),
            lambda: files.atomic_write(run / "d" / "e", ""),
            lambda: folders.pin_folder(run),
        ):
            with pytest.raises(OSError) as caught:
                write()
            assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(run))
        files.append_line(other / "c.jsonl", {})
        assert not run.exists() and other.exists()
    finally:
        folders.unpin_folder(run)
    files.append_line(run / "c.jsonl", {})
