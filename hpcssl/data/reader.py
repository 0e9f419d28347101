"""The bytes of any sample in one ``pread``: no iteration, no extraction, no state to resume.

``pread`` and not ``mmap``: on a file system that others write, a mapped file that shrinks kills the process by
SIGBUS. Shards that ``data/stage.py`` copied to this node belong to nobody else, and may be mapped (``mapped=True``).

A shard must stay what it was when it was opened. Whoever renames another file over it changes nothing for a reader that
holds the old one open, and whoever writes into it does: both are found by inode, size and time of change when a sample
is cut short or does not decode, and by ``check``. A file that was only copied anew, byte for byte, may go on.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from hpcssl import rng
from hpcssl.data.decode import Damaged, Scratch, decode
from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError
from hpcssl.files import digest

log = logging.getLogger("hpcssl")
_TRIES = 16  # replacements tried for one sample; each is drawn from the whole set
_SHOWN = 8
_PAUSES_S = (0.1, 0.4, 1.6)  # before a read that the file system refused is tried again


@dataclass(frozen=True)
class Loss:
    """One damaged sample: its global index, its key, its shard's name, and what was wrong with it."""

    index: int
    key: str
    shard: str
    reason: str


class Reader:
    """Random access to a shard folder's samples, for any number of threads.

    ``limit``: how many different damaged samples this reader bears; the next one raises ``DataError`` naming them;
    None where somebody else counts. ``damaged``: those met so far, by index. ``near(n)``: path of shard n, for shards
    that come and go (``data/cache.py``); by default that of ``shards``.
    """

    def __init__(self, shards: ShardSet, *, limit: int | None = 0, seed: int = 0, mapped: bool = False,
                 near: Callable[[int], Path] | None = None):
        self.shards, self.limit, self.seed, self.mapped, self._near = shards, limit, seed, mapped, near
        self.labels = shards.labels
        self.damaged: dict[int, Loss] = {}
        # columns of their own: taking a field of a row of the table costs as much as the read
        column = {name: np.ascontiguousarray(shards.rows[name]) for name in shards.rows.dtype.names}
        self._shard = column["shard"].item
        self._image = column["offset"].item, column["size"].item
        self._second = column["offset_b"].item, column["size_b"].item
        self._open: dict[int, FileIO | mmap.mmap] = {}  # a thread that reads keeps what is dropped here open
        self._identity: dict[int, tuple] = {}
        self._removed: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int) -> bytes:
        """The encoded image of sample ``index``."""
        return self._bytes(index, *self._image)

    def read_second(self, index: int) -> bytes:
        """The encoded second modality (``KEY.b.*``) of sample ``index``."""
        return self._bytes(index, *self._second)

    def _bytes(self, index: int, offset_of: Callable[[int], int], size_of: Callable[[int], int]) -> bytes:
        offset, size, shard = offset_of(index), size_of(index), self._shard(index)
        for pause in (*_PAUSES_S, None):
            file = self._open.get(shard) or self._file(shard)
            try:
                data = file[offset:offset + size] if self.mapped else _read(file.fileno(), size, offset)
                break
            except OSError as error:  # EIO, a server that is away, or ESTALE: its file is another one by now
                self._drop(shard)
                if pause is None:
                    raise DataError(f"shard {self.shards.path(shard)}", got=f"{error.strerror} at byte {offset}, "
                                    f"{len(_PAUSES_S) + 1} times", expected="a file that can be read",
                                    mend="see whether the file system is well; `hpcssl-shard verify` reads every byte"
                                    ) from error
                time.sleep(pause)
        if len(data) < size:
            self._refuse_changed(shard)
        return data

    def _file(self, shard: int) -> FileIO | mmap.mmap:
        with self._lock:
            if shard not in self._open:
                path, wanted = self.shards.path(shard), self.shards.shards[shard].bytes
                try:
                    file = self._opened(shard)
                except OSError as error:
                    raise DataError(f"shard {path}", got=error.strerror, expected="a file that can be read",
                                    mend="see `hpcssl-shard verify`; if too many files are open, raise `ulimit -n` "
                                         "above the number of shards") from error
                found = os.fstat(file.fileno())
                if found.st_size != wanted:
                    file.close()
                    raise DataError(f"shard {path}", got=f"{found.st_size} bytes", expected=f"{wanted} bytes",
                                    mend="copy it again, or write the shards again with the same command")
                self._identity[shard] = _identity(found)
                if self.mapped:
                    with file:
                        self._open[shard] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                else:
                    self._open[shard] = file
            return self._open[shard]

    def _opened(self, shard: int) -> FileIO:
        if self._near is None:
            return _file(self.shards.path(shard))
        while True:
            try:
                return _file(self._near(shard))
            except FileNotFoundError:  # dropped again before it was opened
                continue

    def _drop(self, shard: int) -> None:
        with self._lock:
            self._open.pop(shard, None)
            self._identity.pop(shard, None)

    def keep_only(self, shards: set[int]) -> None:
        """Let go of the files of all other shards; a thread that is reading one of them ends its read first."""
        for shard in self._open.keys() - shards:
            self._drop(shard)

    def check(self) -> None:
        """Compare the files with what they were when they were opened. ``DataError`` names one that was changed."""
        for shard in list(self._identity):
            self._refuse_changed(shard)

    def _refuse_changed(self, shard: int) -> None:
        path, wanted, before = self.shards.path(shard), self.shards.shards[shard], self._identity.get(shard)
        try:
            now = os.stat(path)
        except FileNotFoundError:
            if self._near is None and shard not in self._removed:
                self._removed.add(shard)
                log.warning("shard %s was removed; this attempt goes on with the open file, another one cannot", path)
            return
        if before is None or _identity(now) == before:
            return
        if now.st_size == wanted.bytes and digest(path) == wanted.sha256:
            log.warning("shard %s was written again with the same bytes", path)
            self._drop(shard)
            return
        raise DataError(f"shard {path}", got=f"another file than when it was opened ({now.st_size} bytes, sha256 "
                        f"{digest(path)[:12]}…)", expected=f"{wanted.bytes} bytes with sha256 {wanted.sha256[:12]}…, "
                        "unchanged while a job reads it", mend="copy or write this shard again as it was; the same "
                        "command then goes on from the last checkpoint")

    def images(self, index: int, epoch: int, *, first: bool = True, second: bool = False, body: bytes | None = None,
               scratch: tuple[Scratch, Scratch] | None = None) -> tuple[int, np.ndarray | None, np.ndarray | None]:
        """Decoded image and second modality of sample ``index``, or of its replacement.

        A damaged sample is replaced by one drawn at (seed, "replace", epoch, index, try): the same one on every rank,
        thread and resume. ``body``: what ``read(index)`` gave, where it was read before. Returns (index that was
        really read, uint8 HWC | None, uint8 HWC | None), so that the label travels with the image. Raises
        ``DataError`` past ``limit``.
        """
        chosen = index
        for attempt in range(_TRIES):
            try:
                one = two = None
                if first:
                    one = decode(self.read(chosen) if body is None else body, scratch and scratch[0])
                if second:
                    two = decode(self.read_second(chosen), scratch and scratch[1])
                return chosen, one, two
            except Damaged as error:
                self._refuse_changed(self._shard(chosen))
                self._lose(chosen, str(error))
            body = None
            draw = rng.raw(rng.key(self.seed, "replace", epoch, index, attempt), 1)[0]
            chosen = int(draw % np.uint64(len(self)))
        raise self._too_many(f"{_TRIES} samples in a row that cannot be decoded")

    def _lose(self, index: int, reason: str) -> None:
        with self._lock:
            if index not in self.damaged:
                shard = self.shards.shards[self._shard(index)].name
                loss = self.damaged[index] = Loss(index, self.shards.key(index), shard, reason)
                log.warning("damaged sample %s (%s in %s): %s; another one takes its place",
                            loss.index, loss.key, loss.shard, loss.reason)
            if self.limit is not None and len(self.damaged) > self.limit:
                raise self._too_many(f"{len(self.damaged)} damaged")

    def _too_many(self, got: str) -> DataError:
        return too_many(self.shards, got, self.damaged.values(), self.limit)

    def close(self) -> None:
        """Close every file. The reader opens them again when asked for more."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()
            self._identity.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def too_many(shards: ShardSet, got: str, damaged: Iterable[Loss], limit: int | None) -> DataError:
    """The error for more damaged samples than are borne; it names the first ones."""
    losses = sorted(damaged, key=lambda loss: loss.index)
    names = "; ".join(f"{x.key} (sample {x.index}, {x.shard}): {x.reason}" for x in losses[:_SHOWN])
    more = f"; and {len(losses) - _SHOWN} more" if len(losses) > _SHOWN else ""
    return DataError(f"samples of {shards.root}", got=f"{got}: {names}{more}",
                     expected="samples that can be decoded" if limit is None else f"at most {limit} damaged samples",
                     mend="copy or write these shards again, or allow more with data.damaged_limit")


def _file(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _identity(found: os.stat_result) -> tuple:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(fd: int, size: int, offset: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) < size:  # a signal or a network file system may cut a read short; the end of the file may not
        data += _rest(fd, size - len(data), offset + len(data))
    return data


def _rest(fd: int, missing: int, offset: int) -> bytes:
    parts = []
    while missing > 0 and (part := os.pread(fd, missing, offset)):
        parts.append(part)
        missing, offset = missing - len(part), offset + len(part)
    return b"".join(parts)
