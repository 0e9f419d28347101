"""One writer per run folder. The kernel's lock dies with its owner: no kill leaves a lock to remove by hand."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time

from hpcssl.errors import ResumeError
from hpcssl.files import RunDir

LOG = logging.getLogger("hpcssl")


class RunLock:
    """Held by rank 0 while it trains. ``take`` waits: a stopped attempt may still be leaving, and a network file system
    gives back the lock of a lost node only after its lease, a minute or two."""

    def __init__(self, run: RunDir, job: str):
        self.run, self.job, self._file = run, job, None

    def take(self, patience_s: float = 30.0) -> None:
        """Raise ``ResumeError``, naming the holder, if another process still trains in this folder."""
        self.run.root.mkdir(parents=True, exist_ok=True)
        self._file = open(self.run.lock, "a+")  # noqa: SIM115 - closing it would release the lock
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ResumeError(f"run folder {self.run.root}", got=f"a running writer: {self._holder()}",
                                      expected="one writer per run folder",
                                      mend="wait for it, cancel it with `hpcssl-submit cancel`, or use another --run") \
                        from None
                time.sleep(0.5)
            except OSError as error:
                LOG.warning("%s: the file system has no locks (%s); a second job on this folder would not be noticed",
                            self.run.lock, error.strerror)
                break
        self._file.truncate(0)
        self._file.write(json.dumps({"job": self.job, "host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            held = json.loads(self._file.read())
            return f"job {held['job']}, process {held['pid']} on {held['host']}"
        except (ValueError, KeyError):
            return "an unnamed process"

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
