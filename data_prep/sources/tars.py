"""Read tar archives in place, without unpacking them.

An uncompressed tar serves as well as a folder once its headers are known: every image lies at an offset. A compressed
one has no offsets, so it is expanded once, next to the shards, and the copy is removed in the end.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from hpcssl.errors import DataError

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}


def expand(archive: Path, scratch: Path) -> Path:
    """Expand an archive if it is compressed (gzip, xz, bzip2).

    Args:
        archive: The archive.
        scratch: File for the expanded copy.

    Returns:
        The archive itself, or ``scratch``.

    Raises:
        DataError: The archive cannot be read.
    """
    with _archive_errors(archive), open(archive, "rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
    if opener is None:
        return archive.absolute()
    with _archive_errors(archive):
        compressed = opener(archive, "rb")
    with open(scratch, "wb") as copy, compressed:
        while True:
            with _archive_errors(archive):  # only the reads: an error of a write is one of the disk
                chunk = compressed.read(1 << 22)
            if not chunk:
                return scratch
            copy.write(chunk)


@contextlib.contextmanager
def _archive_errors(archive: Path, inner: str = "") -> Iterator[None]:
    """Turn the errors of reading an archive, or the archive ``inner`` in it, into ``DataError``."""
    try:
        yield
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"archive {archive}" + (f", {inner} in it" if inner else ""),
            got=f"{error}",
            expected="a complete tar archive",
            fix="download or copy it again and compare its size or checksum",
        ) from error


class _Window:
    """A part of a file as a file: an uncompressed archive inside another one."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def read(self, n: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if n < 0 else min(n, left))
        self.position += len(data)
        return data

    def seek(self, to: int, whence: int = 0) -> int:
        self.position = to + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position


def iterate_members(
    path: Path,
    archive: Path,
    start: int,
    size: int,
    folders: set[str] | None = None,
    prefix: str = "",
    inner: str = "",
) -> Iterator[tuple[str, int, int]]:
    """Iterate over the regular files of a tar.

    Args:
        path: File that holds the tar, uncompressed.
        archive: The archive that the user named, for messages.
        start: First byte of the tar in the file.
        size: Bytes of the tar.
        folders: Receives the top folders below ``prefix``, also empty ones.
        prefix: Only for ``folders``: the path, with ``/``, below which they are meant.
        inner: Name of this tar inside ``archive``, for messages.

    Yields:
        (name, offset in ``path``, size).

    Raises:
        DataError: The end mark is missing or a header is damaged. ``tarfile`` itself stops there without an error,
            as if the archive had ended.
    """
    with open(path, "rb") as file:
        window = _Window(file, start, size)
        with _archive_errors(archive, inner), tarfile.open(fileobj=window, mode="r:") as tar:  # type: ignore[call-overload] # reads what these three methods serve
            while (info := tar.next()) is not None:
                tar.members = []  # tarfile keeps every header it has read: gigabytes for ImageNet
                name = posixpath.normpath(info.name).lstrip("/")
                if ".." in name.split("/"):
                    raise tarfile.TarError(f"a name that points outside of the archive ({info.name})")
                if info.isdir() and folders is not None and name.startswith(prefix) and name + "/" != prefix:
                    top = name[len(prefix) :].split("/", 1)[0]
                    if top != "." and not top.startswith("."):
                        folders.add(top)
                if info.issparse():
                    raise tarfile.TarError(f"a sparse file ({name}), which cannot be read in place")
                if info.isreg():
                    yield name, start + info.offset_data, info.size
            window.seek(tar.offset)
            end = window.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                problem = "a damaged header" if end else "no end mark: it was truncated"
                raise tarfile.TarError(f"{problem} at byte {tar.offset} of {size}")
