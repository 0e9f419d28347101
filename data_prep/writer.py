"""One shard: source bytes read straight into a buffer that already has the shape of a tar.

A buffer receives header, image, padding, header, label, ... in their final places and is written in one call, so an
image is copied once on its way from file to file. Where everything lies is known before it is written: the index
costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep import images, second, ustar
from data_prep.catalogue import WHOLE, Sample, key_of
from hpcssl import files
from hpcssl.data.decode import Damaged
from hpcssl.data.shards import ROW
from hpcssl.errors import DataError, HpcsslError

BUFFER = 1 << 20  # stays in a core's second-level cache between read, sums and write; grows for a larger image
_encode = json.JSONEncoder(sort_keys=True).encode  # json.dumps would build a new encoder for every sample
ROOM = "free room, or choose another OUT, then run the same command again: finished shards are kept"
LARGEST = 0xFFFFFFFF  # the index holds sizes in 32 bits


class Chunk(NamedTuple):
    """A stretch of whole samples. ``data`` is valid until the next chunk is asked for."""

    data: memoryview
    rows: list[tuple]  # as ROW, without the shard's number: header, offset, size, label, offset_b, size_b
    starts: list[int]  # where each sample begins in ``data``


class Bad(NamedTuple):
    source: str
    reason: str


@dataclass
class Written:
    """A shard as it now lies on the disk. ``sums`` tell which sample a damaged byte belongs to."""

    bytes: int
    sha256: str
    rows: np.ndarray
    sums: np.ndarray
    bad: list[Bad] = field(default_factory=list)


class Reader:
    """Reads samples into given memory. Archives stay open, up to 64 of them; files of their own do not."""

    def __init__(self):
        self._open: dict[str, int] = {}

    def image(self, view: memoryview, sample: Sample) -> None:
        """Fill ``view``, of ``sample.size`` bytes, with the sample's image. Raises OSError, DataError."""
        if sample.offset == WHOLE:
            self.fill_whole(view, f"{sample.path}/{sample.source}")
        else:
            self.fill(view, sample.path, sample.offset)

    def fill(self, view: memoryview, path: str, offset: int) -> None:
        """Fill ``view`` from ``path`` at ``offset``. Raises OSError, and DataError when bytes are missing."""
        fd = self._open.get(path)
        if fd is None:
            if len(self._open) >= 64:
                os.close(self._open.pop(next(iter(self._open))))
            fd = self._open[path] = os.open(path, os.O_RDONLY)
        _fill(fd, view, offset, path)

    def fill_whole(self, view: memoryview, path: str) -> None:
        """Fill ``view`` with the whole file, which must still be as large as ``view``."""
        fd = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != len(view):
                raise _changed(path)
            _fill(fd, view, 0, path)
        finally:
            os.close(fd)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _fill(fd: int, view: memoryview, offset: int, path: str) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            raise _changed(path)
        done += got


def _changed(path: str) -> DataError:
    return DataError(f"source {path}", got="another size than when the source was listed",
                     expected="a source that nobody writes while it is read",
                     mend="wait until it is complete, then run the same command again")


def pack(samples: list[Sample], bad: list[Bad], check: Callable = images.damage) -> Iterator[Chunk]:
    """Lay the samples out as tar members, chunk by chunk. Those that ``check`` refuses go to ``bad`` instead."""
    reader = Reader()
    buffer = memoryview(bytearray(BUFFER))
    base = at = 0  # bytes of the shard before this buffer, and bytes used in it
    rows: list[tuple] = []
    starts: list[int] = []
    try:
        for sample in samples:
            if sample.second == second.EDGES and (sample := _with_edges(sample, reader, bad)) is None:
                continue
            key, tail = key_of(sample.source), _tail(sample)
            need = _room(key, sample, tail)
            if at and at + need > len(buffer):
                yield Chunk(buffer[:at], rows, starts)
                base, at, rows, starts = base + at, 0, [], []
            if need > len(buffer):
                buffer = memoryview(bytearray(need))
            row, end = _place(buffer, at, base, key, sample, tail, reader, check, bad)
            if row is not None:
                rows.append(row)
                starts.append(at)
                at = end
        buffer[at : at + len(ustar.END)] = ustar.END
        yield Chunk(buffer[: at + len(ustar.END)], rows, starts)
    finally:
        reader.close()


