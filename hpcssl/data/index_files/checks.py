"""Reads the index files of a shard folder, and says what is wrong with them."""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt

from hpcssl.errors import DataError
from hpcssl.files import sha256_of_file
from hpcssl.storage.npy import array_of, mapped_array

INDEX = "index.json"
"""Name of the file that describes a shard folder."""
REWRITE = "write the shards again with the same command; finished shards are kept"
"""How to repair an index."""


def check_is_shard_folder(what: str, name: str, root: Path) -> None:
    """Check that there is an index. ``name`` is what the user wrote. Raises ``DataError``."""
    if re.match(r"[a-z]\w+:/", name):
        raise DataError(
            what,
            got="an address",
            expected="a folder on this machine",
            fix="name a folder here; trainings and evaluations also take addresses",
        )
    if not root.is_dir():
        raise DataError(
            what,
            got="no such folder",
            expected="a folder written by hpcssl-shard",
            fix="check data.train and data.val, or write one with `hpcssl-shard images SRC OUT`",
        )
    if not (root / INDEX).exists():
        inside = sorted(path.name for path in root.iterdir())[:3]
        hint = ", and name OUT/train or OUT/val" if "train" in inside else ""
        raise DataError(
            what,
            got=f"no {INDEX} (it holds {', '.join(inside) or 'nothing'})",
            expected="a folder written by hpcssl-shard",
            fix=f"write one with `hpcssl-shard images SRC OUT`{hint}",
        )


def load_array(what: str, name: str, content: bytes | mmap.mmap | Path, sha256: str) -> npt.NDArray[Any]:
    """The array of an index file, read-only. Raises ``DataError`` if the file has another sha256."""
    digest = sha256_of_file(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise DataError(
            what,
            got=f"{name} with another sha256 than {INDEX} records",
            expected=sha256[:12] + "…",
            fix=REWRITE,
        )
    if isinstance(content, Path):
        return mapped_array(content)
    return array_of(content)


def read_index(what: str, path: Path) -> str:
    """The text of ``index.json``. Raises ``DataError``."""
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise unreadable_error(what, error) from error


def unreadable_error(what: str, error: Exception) -> DataError:
    """Make the error for an index that cannot be read because of ``error``."""
    return DataError(
        what,
        got=f"an unreadable index ({type(error).__name__}: {error})",
        expected=f"{INDEX} and the .npy files beside it as hpcssl-shard wrote them",
        fix=REWRITE,
    )
