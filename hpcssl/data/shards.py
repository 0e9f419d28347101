"""The shard folder format: written by ``data_prep``, read by everything else.

A shard folder holds plain WebDataset tars, which any webdataset reader accepts::

    shard-000000.tar   KEY.jpg | KEY.png | ...   the image, byte for byte as in its source
                       KEY.cls                   the class number in ASCII (absent without a label)
                       KEY.json                  {"source": path in the source tree}
                       KEY.b.jpg | KEY.b.png     optional: a second modality of the same sample
    index.json         the shards with bytes, samples and sha256; the classes; totals
    index.npy          one record per sample: where its bytes lie (see ROW)
    targets.npy        optional, for images of several classes at once: int8 [samples, classes] (``ShardSet.targets``)

The index of a very large set is paged (``hpcssl-shard page-index``), so that nothing has an entry per sample::

    index.json         the classes; totals
    shards.npy         one record per shard: name, bytes, samples, sha256, and the sha256 of its page
    shard-000000.npy   the page of a shard: the records of its samples, without the shard number (see PAGE_ROW)

With targets, KEY.json also holds the sample's row of them, as "targets". A sample's *global index* is its row in
``index.npy``. It is stable, because shards never change once they are written.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcssl.data.index_files.checks import INDEX as INDEX  # a name of this module, for others to import
from hpcssl.data.index_files.checks import check_is_shard_folder, load_array, read_index, unreadable_error
from hpcssl.data.index_files.records import PAGE_ROW as PAGE_ROW
from hpcssl.data.index_files.records import ROW as ROW
from hpcssl.data.index_files.records import Shard as Shard
from hpcssl.data.index_files.records import ShardTable
from hpcssl.data.index_files.records import table_dtype as table_dtype
from hpcssl.data.index_files.sample_rows import ArrayRows, PagedRows, SampleRows
from hpcssl.errors import DataError

ReadIndexFile = Callable[[str, str], "bytes | mmap.mmap | Path"]
"""Gets an index file by its name and sha256."""
FORMAT, PAGED_FORMAT = 1, 2
"""Version of the format in ``index.json``, and that of a paged index."""
ROWS, TARGETS, TABLE = "index.npy", "targets.npy", "shards.npy"
"""Names of the index files beside ``INDEX``; the last one is that of a paged index."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
"""File suffixes that count as images."""
_ROWS_AT_A_TIME = 2**20
_HEADER_BYTES = 2**16  # of a .npy file, at most
_MAX_NAME_BYTES = 255  # of a file name in a table of shards