def _with_edges(sample: Sample, reader: Reader, bad: list[Bad]) -> Sample | None:
    """The sample with its edges as bytes: how many they are must be known before it is placed. None goes to ``bad``."""
    image = bytearray(sample.size)
    try:
        reader.image(memoryview(image), sample)
        return sample._replace(second=second.edges(bytes(image)))
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except Damaged as error:
        reason = images.damage(image) or str(error)
    bad.append(Bad(sample.source, reason))
    return None


def _tail(sample: Sample) -> list[tuple[str, bytes]]:
    """The small members after the images: label and origin."""
    note = {"source": sample.source} | json.loads(sample.more or "{}")
    if sample.original_label is not None:
        note["original_label"] = sample.original_label
    label = [("cls", b"%d" % sample.label)] if sample.label >= 0 else []
    return [*label, ("json", _encode(note).encode())]


def _room(key: str, sample: Sample, tail: list[tuple[str, bytes]]) -> int:
    """Upper bound of the bytes that a sample takes, the end mark of the shard included."""
    head = ustar.header_size(f"{key}.json.")  # longer than any of its members' names
    sizes = [sample.size, _size_b(sample), *(len(body) for _, body in tail)]
    return sum(head + ustar.padded(size) for size in sizes) + len(ustar.END)


def _size_b(sample: Sample) -> int:
    return len(sample.second) if isinstance(sample.second, bytes) else sample.second[1] if sample.second else 0


def _place(buffer, at, base, key, sample, tail, reader, check, bad) -> tuple[tuple | None, int]:
    """Write one sample at ``at``; its row and its end, or None for a damaged one, whose bytes the next overwrites."""
    start = at
    at += ustar.header_size(f"{key}.jpg")
    spots = []
    try:
        for extra, size in (("", sample.size), (".b", _size_b(sample))):
            if extra and sample.second is None:
                spots.append((0, 0))
                continue
            if extra:
                at += ustar.header_size(f"{key}.b.jpg")
            view = buffer[at : at + min(size, LARGEST)]
            if not extra:
                reader.image(view, sample)
            elif isinstance(sample.second, bytes):
                view[:] = sample.second
            else:
                reader.fill(view, sample.path, sample.second[0])
            reason = check(view) if size <= LARGEST else "larger than 4 GiB"
            if reason:
                bad.append(Bad(sample.source, reason))
                return None, start
            head = ustar.header(f"{key}{extra}.{images.suffix(view) or 'jpg'}", size)
            buffer[at - len(head) : at] = head
            spots.append((base + at, size))
            at = _pad(buffer, at + size)
    except OSError as error:
        bad.append(Bad(sample.source, f"cannot be read ({error.strerror})"))
        return None, start
    for name, body in tail:
        head = ustar.header(f"{key}.{name}", len(body))
        buffer[at : at + len(head)] = head
        at += len(head)
        buffer[at : at + len(body)] = body
        at = _pad(buffer, at + len(body))
    return (base + start, *spots[0], sample.label, *spots[1]), at


def _pad(buffer: memoryview, at: int) -> int:
    end = ustar.padded(at)
    buffer[at:end] = bytes(end - at)
    return end


def sample_sums(data: memoryview, starts: list[int]) -> np.ndarray:
    """Sum of the 64-bit words of each sample, uint64 [len(starts)]: which sample holds a damaged byte.

    Any single changed word changes it, and it runs at the memory's speed. That something is damaged at all is what
    the shard's sha256 says. ``starts`` are multiples of 512, and the last sample ends with ``data``.
    """
    if not starts:
        return np.zeros(0, "<u8")
    return np.add.reduceat(np.frombuffer(data, "<u8"), np.asarray(starts) // 8)


def write_shard(path: Path, number: int, samples: list[Sample]) -> Written:
    """Write one shard, whole or not at all. Raises DataError where the disk refuses."""
    bad: list[Bad] = []
    rows, sums, total, whole = [], [], 0, hashlib.sha256()
    try:
        with files.atomic_file(path) as file:
            for chunk in pack(samples, bad):
                file.write(chunk.data)
                whole.update(chunk.data)
                total += len(chunk.data)
                rows += [(number, *row) for row in chunk.rows]
                sums.append(sample_sums(chunk.data, chunk.starts))
    except OSError as error:
        raise write_error(path, error) from error
    return Written(total, whole.hexdigest(), np.array(rows, ROW), np.concatenate(sums), bad)


def write_error(path: Path, error: OSError) -> HpcsslError:
    """One sentence for a file that cannot be written."""
    return DataError(f"writing {path}", got=error.strerror or str(error), expected="room and the right to write there",
                     mend=ROOM)
