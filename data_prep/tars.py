"""Reading shards back: their rows, their sums, and each sample's members by name."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep import ustar
from data_prep.writer import Written, sample_sums
from hpcssl.data.shards import ROW


class Member(NamedTuple):
    header: int  # offset of the first header block
    offset: int
    size: int


def split(name: str) -> tuple[str, str]:
    """KEY and suffix of a member's name, as webdataset splits them: at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def walk(file, start: int = 0) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, members by suffix) of every sample of a tar. ``start`` is added to all offsets."""
    key, members = None, {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []
            this, suffix = split(info.name)
            if this != key:
                if members:
                    yield key, members
                key, members = this, {}
            members[suffix] = Member(start + info.offset, start + info.offset_data, info.size)
    if members:
        yield key, members


def row_of(shard: int, members: dict[str, Member], label: int) -> tuple:
    """The index row of a sample's members, as ROW."""
    image = next(m for s, m in members.items() if s in ("jpg", "png"))
    second = next((m for s, m in members.items() if s in ("b.jpg", "b.png")), Member(0, 0, 0))
    return shard, image.header, image.offset, image.size, label, second.offset, second.size


def extents(rows: np.ndarray, size: int) -> np.ndarray:
    """First byte of every sample of a shard of ``size`` bytes, and the end of the last one: int64 [n + 1]."""
    return np.append(rows["header"].astype(np.int64), size - len(ustar.END))


def survey(path: Path, number: int) -> Written:
    """What ``writer.write_shard`` returned when it wrote this file, found again by reading it."""
    whole, rows, sums = hashlib.sha256(), [], []
    with open(path, "rb") as file:
        for _, members in walk(file):
            label = -1
            if "cls" in members:
                file.seek(members["cls"].offset)
                label = int(file.read(members["cls"].size))
            rows.append(row_of(number, members, label))
        found = np.array(rows, ROW)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        for n in np.diff(extents(found, size)):
            data = file.read(int(n))
            whole.update(data)
            sums.append(sample_sums(memoryview(data), [0]))
        whole.update(file.read())
    return Written(size, whole.hexdigest(), found, np.concatenate(sums) if sums else np.zeros(0, "<u8"))


def note(data: bytes) -> dict:
    """The content of KEY.json; empty when it is not a JSON object."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
