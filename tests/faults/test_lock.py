"""One writer per run folder, by the kernel's lock and where there is none by the heartbeat."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcssl.errors import ResumeError, Stopped
from hpcssl.files import RunDir
from hpcssl.train import lock as locks
from hpcssl.train.checkpoint import State, Store
from hpcssl.train.lock import RunLock
from hpcssl.world import World

BEAT = 0.1
HOLDER = """
import fcntl, os, sys, time
from hpcssl.files import RunDir
from hpcssl.train import lock
def refuse(fd, how):
    raise OSError({errno}, os.strerror({errno}))
if {errno}:
    fcntl.flock = refuse
os.fsync = lambda fd: None
lock._place = lambda: {place!r} or lock.socket.gethostname()
held = lock.RunLock(RunDir({run!r}), "17", attempt=3, beat_s={beat}); held.take(0.0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def holder(run):
    """holder(errno=0, place="") -> a process that holds the lock; errno: what its flock fails with; place: its host."""
    started = []

    def start(number=0, place=""):
        code = HOLDER.format(errno=int(number), run=str(run.root), beat=BEAT, place=place)
        started.append(subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        cwd=Path(__file__).parents[2]))
        assert started[-1].stdout.readline() == b"held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close(), process.stdout.close()


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(_fd, _how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(autouse=True)
def one_place(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a busy disk must not look like a holder that is gone
    monkeypatch.setattr(locks, "_place", lambda: locks.socket.gethostname())


def second(run, **options):
    return RunLock(run, "18", beat_s=BEAT, **options)


def test_the_second_refuses_and_names_the_first(run, holder):
    first = holder()
    with pytest.raises(ResumeError) as told:
        second(run).take(0.0)
    named = rf"a running writer: job 17, process {first.pid} on \S+, started \S+, last heartbeat \d{{4}}-\d\d-\d\dT"
    assert re.search(named, str(told.value)), told.value
    assert "use another --run" in str(told.value) and "\n" not in str(told.value)


def test_who_waits_for_the_holder_can_be_stopped(run, holder):
    holder()
    asked = iter([False, True, True])
    waiting = second(run)
    with pytest.raises(Stopped, match=r"a request to stop, while job 17, process \d+ on .* held it"):
        waiting.take(600.0, lambda: next(asked))
    waiting.release()


def test_a_disk_without_room_for_the_lock_is_told_and_nothing_hides_it(run, monkeypatch):
    lock = second(run)
    monkeypatch.setattr(os, "pwrite", _refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        lock.take(0.0)
    lock.release()  # as the attempt does, whatever it ends by
    monkeypatch.undo()
    other = second(run)
    other.take(0.0)
    other.release()


def test_the_holder_beats_and_the_file_is_always_whole(run):
    lock = second(run)
    lock.take(0.0)
    seen = set()
    for _ in range(10_000):
        seen.add(json.loads(run.lock.read_text())["beat"])
        time.sleep(0.001)
        if len(seen) > 3:
            break
    assert len(seen) > 3 and run.lock.stat().st_size == 1024
    lock.release()
    assert json.loads(run.lock.read_text())["over"]
    lock.release()  # twice is once


@pytest.mark.parametrize("number", [0, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_killed_holder_leaves_no_lock_to_remove(run, holder, monkeypatch, number):
    first = holder(number)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    if number:
        monkeypatch.setattr(fcntl, "flock", _refuse(number))
    lock = second(run)
    lock.take(0.0)
    assert json.loads(run.lock.read_text())["job"] == "18"
    lock.release()


def _refuse(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    return flock


def test_without_the_kernels_lock_the_heartbeat_refuses(run, holder, no_flock, caplog):
    first = holder(errno.ENOLCK)
    with pytest.raises(ResumeError, match=rf"a running writer: job 17, process {first.pid} on"):
        second(run).take(0.0)
    assert json.loads(run.lock.read_text())["job"] == "17"
    locks.LOG.propagate = True
    first.communicate(b"")  # it ends without a release
    second(run).take(0.0)
    assert "the file system has no locks" in caplog.text


def test_a_lock_that_holds_on_one_host_only_is_backed_by_the_heartbeat(run, holder):
    """As on Lustre with ``localflock``: the kernel gives both hosts the lock, and the file tells of the other."""
    first = holder(errno.ENOLCK, "another host")
    with pytest.raises(ResumeError, match="a running writer: job 17"):
        second(run).take(0.0)
    os.kill(first.pid, signal.SIGSTOP)
    began = time.monotonic()
    lock = second(run)
    lock.take(0.0)
    assert time.monotonic() - began > locks.STALE_BEATS * BEAT  # watched, and not judged by a clock
    os.kill(first.pid, signal.SIGCONT)
    time.sleep(4 * BEAT)
    lock.check()  # whoever wakes up finds that the run is another's, and leaves its name alone
    assert json.loads(run.lock.read_text())["job"] == "18"
    lock.release()


def test_a_requeued_job_needs_not_wait_for_its_earlier_attempt(run, holder, no_flock):
    holder(errno.ENOLCK, "another host")
    for other in (RunLock(run, "17", attempt=3, requeued=True, beat_s=BEAT),
                  RunLock(run, "17", attempt=4, beat_s=BEAT)):
        with pytest.raises(ResumeError, match="a running writer: job 17"):
            other.take(0.0)
    lock = RunLock(run, "17", attempt=4, requeued=True, beat_s=5.0)
    began = time.monotonic()
    lock.take(0.0)
    assert time.monotonic() - began < locks.STALE_BEATS * 5.0
    lock.release()


def test_of_several_takers_without_locks_one_wins(run, no_flock):
    takers = [RunLock(run, str(number), beat_s=0.2) for number in range(4)]
    won = []

    def take(taker):
        try:
            taker.take(0.0)
            won.append(taker)
        except ResumeError:
            pass

    threads = [threading.Thread(target=take, args=(taker,)) for taker in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].check()
    won[0].release()


def test_whoever_lost_the_run_saves_nothing_more(run):
    """A stopped process wakes up and finds another's name: its next save raises, on all ranks, and leaves no trace."""
    lost = threading.Event()
    first = RunLock(run, "17", beat_s=BEAT, on_loss=lost.set)
    first.take(0.0)
    store = Store(run, World.alone(), guard=first.check)
    assert store.save(State(1, {}, {}, "f", {}, {})) is None
    store.begin(State(2, {}, {}, "f", {}, {}))
    run.lock.unlink()  # the kernel's lock is on the file that was: as good as a host that came back
    other = second(run)
    other.take(0.0)
    assert lost.wait(10)
    for work in (store.finish, lambda: store.save(State(3, {}, {}, "f", {}, {}))):
        with pytest.raises(ResumeError, match=r"a lock that was taken over by job 18, .* the run goes on there"):
            work()
    assert not run.checkpoint(3).exists() and not (run.checkpoint(2) / "manifest.json").exists()
    first.release()
    assert json.loads(run.lock.read_text())["job"] == "18" and "over" not in json.loads(run.lock.read_text())
    other.release()


@pytest.mark.parametrize("text", ["", "{", '{"job": "old", "host": "h", "pid": 1}', "\0" * 50])
def test_a_file_that_names_nobody_alive_is_taken(run, text):
    run.root.mkdir()
    run.lock.write_text(text)
    lock = second(run)
    lock.take(0.0)
    lock.check()
    lock.release()
