"""The contract between ``data_prep``, which writes shards, and everything that reads them.

A shard folder holds plain WebDataset tars, which any webdataset reader takes::

    shard-000000.tar   KEY.jpg | KEY.png | ...   the image, byte for byte as its source had it
                       KEY.cls                   the class number in ASCII (absent where there is no label)
                       KEY.json                  {"source": path in the source tree}
                       KEY.b.jpg | KEY.b.png     optional: a second modality of the same sample
    index.json         what the folder should hold: shards with bytes, samples and sha256; classes; totals
    index.npy          one record per sample: where its bytes lie (the ROW type below)
    targets.npy        optional, for images of several classes at once: int8 [samples, classes] (``ShardSet.targets``)

KEY.json then holds the sample's row of it too, as "targets". A sample's *global index* is its row in ``index.npy``:
stable for ever, since shards never change once written.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hpcssl.errors import DataError

FORMAT = 1
INDEX, ROWS, TARGETS = "index.json", "index.npy", "targets.npy"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_AGAIN = "write the shards again with the same command: finished shards are kept"
_NAME = re.compile(r"\w[\w.-]*\.tar", re.ASCII)

ROW = np.dtype(
    [
        ("shard", "<u4"),  # position in index.json's list of shards
        ("header", "<u8"),  # offset of the image member's first header block: its name stands there
        ("offset", "<u8"),  # offset of the image's first byte
        ("size", "<u4"),  # bytes of the image
        ("label", "<i4"),  # class number, -1 without a label
        ("offset_b", "<u8"),  # the second modality, 0 and 0 without one
        ("size_b", "<u4"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of the folder as the index describes it. ``DataError`` for a name that leads elsewhere, or to a shell."""

    name: str
    bytes: int
    samples: int
    sha256: str

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise DataError(f"the {INDEX} of a shard folder", got=f"a shard named {self.name!r}",
                            expected="plain names *.tar", mend="do not use this index: a name must not lead elsewhere")
        if not isinstance(self.bytes, int):
            raise TypeError(f"{self.bytes!r} bytes")


