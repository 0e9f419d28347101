"""Where the bytes of each sample lie: looked up in one array, or in pages of one shard each.

An array has 40 bytes per sample, which is 40 GB for a billion samples. A page is read when a sample of its shard is
asked for, and only the pages that were read last are kept.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpcssl.data.index_files.records import PAGE_ROW, ROW, ShardTable
from hpcssl.errors import DataError
from hpcssl.storage.npy import array_of

KEPT_PAGES = 512
"""Pages that a process keeps: 18 MB with 1,000 samples per shard. Windows of so many shards are read from memory."""
_ATTEMPTS = 4  # to read a page of a cache, from which another process may have removed it again

Place = tuple[int, int, int]
"""Shard number, offset and number of bytes."""


class SampleRows(Protocol):
    """Looks up samples by their global index. Safe for any number of threads."""

    def shard(self, index: int, /) -> int:
        """The shard number of a sample."""
        ...

    def image(self, index: int, /) -> Place:
        """Where the image lies."""
        ...

    def second(self, index: int, /) -> Place:
        """Where the second modality lies; 0 bytes without one."""
        ...

    def label(self, index: int, /) -> int:
        """The class number, -1 without a label."""
        ...

    def header(self, index: int, /) -> tuple[int, int]:
        """Shard number, and the offset of the image member's first header block."""
        ...


class ArrayRows:
    """Looks up samples in ``index.npy``.

    Args:
        rows: Its content, ``ROW`` [N].
    """

    def __init__(self, rows: npt.NDArray[np.void]):
        # views of one column each: taking a field of a record costs as much as the read
        columns: dict[str, npt.NDArray[Any]] = {name: rows[name] for name in rows.dtype.names or ()}
        self.shard: Callable[[int], int] = columns["shard"].item
        self.label: Callable[[int], int] = columns["label"].item
        self._header, self._offset, self._size = (columns[name].item for name in ("header", "offset", "size"))
        self._second_offset, self._second_size = columns["offset_b"].item, columns["size_b"].item

    def image(self, index: int) -> Place:
        """See ``SampleRows``."""
        return self.shard(index), self._offset(index), self._size(index)

    def second(self, index: int) -> Place:
        """See ``SampleRows``."""
        return self.shard(index), self._second_offset(index), self._second_size(index)

    def header(self, index: int) -> tuple[int, int]:
        """See ``SampleRows``."""
        return self.shard(index), self._header(index)


class PagedRows:
    """Looks up samples in pages.

    Args:
        shards: The shards.
        locate: Gives the path of the page of shard n, for pages that come and go (``data/cache.py``).

    Attributes:
        locate: The argument; a cache sets its own.
    """

    def __init__(self, shards: ShardTable, locate: Callable[[int], Path]):
        self.locate = locate
        self._shards = shards
        self._counts = shards.column("samples")
        self._ends = np.cumsum(self._counts)
        self._pages: dict[int, npt.NDArray[np.void]] = {}
        self._lock = threading.Lock()

    def shard(self, index: int) -> int:
        """See ``SampleRows``. Reads no page."""
        if not 0 <= index < int(self._ends[-1]):
            raise IndexError(index)
        return int(np.searchsorted(self._ends, index, side="right"))

    def image(self, index: int) -> Place:
        """See ``SampleRows``."""
        shard, row = self._find(index)
        return shard, int(row["offset"]), int(row["size"])

    def second(self, index: int) -> Place:
        """See ``SampleRows``."""
        shard, row = self._find(index)
        return shard, int(row["offset_b"]), int(row["size_b"])

    def label(self, index: int) -> int:
        """See ``SampleRows``."""
        return int(self._find(index)[1]["label"])

    def header(self, index: int) -> tuple[int, int]:
        """See ``SampleRows``."""
        shard, row = self._find(index)
        return shard, int(row["header"])

    def read_all(self) -> npt.NDArray[np.void]:
        """The content of all pages as ``index.npy`` would have it, ``ROW`` [N]. It needs memory for every sample."""
        rows = np.zeros(int(self._counts.sum()), ROW)
        for number, (count, end) in enumerate(zip(self._counts.tolist(), self._ends.tolist(), strict=True)):
            part = rows[end - count : end]
            page = self._read(number)
            for name in page.dtype.names or ():
                part[name] = page[name]
            part["shard"] = number
        return rows

    def _find(self, index: int) -> tuple[int, np.void]:
        shard = self.shard(index)
        page = self._pages.get(shard)
        if page is None:
            page = self._read(shard)
            with self._lock:
                while len(self._pages) >= KEPT_PAGES:
                    del self._pages[next(iter(self._pages))]
                self._pages[shard] = page
        row: np.void = page[index - int(self._ends[shard])]  # counted from the end
        return shard, row

    def _read(self, number: int) -> npt.NDArray[np.void]:
        shard, expected = self._shards[number], self._shards.page_sha256(number)
        for attempt in range(_ATTEMPTS):
            path = self.locate(number)
            try:
                body = path.read_bytes()
                break
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or attempt == _ATTEMPTS - 1:
                    raise DataError(
                        f"page {path}",
                        got=error.strerror or str(error),
                        expected="the page of the index that describes a shard",
                        fix="copy it beside its shard. Commands that need every sample, or the labels of all, read a "
                        "paged set in a folder on this machine only",
                    ) from error
        digest = hashlib.sha256(body).hexdigest()
        if digest != expected:
            raise DataError(
                f"page {path}",
                got=f"sha256 {digest[:12]}…",
                expected=f"{expected[:12]}… as recorded in the table of shards",
                fix="copy it again; in a data.stage_dir, remove it, and it is downloaded again",
            )
        page = array_of(body)
        if page.dtype != PAGE_ROW or page.shape != (shard.samples,):
            raise DataError(
                f"page {path}",
                got=f"{page.shape} {page.dtype}",
                expected=f"{shard.samples} samples",
                fix="write the shards again, and their pages with this version of `hpcssl-shard page-index`",
            )
        return page
