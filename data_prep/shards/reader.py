"""Read shards back: their index rows, their checksums, and the members of each sample."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.shards import ustar
from data_prep.shards.writer import WrittenShard, sample_sums
from hpcssl.data.shards import ROW


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        header: Offset of its first header block.
        offset: Offset of its content.
        size: Bytes of its content.
    """

    header: int
    offset: int
    size: int


def split_member_name(name: str) -> tuple[str, str]:
    """Split the name of a member into KEY and suffix as webdataset does: at the first dot of the last path part."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def iterate_samples(file: IO[bytes], start: int = 0) -> Iterator[tuple[str, dict[str, Member]]]:
    """Iterate over the samples of a tar.

    Args:
        file: The tar.
        start: Added to all offsets.

    Yields:
        (KEY, members by suffix) of every sample.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # missing in typeshed; tarfile keeps every header it has read
            this, suffix = split_member_name(info.name)
            if this != key:
                if members and key is not None:
                    yield key, members
                key, members = this, {}
            members[suffix] = Member(start + info.offset, start + info.offset_data, info.size)
    if members and key is not None:
        yield key, members


def index_row(shard: int, members: dict[str, Member], label: int) -> tuple[int, int, int, int, int, int, int]:
    """Return the index row of a sample, with the fields of ``ROW``."""
    image = next(m for s, m in members.items() if s not in ("cls", "json") and not s.startswith("b."))
    second = next((m for s, m in members.items() if s.startswith("b.")), Member(0, 0, 0))
    return shard, image.header, image.offset, image.size, label, second.offset, second.size


def sample_extents(rows: npt.NDArray[Any], size: int) -> npt.NDArray[np.int64]:
    """Return the first byte of every sample of a shard of ``size`` bytes, and the end of the last: int64 [n + 1]."""
    return np.append(rows["header"].astype(np.int64), size - len(ustar.END))


def survey_shard(path: Path, number: int) -> WrittenShard:
    """Read a shard and return what ``writer.write_shard`` returned when it wrote the file.

    Args:
        path: The shard.
        number: Its number, for the index rows.
    """
    digest, rows, sums = hashlib.sha256(), [], []
    with open(path, "rb") as file:
        for _, members in iterate_samples(file):
            label = -1
            if "cls" in members:
                file.seek(members["cls"].offset)
                label = int(file.read(members["cls"].size))
            rows.append(index_row(number, members, label))
        index = np.array(rows, ROW)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        for n in np.diff(sample_extents(index, size)):
            data = file.read(int(n))
            digest.update(data)
            sums.append(sample_sums(memoryview(data), [0]))
        digest.update(file.read())
    return WrittenShard(size, digest.hexdigest(), index, np.concatenate(sums) if sums else np.zeros(0, "<u8"))


def parse_sample_json(data: bytes) -> dict[str, Any]:
    """Return the content of KEY.json; empty when it is not a JSON object."""
    try:
        fields = json.loads(data)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
