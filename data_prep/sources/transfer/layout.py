"""How a transfer data set lies on the disk, and what its reader returns.

A reader is one small function per layout. It opens lists, never images (the binary batches of CIFAR, which are both,
excepted), and checks nothing: ``read.py`` knows what should have been there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from hpcssl.data.shards import IMAGE_SUFFIXES

T = TypeVar("T")
Location = tuple[str, int, int, int]
"""Path, offset and size of the bytes of an image, and the modification time in ns of its source."""


class Item(NamedTuple):
    """An image of a data set.

    Attributes:
        source: Its name: a file below the folder, unless ``location`` says where its bytes lie.
        part: train, val or test. If no val is published, train still holds what will be held out.
        label: Class number; -1 with targets.
        targets: -1, 0 or 1 per class, as ``ShardSet.targets``.
        location: Where its bytes lie if they are not a file of the source.
    """

    source: str
    part: str
    label: int
    targets: tuple[int, ...] | None = None
    location: Location | None = None


class Listing(NamedTuple):
    """What the lists of a data set say.

    Attributes:
        classes: Class names.
        items: Its images.
    """

    classes: list[str]
    items: list[Item]


class EncodedImages:
    """Images that must be encoded first, one after the other in one file, which is read after it was closed.

    Args:
        file: An open file with a name.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._position = file, 0

    def add(self, body: bytes, mtime_ns: int) -> Location:
        """Append an encoded image; returns its location."""
        location = self._file.name, self._position, len(body), mtime_ns
        self._position += self._file.write(body)
        return location


@dataclass(frozen=True)
class Source:
    """The folder of a data set.

    Attributes:
        home: The folder, which holds the markers of its layout.
        split: The published split to read, from 1.
        encoded: Receives images that must be encoded first.
    """

    home: Path
    split: int
    encoded: EncodedImages

    def find(self, name: str) -> Path:
        """Return the path of a file or folder; ``name`` may give alternatives. Raises FileNotFoundError."""
        return self.home / self.find_name(name)

    def find_name(self, name: str) -> str:
        """Return the alternative of ``name`` that the folder holds. Raises FileNotFoundError."""
        existing = find_marker(self.home, name)
        if existing is None:
            raise FileNotFoundError(f"no {name}")
        return existing

    def read_lines(self, name: str) -> list[str]:
        """Return the non-empty lines of a list; ``name`` may give alternatives."""
        text = self.find(name).read_text("utf-8", "surrogateescape")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def read_matlab(self, name: str, variable: str) -> npt.NDArray[Any]:
        """Return one array of a MATLAB file, flat. Raises ValueError for a file that cannot be read."""
        from scipy.io import loadmat, matlab  # a dependency of scikit-learn, which only two of the sets need

        try:
            return np.atleast_1d(loadmat(self.find(name), squeeze_me=True)[variable]).ravel()
        except (matlab.MatReadError, zlib.error) as error:
            raise ValueError(f"{name}: {error}") from error


@dataclass(frozen=True)
class Layout:
    """A layout in which a data set is published.

    Attributes:
        read: Its reader.
        homes: Folders of SRC that may hold the markers, beside SRC itself.
        markers: Files, and folders with ``/``, that must be there; ``|`` separates alternatives, ``{split}`` stands
            for the number of the split.
    """

    read: Callable[[Source], Listing]
    homes: tuple[str, ...]
    markers: tuple[str, ...]


def find_marker(home: Path, marker: str) -> str | None:
    """Return the first of the alternatives (``a.txt|lists/a.txt``; folders end with ``/``) that a folder holds."""
    for name in marker.split("|"):
        if (home / name).is_dir() if name.endswith("/") else (home / name).is_file():
            return name
    return None


def number_classes(names: Iterable[T]) -> dict[T, int]:
    """Return the position of each name."""
    return {name: number for number, name in enumerate(names)}


def list_folders(path: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def list_images(path: Path) -> list[str]:
    """Return the names of the images in a folder, sorted, without hidden ones."""
    return sorted(name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")