class ShardSet:
    """A shard folder, opened by its index. It holds no open files (``data/reader.py`` does).

    Args:
        root: The folder, or the address of a remote set of which only the index is here.
        meta: Content of ``index.json``.
        rows: Content of ``index.npy``, ``ROW`` [N]; None for a paged set.
        targets: Content of ``targets.npy`` of a multi-label set.
        table: The shards of a paged set.

    Attributes:
        samples: Looks up samples by their index. A paged set reads the pages that it needs.
        pages: The same for a paged set, None for others. A cache of a remote set tells it where pages are.
        targets: int8 [N, C] of a multi-label set: 1 present, -1 absent, 0 difficult or unknown. None for other sets.
        shards: The shards, in the order of the index.
        classes: Names of the classes; a label is a position in this list.
        to_local: Gives the same set with its files on this machine. For a remote set, it downloads them.
    """

    def __init__(
        self,
        root: Path | str,
        meta: dict[str, Any],
        rows: npt.NDArray[np.void] | None,
        targets: npt.NDArray[np.int8] | None = None,
        *,
        table: ShardTable | None = None,
    ):
        self.root = root
        self.to_local: Callable[[], ShardSet] = lambda: self
        self.meta = meta
        self.targets, self.table = targets, table
        self.shards: Sequence[Shard] = [Shard(**shard) for shard in meta["shards"]] if table is None else table
        self.pages: PagedRows | None = None
        self.samples: SampleRows
        if rows is not None:
            self.rows, self._count = rows, len(rows)
            self.samples = ArrayRows(rows)
        else:
            assert table is not None
            self._count = int(meta["samples"])
            self.samples = self.pages = PagedRows(table, lambda number: self.path(number).with_name(table[number].page))
        self.classes: list[str] = meta["classes"]

    @classmethod
    def open(
        cls,
        root: Path | str,
        *,
        check_sizes: bool = True,
        part: tuple[int, int] = (0, 1),
        mapped: bool = False,
        keep: Callable[[str, bytes], bytes | mmap.mmap] = lambda _, content: content,
    ) -> ShardSet:
        """Open a folder that ``hpcssl-shard`` wrote.

        Args:
            root: The folder.
            check_sizes: Whether to compare every tar's size with the index (one stat each). This finds missing and
                truncated shards before training; ``hpcssl-shard verify`` compares contents.
            part: Number of this process and of processes that share this work; each compares some of the tars.
            mapped: Whether to map the index into memory; only for files that nobody else writes to.
            keep: Called with the name and content of each index file that is read; returns where to keep the content.

        Raises:
            DataError: If there is no shard folder, its index cannot be read, or a shard is missing or truncated.
        """
        name, root, what = str(root), Path(root).absolute(), f"shard folder {Path(root).absolute()}"
        check_is_shard_folder(what, name, root)
        text = read_index(what, root / INDEX)
        keep(INDEX, text.encode())
        shards = cls.from_index(
            what, root, text, lambda name, _: root / name if mapped else keep(name, (root / name).read_bytes())
        )
        if check_sizes:
            for number in range(part[0], len(shards.shards), part[1]):
                shard = shards.shards[number]
                _check_size(root / shard.name, shard)
        return shards

    @classmethod
    def from_index(cls, what: str, root: Path | str, text: str, read: ReadIndexFile) -> ShardSet:
        """Build the set that an index describes.

        Args:
            what: Name of the set in errors.
            root: Folder or address of the set.
            text: Content of ``index.json``.
            read: Called as ``read(name, sha256)`` to get the other index files: the content, or the path of a file that
                nobody else writes to, which is mapped into memory and shared by the processes of a node.

        Raises:
            DataError: If the index cannot be read, has another format, or its files do not agree with each other.
        """
        try:
            meta = json.loads(text)
            if meta.get("format") == PAGED_FORMAT:
                table = ShardTable(load_array(what, TABLE, read(TABLE, meta["table_sha256"]), meta["table_sha256"]))
                totals = meta["samples"], meta["shard_count"]
                if totals != (int(table.column("samples").sum()), len(table)):
                    raise ValueError(f"other numbers of samples and shards than {TABLE}")
                if not all(isinstance(meta[name], int) for name in ("labeled", "with_second")):
                    raise ValueError("no numbers of samples with a label and with a second modality")
                return cls(root, meta, None, table=table)
            if meta.get("format") != FORMAT:
                raise DataError(
                    what,
                    got=f"index format {meta.get('format')}",
                    expected=f"format {FORMAT} or {PAGED_FORMAT}",
                    fix="write the shards again with this version of hpcssl-shard",
                )
            digests = {ROWS: meta["rows_sha256"]}
            if "targets_sha256" in meta:
                digests[TARGETS] = meta["targets_sha256"]
            arrays = [load_array(what, name, read(name, sha256), sha256) for name, sha256 in digests.items()]
            shards = cls(root, meta, *arrays)
            counts = np.zeros(len(shards.shards), np.int64)
            for start in range(0, len(shards.rows), _ROWS_AT_A_TIME):
                numbers = shards.rows["shard"][start : start + _ROWS_AT_A_TIME]
                counts += np.bincount(numbers, minlength=len(counts))
            if counts.tolist() != shards.samples_per_shard.tolist():  # the order of the training depends on them
                raise ValueError(f"other numbers of samples per shard than {ROWS}")
            return shards
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable_error(what, error) from error

    def __len__(self) -> int:
        return self._count

    @cached_property
    def rows(self) -> npt.NDArray[np.void]:
        """The record of every sample, ``ROW`` [N]. For a paged set, every page is read, once."""
        assert self.pages is not None  # other sets were given their rows
        return self.pages.read_all()

    @property
    def samples_per_shard(self) -> npt.NDArray[np.int64]:
        """Number of samples of each shard, int64 [S]."""
        return self._column("samples")

    @property
    def bytes_per_shard(self) -> npt.NDArray[np.int64]:
        """Size of each shard's file, int64 [S]."""
        return self._column("bytes")

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        if self.table is not None:
            return self.table.column(name)
        return np.array([getattr(shard, name) for shard in self.shards], np.int64)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class number of every sample, int64 [N]; -1 without a label. Labels of a paged set are read from its pages.

        A paged set without labels needs no memory for them.
        """
        if self.pages is not None and not self.meta["labeled"]:
            return np.broadcast_to(np.int64(-1), len(self))
        return self.rows["label"].astype(np.int64)

    @property
    def has_second(self) -> bool:
        """Whether every sample has a second modality (``KEY.b.*``)."""
        if self.pages is not None:
            return len(self) > 0 and bool(self.meta["with_second"] == len(self))
        return len(self.rows) > 0 and bool((self.rows["size_b"] > 0).all())

    @property
    def provenance(self) -> dict[str, Any]:
        """How ``hpcssl-shard`` chose these samples (verb, seed, …); empty where the index does not record it."""
        return dict(self.meta.get("plan", {}).get("made", {}))

    @property
    def second_name(self) -> str:
        """Name of the second modality for reports, such as ``edges (surrogate)``; empty where none is recorded."""
        return str(self.provenance.get("second", ""))

    @cached_property
    def digest(self) -> str:
        """The sha256 of the set. Equal for the same shards in the same order, wherever they lie."""
        return index_digest(self.meta)

    def path(self, shard: int) -> Path:
        """Path of shard number ``shard``."""
        return Path(self.root) / self.shards[shard].name

    def key(self, index: int) -> str:
        """The sample's name in the tar header, for messages; ``sample INDEX`` where the shard cannot be read."""
        return self.find_key(index) or f"sample {index}"

    def find_key(self, index: int) -> str | None:
        """The sample's name in the tar header; None where the shard cannot be read."""
        shard, header = self.samples.header(index)
        with suppress(OSError, tarfile.TarError), open(self.path(shard), "rb") as file:
            file.seek(header)
            with tarfile.open(fileobj=file, mode="r|") as tar:
                if member := tar.next():
                    folder, _, base = member.name.rpartition("/")
                    return f"{folder}/{base.split('.')[0]}".lstrip("/")
        return None