class ShardSet:
    """A shard folder, opened by its index. Holds no file handles; ``data/reader.py`` does."""

    def __init__(self, root: Path | str, meta: dict, rows: np.ndarray, targets: np.ndarray | None = None):
        self.root = root
        """Its folder; the address of a remote set of which only the index is here."""
        self.near: Callable[[], ShardSet] = lambda: self
        """The same set with its files on this machine: of a remote one, this fetches them (``data/cache.py``)."""
        self.meta = meta
        self.rows = rows
        self.targets = targets
        """Of a multi-label set: int8 [N, C], 1 present, -1 absent, 0 difficult or not known; None for other sets."""
        self.shards = [Shard(**shard) for shard in meta["shards"]]
        self.classes: list[str] = meta["classes"]

    @classmethod
    def open(cls, root: Path | str, *, check_sizes: bool = True) -> ShardSet:
        """Open a folder that ``hpcssl-shard`` wrote.

        ``check_sizes`` compares every tar's size with the index (one stat each), which finds missing and truncated
        shards before training; ``hpcssl-shard verify`` compares contents. Raises ``DataError``.
        """
        given, root = str(root), Path(root).absolute()
        what = f"shard folder {root}"
        if re.match(r"[a-z]\w+:/", given):
            raise DataError(what, got="an address", expected="a folder on this machine", mend="data.train and data.val "
                            "of a recipe may be addresses, with data.stage=FOLDER for the copy; options take folders")
        if not root.is_dir():
            raise DataError(what, got="no such folder", expected="a folder written by hpcssl-shard",
                            mend="check data.train and data.val, or write one with `hpcssl-shard images SRC OUT`")
        if not (root / INDEX).exists():
            inside = sorted(p.name for p in root.iterdir())[:3]
            train = "; OUT/train and OUT/val are the folders to name" if "train" in inside else ""
            raise DataError(what, got=f"no {INDEX} (it holds {', '.join(inside) or 'nothing'})",
                            expected="a folder written by hpcssl-shard",
                            mend=f"write one with `hpcssl-shard images SRC OUT`{train}")
        found = cls.described(what, root, _text(what, root / INDEX), lambda name, _: (root / name).read_bytes())
        if check_sizes:
            for shard in found.shards:
                path = root / shard.name
                size = path.stat().st_size if path.exists() else None
                if size != shard.bytes:
                    raise DataError(f"shard {path}", got="no such file" if size is None else f"{size} bytes",
                                    expected=f"{shard.bytes} bytes",
                                    mend="copy it again, or write the shards again with the same command")
        return found

    @classmethod
    def described(cls, what: str, root: Path | str, text: str, read: Callable[[str, str], bytes]) -> ShardSet:
        """The set that ``text``, an ``index.json``, describes; ``read(name, sha256)`` gives the files beside it.

        ``what`` names the set in errors. Raises ``DataError`` for an index that cannot be read or does not agree.
        """
        try:
            meta = json.loads(text)
            if meta.get("format") != FORMAT:
                raise DataError(what, got=f"index format {meta.get('format')}", expected=f"format {FORMAT}",
                                mend="write the shards again with this version's hpcssl-shard")
            bodies = {ROWS: (read(ROWS, meta["rows_sha256"]), meta["rows_sha256"])}
            if "targets_sha256" in meta:
                bodies[TARGETS] = read(TARGETS, meta["targets_sha256"]), meta["targets_sha256"]
            for name, (body, wanted) in bodies.items():
                if hashlib.sha256(body).hexdigest() != wanted:
                    raise DataError(what, got=f"{name} with another sha256 than {INDEX} records",
                                    expected=wanted[:12] + "…", mend=_AGAIN)
            arrays = [np.load(io.BytesIO(body), allow_pickle=False) for body, _ in bodies.values()]
            return cls(root, meta, *arrays)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(what, got=f"an index that cannot be read ({type(error).__name__}: {error})",
                            expected=f"{INDEX} and the .npy files beside it as hpcssl-shard wrote them",
                            mend=_AGAIN) from error

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """Class number of every sample, int64 [N]; -1 without a label."""
        return self.rows["label"].astype(np.int64)

    @property
    def has_second(self) -> bool:
        """Whether every sample carries a second modality (``KEY.b.*``)."""
        return len(self.rows) > 0 and bool((self.rows["size_b"] > 0).all())

    @property
    def made(self) -> dict:
        """By what ``hpcssl-shard`` chose these samples: verb, seed and the like; empty where the index has none."""
        return self.meta.get("plan", {}).get("made", {})

    @property
    def second(self) -> str:
        """What the second modality is, as reports must call it, such as ``edges (surrogate)``; '' where none said."""
        return self.made.get("second", "")

    @cached_property
    def digest(self) -> str:
        """sha256 of the set: the same for the same shards in the same order, wherever they lie."""
        return digest_of(self.meta)

    def path(self, shard: int) -> Path:
        return self.root / self.shards[shard].name

    def key(self, index: int) -> str:
        """The sample's name inside its shard, for messages; read from the tar header."""
        row = self.rows[index]
        try:
            with open(self.path(int(row["shard"])), "rb") as file:
                file.seek(int(row["header"]))
                with tarfile.open(fileobj=file, mode="r|") as tar:
                    name = tar.next().name
        except (OSError, tarfile.TarError, AttributeError):
            return f"sample {index}"
        folder, _, base = name.rpartition("/")
        return f"{folder}/{base.split('.')[0]}".lstrip("/")


def digest_of(meta: dict) -> str:
    """``ShardSet.digest`` of the set that ``meta``, the content of an ``index.json``, describes."""
    text = json.dumps([[shard["sha256"] for shard in meta["shards"]], meta["rows_sha256"], meta["classes"]])
    return hashlib.sha256(text.encode()).hexdigest()


def _text(what: str, path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise DataError(what, got=f"an {INDEX} that cannot be read ({type(error).__name__}: {error})",
                        expected="a text file that hpcssl-shard wrote", mend=_AGAIN) from error
