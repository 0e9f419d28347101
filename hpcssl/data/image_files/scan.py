"""List the files of a folder, whatever the layout of the folders below it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hpcssl.data.image_files import formats
from hpcssl.errors import DataError


class ImageFile(NamedTuple):
    """An image in a folder.

    Attributes:
        name: Path below the folder, with ``/`` between folders.
        size: Bytes; 0 for a broken link.
        mtime_ns: Modification time in ns.
    """

    name: str
    size: int
    mtime_ns: int


@dataclass
class FolderListing:
    """What a folder holds.

    Attributes:
        images: Its images, by their names or by their first bytes, in the order of the names within each folder.
        folders: First parts of the names of all folders.
        left_out: Names of all other files, and of hidden folders with a ``/`` at the end, each with the reason.
    """

    images: list[ImageFile] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def list_images(root: Path, receive: Callable[[ImageFile], None] | None = None) -> FolderListing:
    """List a folder and all folders below it. Links are followed.

    Args:
        root: The folder.
        receive: Called with each image, which then is not in the listing: a large folder need not be held in memory.

    Raises:
        DataError: For an unreadable folder, or a link to a folder that contains it.
    """
    listing = FolderListing()
    add = receive or listing.images.append
    for entry, name in _walk(os.fspath(root), "", frozenset()):
        if entry.is_dir():
            if formats.is_hidden(entry.name):
                listing.left_out.append((f"{name}/", "hidden folder"))
            else:
                listing.folders.add(name.split("/", 1)[0])
        elif entry.is_file() or entry.is_symlink():
            reason = formats.why_left_out(name, lambda: _read_start(entry.path))  # noqa: B023 - called at once
            if reason is None:
                add(ImageFile(name, *_size_and_mtime(entry)))
            else:
                listing.left_out.append((name, reason))
    return listing


def _walk(folder: str, relative: str, parents: frozenset[tuple[int, int]]) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield each entry below a folder and its name, a folder before what it holds; what hidden ones hold is skipped."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        status = os.stat(folder)
    except OSError as error:
        raise DataError(
            f"folder {folder}",
            got=error.strerror,
            expected="a readable folder",
            fix="ask for read permission, or move it out of the source",
        ) from error
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        raise DataError(
            f"folder {folder}",
            got="a link back to a folder that contains it",
            expected="a tree without cycles",
            fix="remove this link",
        )
    for entry in entries:
        name = f"{relative}{entry.name}"
        yield entry, name
        if entry.is_dir() and not formats.is_hidden(entry.name):
            yield from _walk(entry.path, f"{name}/", parents | {identity})


def _read_start(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(formats.START_BYTES)
    except OSError:  # no image by its suffix either
        return b""


def _size_and_mtime(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a broken link: whoever reads the file reports it with its reason
        return 0, 0
    return status.st_size, status.st_mtime_ns
