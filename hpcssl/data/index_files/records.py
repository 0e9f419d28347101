"""What an index says of each shard and of each sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from hpcssl.data.index_files.checks import INDEX
from hpcssl.errors import DataError

_NAME = re.compile(r"\w[\w.-]*\.tar", re.ASCII)

ROW = np.dtype(
    [
        ("shard", "<u4"),  # position in the list of shards
        ("header", "<u8"),  # offset of the image member's first header block, which holds its name
        ("offset", "<u8"),  # offset of the image's first byte
        ("size", "<u4"),  # bytes of the image
        ("label", "<i4"),  # class number, -1 without a label
        ("offset_b", "<u8"),  # the second modality, 0 and 0 without one
        ("size_b", "<u4"),
    ]
)
"""The record of one sample in ``index.npy``. Offsets and sizes are in bytes."""
PAGE_ROW = np.dtype([field for field in ROW.descr if field[0] != "shard"])
"""The record of one sample in a page, whose samples are all of one shard."""


def table_dtype(name_bytes: int) -> np.dtype[np.void]:
    """The record of one shard in ``shards.npy``, for file names of at most this many bytes."""
    digests = [("sha256", "u1", 32), ("page_sha256", "u1", 32)]  # of the tar, and of its page
    return np.dtype([("name", f"S{name_bytes}"), ("bytes", "<u8"), ("samples", "<u4"), *digests])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a shard folder, as the index describes it.

    Attributes:
        name: File name.
        bytes: Size of the file.
        samples: Number of samples.
        sha256: Digest of the file, in hexadecimal.

    Raises:
        DataError: If the name is not a plain file name, because it would lead out of the folder or into a shell.
    """

    name: str
    bytes: int
    samples: int
    sha256: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DataError(
                f"the {INDEX} of a shard folder",
                got=f"a shard named {self.name!r}",
                expected="plain names *.tar",
                fix="do not use this index, because this name leads out of the folder",
            )
        if not isinstance(self.bytes, int):
            raise TypeError(f"{self.bytes!r} bytes")

    @property
    def page(self) -> str:
        """File name of the shard's page, in a set whose index is paged."""
        return f"{self.name.removesuffix('.tar')}.npy"


class ShardTable(Sequence[Shard]):
    """The shards of a paged set, read from a mapped file as they are asked for.

    A list of a million ``Shard`` objects would take half a gigabyte in every process.

    Args:
        table: Content of ``shards.npy``, ``table_dtype`` [S].

    Raises:
        ValueError: If it has other columns.
    """

    def __init__(self, table: npt.NDArray[np.void]):
        if table.ndim != 1 or table.dtype != table_dtype(max(1, table.dtype[0].itemsize if table.dtype.names else 0)):
            raise ValueError(f"{table.dtype} in place of a table of shards")
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, number: int) -> Shard: ...

    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...

    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        record = self._table[number]
        return Shard(
            name=record["name"].decode("ascii", "replace"),
            bytes=int(record["bytes"]),
            samples=int(record["samples"]),
            sha256=record["sha256"].tobytes().hex(),
        )

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """``bytes`` or ``samples`` of every shard, int64 [S]."""
        return self._table[name].astype(np.int64)

    def page_sha256(self, number: int) -> str:
        """The sha256 of the page of shard ``number``, in hexadecimal."""
        digest: str = self._table["page_sha256"][number].tobytes().hex()
        return digest
