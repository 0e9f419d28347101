"""List the images of a folder, or of a tar archive of one, whatever the layout of its folders."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_prep.catalog import WHOLE_FILE, FileTable, LeftOut, SourceFile, SourceListing
from data_prep.catalog.names import format_examples
from data_prep.sources import tars
from hpcssl.data.image_files import formats
from hpcssl.data.image_files.scan import list_images
from hpcssl.errors import ConfigError, DataError


def list_source(src: Path, subdir: str, scratch: Path) -> SourceListing:
    """List the files of a folder or of an archive.

    Args:
        src: The folder, or a tar, which may be compressed.
        subdir: Only the files below this folder; empty for all.
        scratch: File to which a compressed archive is expanded.

    Raises:
        DataError: The source is absent or cannot be read.
        ConfigError: There is no such ``subdir``.
    """
    if not src.exists():
        raise DataError(
            f"source {src}",
            got="no such file or folder",
            expected="a folder of images, a tar of one, a .parquet or .arrow file, or a .csv list",
            fix="check the path",
        )
    if src.is_dir():
        root = src / subdir
        if not root.is_dir():
            raise _subdir_error(subdir, src, sorted(p.name for p in src.iterdir() if p.is_dir()))
        return _scan_folder(root.absolute())
    listing = SourceListing(src, os.fspath(tars.expand(src, scratch)))
    mtime_ns, prefix = src.stat().st_mtime_ns, posixpath.normpath(subdir) + "/" if subdir else ""
    tops = set()
    size = os.path.getsize(listing.path)
    with open(listing.path, "rb") as archive:
        for name, offset, length in tars.iterate_members(Path(listing.path), src, 0, size, listing.folders, prefix):
            tops.add(name.split("/", 1)[0])
            if name.startswith(prefix):
                file = SourceFile(name[len(prefix) :], offset, length, mtime_ns)
                add_file(listing, file, partial(_read_start, archive.fileno(), length, offset))
    if subdir and not listing.images and not listing.folders:
        raise _subdir_error(subdir, src, sorted(tops))
    return listing


def add_file(listing: SourceListing, file: SourceFile, read_start: Callable[[], bytes]) -> None:
    """Add a file to a listing: an image by its suffix or its first bytes, or a file that is left out.

    Args:
        listing: Receives the file.
        file: The file.
        read_start: Reads its first bytes; only called where the suffix is not that of an image.
    """
    reason = formats.why_left_out(file.name, read_start)
    if "/" in file.name and reason != "hidden file":
        listing.folders.add(file.folder)
    if reason is None:
        listing.images.append(file)
    else:
        listing.left_out.append(LeftOut(file.name, reason))


def _read_start(descriptor: int, size: int, offset: int) -> bytes:
    return os.pread(descriptor, min(size, formats.START_BYTES), offset)


def _subdir_error(subdir: str, src: Path, folders: list[str]) -> ConfigError:
    return ConfigError(
        f"--subdir {subdir}",
        got=f"no such folder in {src}",
        expected=f"one of {format_examples(folders, 9)}",
        fix="check its spelling",
    )


def _scan_folder(root: Path) -> SourceListing:
    """List a folder, links followed. Raises DataError for an unreadable folder, or a link to a parent of its own."""
    images = FileTable()
    found = list_images(root, lambda image: images.append(SourceFile(image.name, WHOLE_FILE, *image[1:])))
    left_out = [LeftOut(*file) for file in found.left_out]
    return SourceListing(root, os.fspath(root), images, found.folders, left_out)
