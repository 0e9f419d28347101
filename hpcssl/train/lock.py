"""One writer per run folder: the kernel's lock, and beside it a heartbeat for where the kernel's lock does not reach.

``flock`` dies with its owner: no kill leaves a lock to remove by hand. On file systems that have none, or where it
holds on one host only (Lustre with ``localflock``, NFS with ``local_lock``), the holder's beats tell: a file whose
counter moves has a living holder. We watch it for a while ourselves; the clocks of two hosts are never compared.

A holder that finds another's name in the file (a stopped process that woke up, a node that came back) has lost the run:
``check`` says so before anything is saved.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hpcssl.errors import ResumeError, Stopped
from hpcssl.files import RunDir, make_folder

LOG = logging.getLogger("hpcssl")
BEAT_S = 15.0
STALE_BEATS = 4
"""A holder whose counter has not moved for so many intervals is gone."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ROOM = 1024  # bytes of the file: always as many, so that one write replaces all of it


class RunLock:
    """Held by rank 0 while it trains. ``take`` waits: a stopped attempt may still be leaving, and a network file system
    gives back the lock of a lost node only after its lease, a minute or two.

    ``job``, ``attempt``: names for a person; ``requeued`` says that the job's earlier attempts are over when this one
    runs, as SLURM sees to. ``on_loss`` is called from a thread, once, when the lock is found taken over.
    """

    def __init__(self, run: RunDir, job: str, *, attempt: int = 0, requeued: bool = False, beat_s: float = BEAT_S,
                 on_loss: Callable[[], None] = lambda: None):
        self.run, self.job, self.beat_s, self.on_loss = run, job, beat_s, on_loss
        self._requeued = requeued
        self._mine = {"token": uuid.uuid4().hex, "job": job, "attempt": attempt, "host": socket.gethostname(),
                      "pid": os.getpid(), "place": _place(), "started": _now()}
        self._fd: int | None = None
        self._beats, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    # -- taking ---------------------------------------------------------------------------------------------

    def take(self, patience_s: float = 30.0, stop: Callable[[], bool] = lambda: False) -> None:
        """Raise ``ResumeError``, naming the holder, if another process still trains in this folder, and ``Stopped``
        where ``stop()`` comes true while it is waited for."""
        make_folder(self.run.root)
        began, watched, told = time.monotonic(), _Watched(self.run.lock), False
        while True:
            locked = self._flock()
            if locked or locked is None:
                held = watched.look()
                free = not held or self._is_over(held, locked) or watched.still_s > STALE_BEATS * self.beat_s
                if free and self._write_first(locked):
                    break
                if not told and not free:
                    LOG.info("%s: looking whether %s still lives", self.run.lock, _name(held))
                    told = True
            patience = patience_s
            if locked is not False and not watched.moved:  # a judgement needs its time, whatever the patience
                patience = max(patience_s, (STALE_BEATS + 1) * self.beat_s)
            if stop() or time.monotonic() - began >= patience:
                holder = _name(_read(self.run.lock))
                self._close()
                if stop():
                    raise Stopped(f"run folder {self.run.root}", got=f"a request to stop, while {holder} held it",
                                  expected="one writer per run folder", mend="none is needed: nothing had begun")
                raise ResumeError(f"run folder {self.run.root}", got=f"a running writer: {holder}",
                                  expected="one writer per run folder",
                                  mend="wait for it, cancel it with `hpcssl-submit cancel`, or use another --run")
            time.sleep(min(0.5, self.beat_s / 2))
        self._thread.start()

    def _flock(self) -> bool | None:
        """Whether the kernel's lock is ours now; None where the file system has none."""
        if self._fd is None:
            self._fd = os.open(self.run.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.run.lock.exists() and os.path.samestat(os.fstat(self._fd), self.run.lock.stat()):
                return True
            self._close()  # somebody removed or replaced the file: a lock on what is left means nothing
            return False
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None

    def _is_over(self, held: dict, locked: bool | None) -> bool:
        """Whether the holder that the file names is certainly gone, without watching it."""
        if held.get("over") or (locked and "token" not in held):  # it beats nothing: the kernel's word is all there is
            return True
        if self._requeued and held.get("job") == self.job and held.get("attempt", 0) < self._mine["attempt"]:
            return True
        if held.get("place") != self._mine["place"]:
            return False  # another host
        return bool(locked) or not os.path.exists(f"/proc/{held.get('pid')}")

    def _write_first(self, locked: bool | None) -> bool:
        """Put our name into the file. Without the kernel's lock another may do so at the same time: the last one wins,
        and the others see it."""
        if locked:
            self._write()
            os.ftruncate(self._fd, _ROOM)
            return True
        fresh = self.run.lock.with_name(f".lock.{self._mine['token'][:8]}.tmp")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._close()
        self._fd = fd
        self._write()
        os.replace(fresh, self.run.lock)
        time.sleep(min(2.0, self.beat_s / 2))
        if (_read(self.run.lock) or {}).get("token") == self._mine["token"]:
            LOG.warning("%s: the file system has no locks; a second job on this folder is noticed by its heartbeat "
                        "alone", self.run.lock)
            return True
        self._close()
        return False

    # -- holding --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ``ResumeError`` if another has taken the run over. An unreadable file says nothing."""
        held = None
        with contextlib.suppress(OSError):
            held = _read(self.run.lock)
        if held and held.get("token", self._mine["token"]) != self._mine["token"]:
            raise ResumeError(f"run folder {self.run.root}", got=f"a lock that was taken over by {_name(held)}",
                              expected="one writer per run folder", mend="nothing: the run goes on there, and this "
                              "process, which had given no sign of life, saves nothing more")

    def _beat(self) -> None:
        while not self._over.wait(self.beat_s):
            try:
                self.check()
            except ResumeError as error:
                LOG.error("%s", error)
                self.on_loss()
                return
            with contextlib.suppress(OSError):  # a full or absent disk is told by whoever has something to save
                self._write()

    def _write(self, **more) -> None:
        self._beats += 1
        text = json.dumps(self._mine | {"beat": self._beats, "time": _now()} | more)
        os.pwrite(self._fd, text.ljust(_ROOM - 1).encode() + b"\n", 0)
        os.fsync(self._fd)

    def release(self) -> None:
        if self._fd is None:
            return
        self._over.set()
        if self._thread.ident is not None:  # else `take` has failed half-way, on a full disk perhaps
            self._thread.join(5.0)
            if self._thread.is_alive():
                return  # it waits for a file system that does not answer; the process's end gives the lock back
            with contextlib.suppress(OSError, ResumeError):
                self.check()
                self._write(over=True)
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _Watched:
    """A lock file as one observer sees it over time."""

    def __init__(self, path: Path):
        self.path, self.moved = path, False
        self._last, self._since = None, time.monotonic()

    def look(self) -> dict | None:
        """What the file says; None where it names nobody."""
        held = _read(self.path)
        if held != self._last:
            self.moved = self._last is not None
            self._last, self._since = held, time.monotonic()
        return held

    @property
    def still_s(self) -> float:
        return time.monotonic() - self._since


def _read(path: Path) -> dict | None:
    """The holder's own words; None where there are none. Half of a write is words of nobody in particular."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    try:
        held = json.loads(text)
    except ValueError:
        held = None
    return held if isinstance(held, dict) else {"unreadable": text} if text.strip() else None


def _name(held: dict | None) -> str:
    if not held or "job" not in held:
        return "an unnamed process"
    process = f"process {held.get('pid')}"
    job = "" if held["job"] == process else f"job {held['job']}, "  # what a person started has no other name
    return (f"{job}{process} on {held.get('host')}, started {held.get('started')}, last heartbeat {held.get('time')}")


def _place() -> str:
    """Where a process id means the same process: this boot of this machine, and this namespace of processes."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
