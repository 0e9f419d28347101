"""One writer per run folder: the kernel's file lock, and a heartbeat for file systems on which that is not enough.

``flock`` is released when its process ends, so that no kill leaves a lock to remove by hand. Some file systems have no
such lock, or one that holds on a single host (Lustre with ``localflock``, NFS with ``local_lock``). There the holder's
heartbeat decides: a lock file whose counter changes has a living holder.

A holder that finds another name in the file (a suspended process that was resumed, a node that came back) has lost the
run: ``check`` raises before it saves anything. So has a holder that does not find its file at the path: somebody has
moved, removed or replaced the run folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcssl.errors import ResumeError, Stopped
from hpcssl.files import lock_descriptor
from hpcssl.run_dir import RunDir
from hpcssl.storage.folders import make_folder
from hpcssl.train.attempt.lock_file import LockFileObserver, describe_holder, read_holder

LOG = logging.getLogger("hpcssl")
BEAT_S = 15.0
"""Seconds between two heartbeats."""
STALE_BEATS = 4
"""A holder whose counter does not change for this number of intervals is gone."""
_RECORD_BYTES = 1024  # always as many, so that one write replaces the whole record


class RunLock:
    """The lock of a run folder, held by rank 0 while it trains.

    Args:
        run: The run folder.
        job: Name of the job, for error messages and to recognize requeued attempts.
        attempt: Number of the attempt.
        requeued: Whether earlier attempts of the same job are certainly over when this one runs, as SLURM ensures.
        beat_s: Seconds between two heartbeats.
        on_loss: Called once, from another thread, when the lock is lost.
    """

    def __init__(
        self,
        run: RunDir,
        job: str,
        *,
        attempt: int = 0,
        requeued: bool = False,
        beat_s: float = BEAT_S,
        on_loss: Callable[[], None] = lambda: None,
    ):
        self.run, self.job, self.beat_s, self.on_loss = run, job, beat_s, on_loss
        self._requeued = requeued
        self._own: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "job": job,
            "attempt": attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": _pid_namespace(),
            "started": _now(),
        }
        self._descriptor: int | None = None
        self._beats, self._released = 0, threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="lock", daemon=True)

    # -- taking ---------------------------------------------------------------------------------------------

    def take(self, patience_s: float = 30.0, stop: Callable[[], bool] = lambda: False) -> None:
        """Take the lock, and wait for it if necessary.

        A stopped attempt may still be ending, and a network file system releases the lock of a lost node only after
        its lease of one or two minutes.

        Args:
            patience_s: Seconds to wait. A holder whose heartbeat must be watched is watched at least
                ``STALE_BEATS + 1`` intervals.
            stop: Ends the wait when it returns true.

        Raises:
            ResumeError: Another process trains in this folder; the message names it.
            Stopped: ``stop`` returned true during the wait.
        """
        make_folder(self.run.root)
        began, observer, announced = time.monotonic(), LockFileObserver(self.run.lock), False
        while True:
            locked = self._take_file_lock()
            if locked or locked is None:
                holder = observer.look()
                is_free = self._is_free(holder, locked, observer)
                if is_free and self._write_first(locked):
                    break
                if not announced and not is_free:
                    LOG.info("%s: waiting to see whether %s is still alive.", self.run.lock, describe_holder(holder))
                    announced = True
            patience = patience_s
            if locked is not False and not observer.changed:  # the verdict needs its time
                patience = max(patience_s, (STALE_BEATS + 1) * self.beat_s)
            if stop() or time.monotonic() - began >= patience:
                self._give_up(stopped=stop())
            time.sleep(min(0.5, self.beat_s / 2))
        self._thread.start()

    def _give_up(self, *, stopped: bool) -> None:
        holder = describe_holder(read_holder(self.run.lock))
        self._close()
        if stopped:
            raise Stopped(
                f"run folder {self.run.root}",
                got=f"a request to stop while {holder} held the folder",
                expected="one writer per run folder",
            )
        raise ResumeError(
            f"run folder {self.run.root}",
            got=f"a running writer: {holder}",
            expected="one writer per run folder",
            fix="wait for it, cancel it with `hpcssl-submit cancel`, or use another --run",
        )

    def _take_file_lock(self) -> bool | None:
        """Try to take the kernel's lock. True if it is ours now; None if the file system has none."""
        if self._descriptor is None:
            self._descriptor = os.open(self.run.lock, os.O_RDWR | os.O_CREAT, 0o644)
        locked = lock_descriptor(self._descriptor)
        if not locked:
            return locked
        if self.run.lock.exists() and os.path.samestat(os.fstat(self._descriptor), self.run.lock.stat()):
            return True
        self._close()  # the file was removed or replaced: a lock on the old one means nothing
        return False

    def _is_free(self, holder: dict[str, Any] | None, locked: bool | None, observer: LockFileObserver) -> bool:
        """Return whether the holder that the file names is gone."""
        if not holder or holder.get("over"):
            return True
        if locked and "token" not in holder:  # no heartbeat to watch: the kernel's lock decides
            return True
        if self._requeued and holder.get("job") == self.job and holder.get("attempt", 0) < self._own["attempt"]:
            return True
        if holder.get("place") == self._own["place"] and (locked or not os.path.exists(f"/proc/{holder.get('pid')}")):
            return True  # a process id of this host that does not exist
        return observer.unchanged_s > STALE_BEATS * self.beat_s

    def _write_first(self, locked: bool | None) -> bool:
        """Write our record into the file; False if another process was faster.

        Without the kernel's lock another process may do the same at this moment. The last one wins, and the others
        see it.
        """
        if locked:
            self._write()
            assert self._descriptor is not None
            os.ftruncate(self._descriptor, _RECORD_BYTES)
            return True
        new_path = self.run.lock.with_name(f".lock.{self._own['token'][:8]}.tmp")
        descriptor = os.open(new_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._close()
        self._descriptor = descriptor
        self._write()
        os.replace(new_path, self.run.lock)
        time.sleep(min(2.0, self.beat_s / 2))
        if (read_holder(self.run.lock) or {}).get("token") == self._own["token"]:
            LOG.warning(
                "%s: the file system has no locks. Only the heartbeat keeps a second job out of this folder.",
                self.run.lock,
            )
            return True
        self._close()
        return False

    # -- holding --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that the lock is still ours. A file that cannot be read proves nothing.

        Raises:
            ResumeError: Another process has taken the run over, or the run folder is not in its place any more.
        """
        holder, in_place = None, True
        with contextlib.suppress(OSError):
            holder = read_holder(self.run.lock)
            in_place = self._is_in_place()
        if holder and holder.get("token", self._own["token"]) != self._own["token"]:
            raise ResumeError(
                f"run folder {self.run.root}",
                got=f"a lock that was taken over by {describe_holder(holder)}, after this process had shown no sign of "
                "life; it saves nothing more, and the other process continues the run",
                expected="one writer per run folder",
            )
        if not in_place:
            raise ResumeError(
                f"run folder {self.run.root}",
                got="a folder that was moved, removed or replaced while this process trained in it; it saves nothing "
                "more",
                expected="the lock file of this process",
                fix="continue the run where its folder is now: the same command with that --run",
            )

    def _is_in_place(self) -> bool:
        """Whether the file at the lock's path is the one that we hold."""
        if self._descriptor is None:
            return True
        try:
            return os.path.samestat(self.run.lock.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _send_heartbeats(self) -> None:
        while not self._released.wait(self.beat_s):
            try:
                self.check()
            except ResumeError as error:
                LOG.error("%s", error)
                self.on_loss()
                return
            with contextlib.suppress(OSError):  # a full or absent disk is reported by whatever is saved there
                self._write()

    def _write(self, **fields: Any) -> None:
        assert self._descriptor is not None
        self._beats += 1
        text = json.dumps(self._own | {"beat": self._beats, "time": _now()} | fields)
        os.pwrite(self._descriptor, text.ljust(_RECORD_BYTES - 1).encode() + b"\n", 0)
        os.fsync(self._descriptor)

    def release(self) -> None:
        """Release the lock. Does nothing if it is not held."""
        if self._descriptor is None:
            return
        self._released.set()
        if self._thread.ident is not None:  # otherwise ``take`` has failed half-way, perhaps on a full disk
            self._thread.join(5.0)
            if self._thread.is_alive():
                return  # it waits for a file system that does not answer; the process's end releases the lock
            with contextlib.suppress(OSError, ResumeError):
                self.check()
                self._write(over=True)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _pid_namespace() -> str:
    """Return where a process id means the same process: this boot of this machine, and its namespace of ids."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