def max_index_bytes(meta: dict[str, Any], name: str) -> int:
    """An upper bound of the bytes of an index file, from the content of ``index.json``."""
    if name == TABLE:
        return _HEADER_BYTES + int(meta["shard_count"]) * table_dtype(_MAX_NAME_BYTES).itemsize
    samples = sum(int(shard["samples"]) for shard in meta["shards"])
    return _HEADER_BYTES + samples * (ROW.itemsize if name == ROWS else len(meta["classes"]))


def max_page_bytes(shard: Shard) -> int:
    """An upper bound of the bytes of a shard's page."""
    return _HEADER_BYTES + shard.samples * PAGE_ROW.itemsize


def index_digest(meta: dict[str, Any]) -> str:
    """``ShardSet.digest`` of the set that ``meta``, the content of an ``index.json``, describes."""
    if meta.get("format") == PAGED_FORMAT:
        return hashlib.sha256(json.dumps([meta["table_sha256"], meta["classes"]]).encode()).hexdigest()
    text = json.dumps([[shard["sha256"] for shard in meta["shards"]], meta["rows_sha256"], meta["classes"]])
    return hashlib.sha256(text.encode()).hexdigest()


def _check_size(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
        got = f"{size} bytes"
    except OSError as error:
        size, got = None, "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
    if size != shard.bytes:
        raise DataError(
            f"shard {path}",
            got=got,
            expected=f"{shard.bytes} bytes",
            fix="copy it again, or write the shards again with the same command",
        )
