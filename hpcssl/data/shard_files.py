"""Open files of a shard folder: reads at any offset, with retries, and a check that files have not changed.

Reads use ``pread`` rather than ``mmap``: on a file system that others write to, a mapped file that shrinks kills the
process by SIGBUS. Shards that ``data/stage.py`` or ``data/cache.py`` put on this node belong to nobody else and may be
mapped.

A shard must not change while a job reads it. A reader that holds a file open is not affected when another file is
renamed over it, but it is when somebody writes into the file. Both are detected by inode, size and modification time:
here where an image does not decode or a read ends early, and by ``train/attempt/shard_watch.py`` for all shards at the
end of each epoch. A file that was only copied again, byte for byte, is accepted.

A process may hold a limited number of files open, so that of a large set only some are: the one that was opened first
is closed, and opened again when it is needed. What it was at first is remembered.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import TypeVar

from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError
from hpcssl.files import sha256_of_file
from hpcssl.storage import open_files

T = TypeVar("T")
LOG = logging.getLogger("hpcssl")
_SHARE_OF_LIMIT = 8
"""A set may use one in this many of the files that the process may hold open: a process may read several sets."""
_PAUSES_S = (0.1, 0.4, 1.6)  # seconds before each retry of a read that the file system refused

Identity = tuple[int, int, int, int]
"""Device, inode, size in bytes and modification time in ns of a file."""


class ShardFiles:
    """The files of a shard set, opened when they are first read. Safe for any number of threads.

    Args:
        shards: The set.
        mapped: Whether to map the files into memory; only for files that nobody else writes to.
        locate: Gives the path of shard n, for shards that come and go (``data/cache.py``). By default the path that
            ``shards`` gives.
    """

    def __init__(self, shards: ShardSet, *, mapped: bool = False, locate: Callable[[int], Path] | None = None):
        self.shards, self.mapped, self._locate = shards, mapped, locate
        # a thread that is reading holds its own reference to a file that is dropped here
        self._open_files: dict[int, FileIO | mmap.mmap] = {}
        self._identities: dict[int, Identity] = {}
        self._removed: set[int] = set()
        # `data/cache.py` keeps few shards, and closes them itself
        self._max_open = max(1, open_files.limit() // _SHARE_OF_LIMIT) if locate is None else len(shards.shards)
        self._lock = threading.RLock()  # ``locate`` may call ``keep_only`` while a file is being opened

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of shard number ``shard`` from ``offset``.

        Returns:
            The bytes; fewer where the file ends early.

        Raises:
            DataError: If the shard cannot be opened, has another size than the index records, cannot be read after
                several attempts, or was changed while it was open.
        """
        for pause in (*_PAUSES_S, None):
            file = self._open_files.get(shard) or self._get_file(shard)
            try:
                if isinstance(file, mmap.mmap):
                    data = file[offset : offset + size]
                else:
                    data = _pread(file.fileno(), size, offset)
                break
            except OSError as error:  # EIO, an unreachable server, or ESTALE: the handle's file was replaced
                self._drop(shard)
                if pause is None:
                    raise DataError(
                        f"shard {self.shards.path(shard)}",
                        got=f"{error.strerror} at byte {offset}, {len(_PAUSES_S) + 1} times",
                        expected="a readable file",
                        fix="check that the file system works; `hpcssl-shard verify` reads every byte",
                    ) from error
                time.sleep(pause)
        if len(data) < size:
            self.check_shard(shard)
        return data

    def keep_only(self, shards: set[int]) -> None:
        """Close the files of all other shards. A thread that is reading one of them finishes its read first."""
        for shard in self._open_files.keys() - shards:
            self._drop(shard)

    def check_shard(self, shard: int) -> None:
        """Compare a shard's file with what it was when it was opened.

        A removed file, and a file that was written again with the same bytes, only give a warning.

        Raises:
            DataError: If the file was changed.
        """
        path, before = self.shards.path(shard), self._identities.get(shard)
        try:
            now = os.stat(path)
        except FileNotFoundError:
            if self._locate is None and shard in self._open_files and shard not in self._removed:
                self._removed.add(shard)
                LOG.warning(
                    "Shard %s was removed. This attempt continues with the open file; another attempt cannot.", path
                )
            return
        if before is None or identity_of(now) == before:
            return
        check_rewritten(self.shards, shard)
        self._drop(shard)

    def close(self) -> None:
        """Close every file. A later read opens its file again."""
        with self._lock:
            while self._open_files:
                self._open_files.popitem()[1].close()
            self._identities.clear()

    def _get_file(self, shard: int) -> FileIO | mmap.mmap:
        with self._lock:
            file = self._open_files.get(shard)
            if file is None:
                self._close_oldest(len(self._open_files) - self._max_open + 1)
                file = self._open_files[shard] = self._open_checked(shard)
            return file

    def _close_oldest(self, count: int) -> None:
        """Close the files that were opened first, but remember what they were."""
        for shard in list(self._open_files)[: max(0, count)]:
            del self._open_files[shard]

    def _open_checked(self, shard: int) -> FileIO | mmap.mmap:
        try:
            return self._check_opened(shard, self._open_file(shard))
        except OSError as error:
            raise DataError(
                f"shard {self.shards.path(shard)}",
                got=error.strerror,
                expected="a readable file",
                fix="run `hpcssl-shard verify`; if too many files are open, raise `ulimit -n`",
            ) from error

    def _check_opened(self, shard: int, file: FileIO) -> FileIO | mmap.mmap:
        path, expected_size = self.shards.path(shard), self.shards.shards[shard].bytes
        status = os.fstat(file.fileno())
        if status.st_size != expected_size:
            file.close()
            raise DataError(
                f"shard {path}",
                got=f"{status.st_size} bytes",
                expected=f"{expected_size} bytes",
                fix="copy it again, or write the shards again with the same command",
            )
        before = self._identities.setdefault(shard, identity_of(status))
        if before != identity_of(status):
            self.check_shard(shard)
            self._identities[shard] = identity_of(status)
        if not self.mapped:
            return file
        with file:  # a map holds a descriptor of its own
            return self._call_with_files(lambda: mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def _call_with_files(self, call: Callable[[], T]) -> T:
        """Call what needs a descriptor; if the process has none left, close some shards and call it again."""
        try:
            return call()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open_files:
                raise
            self._close_oldest(len(self._open_files) // 2 + 1)
            return call()

    def _open_file(self, shard: int) -> FileIO:
        locate = self._locate
        if locate is None:
            return self._call_with_files(lambda: _open(self.shards.path(shard)))
        while True:
            try:
                return self._call_with_files(lambda: _open(locate(shard)))
            except FileNotFoundError:  # the cache removed it before it was opened
                continue

    def _drop(self, shard: int) -> None:
        with self._lock:
            self._open_files.pop(shard, None)
            self._identities.pop(shard, None)


def identity_of(status: os.stat_result) -> Identity:
    """What shows that a file is another one, or was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_rewritten(shards: ShardSet, number: int) -> None:
    """Compare a shard that was written or replaced while it is in use with the index. The same bytes give a warning.

    Raises:
        DataError: If the file has other bytes.
        OSError: If the file cannot be read.
    """
    path, described = shards.path(number), shards.shards[number]
    digest = sha256_of_file(path)
    if digest == described.sha256:
        LOG.warning("Shard %s was written again with the same bytes.", path)
        return
    raise DataError(
        f"shard {path}",
        got=f"another file than when it was opened ({os.stat(path).st_size} bytes, sha256 {digest[:12]}…)",
        expected=f"{described.bytes} bytes with sha256 {described.sha256[:12]}…, unchanged while a job reads it",
        fix="restore this shard as it was; the same command then continues from the last checkpoint",
    )


def _open(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) < size:  # a signal or a network file system can cut a read short before the end of the file
        data += _pread_rest(descriptor, size - len(data), offset + len(data))
    return data


def _pread_rest(descriptor: int, missing: int, offset: int) -> bytes:
    parts = []
    while missing > 0 and (part := os.pread(descriptor, missing, offset)):
        parts.append(part)
        missing, offset = missing - len(part), offset + len(part)
    return b"".join(parts)
