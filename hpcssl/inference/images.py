"""Images by number, with names: those of a folder in any layout, of a shard folder, or of a list of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hpcssl.data.decode import DamagedImageError
from hpcssl.data.image_files.scan import ImageFile, list_images
from hpcssl.data.reader import Reader
from hpcssl.data.shards import INDEX, ShardSet
from hpcssl.errors import DataError

LabelRows = npt.NDArray[np.int64]
"""Class number of each image; -1 without a label."""


class ImageSource(Protocol):
    """A fixed sequence of images.

    Attributes:
        root: The folder, for messages and for the record; empty for a list of files.
        digest: sha256 that changes with the images or their order.
        labels: Class number of each image, -1 without one; None if no image has a label.
        classes: Names of the classes.
        left_out: Files beside the images, with the reason why each is none.
    """

    root: str
    digest: str
    labels: LabelRows | None
    classes: list[str]
    left_out: list[tuple[str, str]]

    def __len__(self) -> int:
        """The number of images."""

    def key(self, index: int) -> str:
        """Name of image ``index``: valid Unicode, and the same whenever the source is opened.

        Raises ``DataError`` where it cannot be read.
        """

    def find(self, key: str, index: int) -> int | None:
        """Number of the image of a name, which was ``index`` when it was embedded; None if it is not there."""

    def read(self, index: int) -> bytes:
        """The encoded image. Raises ``DamagedImageError`` for a file that cannot be read."""


class FileImages:
    """Image files, one per image.

    Args:
        root: The folder that the names begin in; empty for the current one.
        files: The files, in order.
        left_out: Other files of the folder, with reasons.
    """

    def __init__(self, root: str, files: Sequence[ImageFile], left_out: Sequence[tuple[str, str]] = ()) -> None:
        self.root = root
        self.labels: LabelRows | None = None
        self.classes: list[str] = []
        self.left_out = [(_printable(name), reason) for name, reason in left_out]
        self._names = [file.name for file in files]
        self.digest = hashlib.sha256(json.dumps([list(file) for file in files]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The path below the folder; bytes that are no UTF-8 are escaped."""
        return _printable(self._names[index])

    def find(self, key: str, index: int) -> int | None:
        """The number of the name, wherever it is now: files may have been added, or left out of a list."""
        return self._numbers.get(key)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {_printable(name): number for number, name in enumerate(self._names)}

    def read(self, index: int) -> bytes:
        """The content of the file. Raises ``DamagedImageError`` where it cannot be read."""
        try:
            return Path(self.root, self._names[index]).read_bytes()
        except OSError as error:
            raise DamagedImageError(f"cannot be read ({error.strerror})") from error


class ShardImages:
    """The samples of a shard folder."""

    def __init__(self, shards: ShardSet) -> None:
        self.root, self.digest, self.classes = str(shards.root), shards.digest, shards.classes
        single = shards.targets is None and bool((shards.labels >= 0).any())
        self.labels: LabelRows | None = shards.labels if single else None
        self.left_out: list[tuple[str, str]] = []
        self._shards, self._reader = shards, Reader(shards, limit=None)

    def __len__(self) -> int:
        return len(self._shards)

    def key(self, index: int) -> str:
        """The sample's name in its shard. Raises ``DataError`` where the shard cannot be read."""
        name = self._shards.find_key(index)
        if name is None:
            raise DataError(
                f"shards {self.root}",
                got=f"no name of sample {index} in its shard",
                expected="shards as their index describes them",
                fix="copy the shards again; `hpcssl-shard verify` finds the damaged ones",
            )
        return _printable(name)

    def find(self, key: str, index: int) -> int | None:
        """``index``, if this sample has the name: a search would open a shard for every sample."""
        return index if index < len(self) and self.key(index) == key else None

    def read(self, index: int) -> bytes:
        """The image of the sample. Raises ``DataError`` where the shard cannot be read."""
        return self._reader.read(index)


def open_images(images: Path | str | Sequence[Path | str]) -> ImageSource:
    """Open a folder of images, a shard folder, one image, or a list of image files.

    Args:
        images: A path, or a list of paths of image files.

    Raises:
        DataError: There is no such path, or it holds no image.
    """
    if not isinstance(images, Path | str):
        if not images:
            raise DataError(
                "images", got="an empty list", expected="at least one image", fix="name an image or a folder"
            )
        return FileImages("", [_stat_file(Path(path)) for path in images])
    path = Path(images)
    if path.is_file():
        return FileImages("", [_stat_file(path)])
    if (path / INDEX).is_file():
        shards = ShardSet.open(path)
        _require_images(path, len(shards), "an empty shard folder")
        return ShardImages(shards)
    if not path.is_dir():
        raise DataError(
            f"images {path}",
            got="no such file or folder",
            expected="a folder of images, a shard folder or an image",
            fix="check the path",
        )
    parts = sorted(part.parent.name for part in path.glob(f"*/{INDEX}"))
    listing = list_images(path.absolute())
    if parts and not listing.images:
        raise DataError(
            f"images {path}",
            got=f"a folder of the shard folders {' and '.join(parts)}",
            expected="one of them",
            fix=f"name {path / parts[0]}",
        )
    _require_images(path, len(listing.images), f"no image among {len(listing.left_out)} other files")
    return FileImages(str(path.absolute()), sorted(listing.images), sorted(listing.left_out))


def _require_images(path: Path, count: int, got: str) -> None:
    if count == 0:
        raise DataError(f"images {path}", got=got, expected="at least one image", fix="name another folder")


def _stat_file(path: Path) -> ImageFile:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"image {path}", got=error.strerror, expected="a readable image file", fix="check the path"
        ) from error
    if path.is_dir():
        raise DataError(f"image {path}", got="a folder", expected="an image file", fix="name a file in it")
    return ImageFile(os.fspath(path), status.st_size, status.st_mtime_ns)


def _printable(name: str) -> str:
    """The name with backslash escapes for bytes that are no UTF-8, which no text file can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
