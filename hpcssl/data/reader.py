"""The bytes of any sample in one ``pread``: no iteration, no extraction, no state to resume.

``pread`` and not ``mmap``: on a file system that others write, a mapped file that shrinks kills the process by
SIGBUS. Shards that ``data/stage.py`` copied to this node belong to nobody else, and may be mapped (``mapped=True``).
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcssl import rng
from hpcssl.data.decode import Damaged, Scratch, decode
from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError

log = logging.getLogger("hpcssl")
_TRIES = 16  # replacements tried for one sample; each is drawn from the whole set
_SHOWN = 8


@dataclass(frozen=True)
class Loss:
    """One damaged sample: its global index, its key, its shard's name, and what was wrong with it."""

    index: int
    key: str
    shard: str
    reason: str


class Reader:
    """Random access to a shard folder's samples, for any number of threads.

    ``limit``: how many different damaged samples a run bears; the next one raises ``DataError`` naming them.
    ``damaged``: those met so far, by index.
    """

    def __init__(self, shards: ShardSet, *, limit: int = 0, seed: int = 0, mapped: bool = False):
        self.shards, self.limit, self.seed, self.mapped = shards, limit, seed, mapped
        self.labels = shards.labels
        self.damaged: dict[int, Loss] = {}
        # columns of their own: taking a field of a row of the table costs as much as the read
        column = {name: np.ascontiguousarray(shards.rows[name]) for name in shards.rows.dtype.names}
        self._shard = column["shard"].item
        self._image = column["offset"].item, column["size"].item
        self._second = column["offset_b"].item, column["size_b"].item
        self._open: dict[int, int | mmap.mmap] = {}
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
        file = self._open.get(shard)
        if file is None:
            file = self._file(shard)
        if self.mapped:
            return file[offset:offset + size]
        data = os.pread(file, size, offset)
        if len(data) < size:  # a signal or a network file system may cut a read short; the end of the file may not
            data += _rest(file, size - len(data), offset + len(data))
        return data

    def _file(self, shard: int):
        with self._lock:
            if shard not in self._open:
                path = self.shards.path(shard)
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise DataError(f"shard {path}", got=error.strerror, expected="a file that can be read",
                                    mend="see `hpcssl-shard verify`; if too many files are open, raise `ulimit -n` "
                                         "above the number of shards") from error
                if self.mapped:
                    self._open[shard] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
                    os.close(fd)
                else:
                    self._open[shard] = fd
            return self._open[shard]

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
            if len(self.damaged) > self.limit:
                raise self._too_many(f"{len(self.damaged)} damaged")

    def _too_many(self, got: str) -> DataError:
        losses = [self.damaged[i] for i in sorted(self.damaged)]
        names = "; ".join(f"{x.key} (sample {x.index}, {x.shard}): {x.reason}" for x in losses[:_SHOWN])
        more = f"; and {len(losses) - _SHOWN} more" if len(losses) > _SHOWN else ""
        return DataError(f"samples of {self.shards.root}", got=f"{got}: {names}{more}",
                         expected=f"at most {self.limit} damaged samples",
                         mend="copy or write these shards again, or allow more with data.damaged_limit")

    def close(self) -> None:
        """Close every file. The reader opens them again when asked for more."""
        with self._lock:
            while self._open:
                _, file = self._open.popitem()
                file.close() if self.mapped else os.close(file)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _rest(fd: int, missing: int, offset: int) -> bytes:
    parts = []
    while missing > 0 and (part := os.pread(fd, missing, offset)):
        parts.append(part)
        missing, offset = missing - len(part), offset + len(part)
    return b"".join(parts)
