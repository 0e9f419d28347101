"""Read the bytes of source images, from files of their own or from inside archives."""

from __future__ import annotations

import os

from data_prep.catalog import WHOLE_FILE, Sample
from hpcssl.errors import DataError

_MAX_OPEN = 64  # archives that stay open


class SourceReader:
    """Reads the images of samples into buffers. Up to 64 archives stay open; files of one image do not."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def read_image(self, view: memoryview, sample: Sample) -> None:
        """Fill a buffer with the image of a sample.

        Args:
            view: Buffer of ``sample.size`` bytes.
            sample: The sample.

        Raises:
            OSError: The file cannot be read.
            DataError: The file has another size than when the source was listed.
        """
        if sample.offset == WHOLE_FILE:
            self.read_file(view, f"{sample.path}/{sample.source}")
        else:
            self.read_range(view, sample.path, sample.offset)

    def read_range(self, view: memoryview, path: str, offset: int) -> None:
        """Fill a buffer from ``offset`` of an archive. Raises OSError, and DataError for an archive that is cut."""
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = self._open[path] = os.open(path, os.O_RDONLY)
        _fill(descriptor, view, offset, path)

    def read_file(self, view: memoryview, path: str) -> None:
        """Fill a buffer with a whole file. Raises OSError, and DataError for another size than that of the buffer."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size != len(view):
                raise _size_error(path)
            _fill(descriptor, view, 0, path)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the archives."""
        while self._open:
            os.close(self._open.popitem()[1])


def _fill(descriptor: int, view: memoryview, offset: int, path: str) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise _size_error(path)
        done += count


def _size_error(path: str) -> DataError:
    return DataError(
        f"source {path}",
        got="another size than when the source was listed",
        expected="a source that does not change while it is read",
        fix="wait until it is complete, then run the same command again",
    )
