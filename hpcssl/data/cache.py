"""Shards of a remote set on this node's disk: fetched whole before they are asked for, and dropped when done with.

Which shards a step reads is known beforehand (``data/order.py``), so a thread fetches them in that order, up to a limit
of bytes, and takes away those that the order has left behind. Training reads files, as of any other set: the same
batches, and a start at any step. The processes of a node share the folder: each shard has a lock file, and while one
process fetches a shard the others take the next ones. A lock dies with its holder, and a shard appears under its name
when it is whole and its sha256 agrees: a kill leaves nothing behind but a temporary, which the next one removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcssl.data.order import Order
from hpcssl.data.shards import INDEX, ShardSet, digest_of
from hpcssl.data.stage import locked, no_room, own_folder, refused
from hpcssl.data.stream import Remote, is_remote
from hpcssl.errors import ConfigError, DataError
from hpcssl.files import atomic_write, digest

log = logging.getLogger("hpcssl")
_AGAIN_S = 10.0  # after a transfer that failed for good, the thread waits so long before the next
_SLACK = 4  # steps that the loader and the other ranks may be apart from this rank's step


def opened(address: str | Path, *, stage: str = "", key: str, stall_s: float = 60.0, tries: int = 5) -> ShardSet:
    """A shard folder, or the index of one at an address whose ``near()`` fetches all of it to ``stage``.

    ``key`` names it in errors. Raises ``ConfigError``, ``DataError``.
    """
    if isinstance(address, Path) or not is_remote(address):
        return ShardSet.open(address)
    remote = Remote(address, stall_s=stall_s, tries=tries, key=key)
    text = remote.text()
    found = remote.open(text)
    found.near = lambda: Cache(remote, text, stage).whole()
    return found


class Cache:
    """The set behind ``remote`` below ``folder``. ``shards`` is the set; ``path(n)`` waits until shard n is here.

    ``text``: its ``index.json``. ``limit``: bytes that are kept, 0 for all. A limited cache is ``owner``'s alone, since
    others drop other shards; a whole one is shared by whoever uses this set on this node, and never shrinks.
    ``progress`` is called, from any thread, for each shard that ``path`` gives.
    Raises ``DataError``.
    """

    def __init__(self, remote: Remote, text: str, folder: Path | str, *, limit: int = 0, owner: str = "",
                 progress: Callable[[], None] = lambda: None):
        self.remote, self.limit, self.progress = remote, limit, progress
        whose = f"-{hashlib.sha256(owner.encode()).hexdigest()[:8]}" if limit else ""
        try:
            name = digest_of(json.loads(text))
        except (KeyError, TypeError):
            name = remote.open(text).digest  # which says what is wrong with it
        self.folder = own_folder(folder, f"{name[:16]}-remote{whose}")
        self._locks = self.folder / "locks"
        self.shards = self._index(text)
        self._turn = threading.Condition()
        self._done = self._opened = 0
        self._thread: threading.Thread | None = None
        self._over = False
        remote.over = lambda: self._over

    def _index(self, text: str) -> ShardSet:
        """The set, with its index in the folder. What lies beside the index comes over the network once per node."""
        with locked(self.folder / "lock"):
            found = ShardSet.described(f"the index of {self.remote.address}", self.folder, text, self._beside)
            if not (self.folder / INDEX).exists() or (self.folder / INDEX).read_text() != text:
                self._keep(INDEX, text)
        return found

    def _beside(self, name: str, sha256: str) -> bytes:
        path = self.folder / name
        if not path.exists() or digest(path) != sha256:
            self._keep(name, self.remote.body(name, sha256))
        return path.read_bytes()

    def _keep(self, name: str, body: bytes | str) -> None:
        try:
            atomic_write(self.folder / name, body)
        except OSError as error:
            raise refused(self.folder, len(body), error) from error

    # -- one shard ------------------------------------------------------------------------------------------

    def has(self, number: int) -> bool:
        """Whether shard ``number`` is here, by its size."""
        try:
            return self.shards.path(number).stat().st_size == self.shards.shards[number].bytes
        except OSError:
            return False

    def path(self, number: int) -> Path:
        """Where shard ``number`` lies, fetched first if it is not here. Raises ``DataError``."""
        while not self.has(number):
            if not self._fetch(number):
                self._refuse_end()
                time.sleep(0.05)  # another process is fetching it
        self.progress()
        return self.shards.path(number)

    def again(self, number: int) -> None:
        """Fetch a shard anew that has changed on this disk. Raises ``DataError``."""
        self.shards.path(number).unlink(missing_ok=True)
        self.path(number)

    def _fetch(self, number: int) -> bool:
        """Fetch a shard; False where somebody else is about to. Raises ``DataError``."""
        shard, target = self.shards.shards[number], self.shards.path(number)
        try:
            self._locks.mkdir(exist_ok=True)  # where /tmp is swept, what lies long unused goes
            with _tried(self._locks / shard.name) as mine:
                if not mine:
                    return False
                if self.has(number):
                    return True
                for left in self.folder.glob(f".{shard.name}.*.tmp"):  # of a process that was killed with the lock
                    left.unlink(missing_ok=True)
                free = shutil.disk_usage(self.folder).free
                if free < shard.bytes:
                    raise no_room(self.folder, shard.bytes, free)
                self.remote.fetch(shard, target)
                return True
        except OSError as error:
            raise refused(self.folder, shard.bytes, error) from error

    def _refuse_end(self) -> None:
        if self._over:
            raise DataError(f"shards of {self.remote.address}", got="the end of the attempt", expected="a shard that "
                            "another process is fetching", mend="run the same command again")

    # -- all of them ----------------------------------------------------------------------------------------

    def whole(self) -> ShardSet:
        """The set with every shard here. The processes of a node share the work. Raises ``DataError``."""
        self._refuse_small(range(len(self.shards.shards)))
        for number in range(len(self.shards.shards)):
            self.has(number) or self._fetch(number)
        for number in range(len(self.shards.shards)):  # those that others were fetching
            self.path(number)
        return self.shards

    # -- in the order of the training -----------------------------------------------------------------------

    def follow(self, order: Order, start: int, stop: int, *, ahead: int, forget: Callable[[set[int]], None]) -> None:
        """Fetch in a thread what steps ``start`` .. ``stop`` - 1 will read, until ``close``.

        ``ahead``: steps that the loader reads ahead. ``forget(keep)``: told before shards outside of ``keep`` are
        taken away, so that no file of them stays open. Raises ``ConfigError`` for a limit that cannot hold what those
        steps read, ``DataError`` for a disk that cannot.
        """
        sizes = sorted((s.bytes for s in self.shards.shards), reverse=True)
        least = sum(sizes[:order.held(ahead + _SLACK)])
        if self.limit and self.limit < least:
            mend = "set data.window=16, which reads a few shards at a time" if order.window == "all" else \
                "take a smaller data.window, or smaller shards"
            raise ConfigError("data.stage_gb", got=f"{self.limit / 1e9:g}", expected=f"{least / 1e9:.3g} or more, for "
                              f"the shards that data.window={order.window} reads at a time, or 0 for no limit",
                              mend=f"raise it, or {mend}")
        self._refuse_small(self._ahead(order, start, stop))
        self._done = self._opened = start
        self._thread = threading.Thread(target=self._work, args=(order, stop, forget), name="shards", daemon=True)
        self._thread.start()

    def at(self, step: int, opened: int) -> None:
        """The consumer takes step ``step``; the loader reads ahead, before step ``opened``."""
        with self._turn:
            self._done, self._opened = max(0, step - _SLACK // 2), opened
            self._turn.notify_all()

    def close(self) -> None:
        """End the thread and every transfer. What is here stays, for the next attempt."""
        with self._turn:
            self._over = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _refuse_small(self, wanted) -> None:
        missing = sum(self.shards.shards[n].bytes for n in wanted if not self.has(n))
        kept = sum(s.bytes for n, s in enumerate(self.shards.shards) if self.has(n)) if self.limit else 0
        needed, free = min(missing, self.limit - kept) if self.limit else missing, shutil.disk_usage(self.folder).free
        if needed > free:
            raise no_room(self.folder, needed, free)

    def _ahead(self, order: Order, step: int, stop: int) -> list[int]:
        """The shards that will be read from ``step`` on, soonest first, as many as the limit holds."""
        found: dict[int, None] = {}
        room = self.limit
        for window in order.ahead(step, stop):
            for number in window.tolist():
                size = self.shards.shards[number].bytes
                if number in found:
                    continue
                if self.limit and room < size:
                    return list(found)
                found[number] = None
                room -= size
            if len(found) == len(self.shards.shards):
                break
        return list(found)

    def _work(self, order: Order, stop: int, forget: Callable[[set[int]], None]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are the main thread's business
        while not self._over:
            done, opened = self._done, self._opened
            keep = set(self._ahead(order, done, stop))
            if self.limit:
                self._drop(keep, forget)
            missing = [n for n in self._ahead(order, opened, stop) if n in keep and not self.has(n)]
            if not missing and not self.limit:
                return
            pause = self._fetch_one(missing)
            with self._turn:
                if pause and not self._over and (self._done, self._opened) == (done, opened):
                    self._turn.wait(pause)

    def _fetch_one(self, missing: list[int]) -> float:
        """Fetch the first of these that nobody else fetches; seconds to wait after that."""
        try:
            if any(self._fetch(number) for number in missing):
                return 0.0
            return 0.2 if missing else 5.0
        except DataError as error:
            if not self._over:
                log.warning("%s; it is tried again, and is an error when the training needs it", error)
            return _AGAIN_S

    def _drop(self, keep: set[int], forget: Callable[[set[int]], None]) -> None:
        gone = [n for n in range(len(self.shards.shards)) if n not in keep and self.has(n)]
        forget(keep)
        for number in gone:
            self.shards.path(number).unlink(missing_ok=True)


@contextlib.contextmanager
def _tried(path: Path) -> Iterator[bool]:
    """Hold the lock of this file, or say at once that another process does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
