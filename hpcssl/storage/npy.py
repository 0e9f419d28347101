"""Arrays of ``.npy`` files: in bytes, or mapped from a file."""

from __future__ import annotations

import io
import mmap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADER_BYTES = 2**16 + 64  # of a version 1 header, at most
# NumPy parses a header with ast.literal_eval. Up to Python 3.11.8, two threads that parse at the same time can end in
# "SystemError: AST constructor recursion depth mismatch" (CPython issue 106905).
_parsing = threading.Lock()


def array_of(content: bytes | mmap.mmap) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file, read-only, without a copy. It keeps ``content`` alive.

    Raises:
        ValueError: If the bytes are not such a file, are too few, or hold Python objects.
    """
    head = io.BytesIO(content[:_HEADER_BYTES])
    with _parsing:
        if np.lib.format.read_magic(head) == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(head)
            if not is_fortran and not dtype.hasobject:
                count = int(np.prod(shape, dtype=np.int64))
                empty: npt.NDArray[Any] = np.empty(0, dtype)
                flat = np.frombuffer(content, dtype, count, head.tell()) if count else empty
                return flat.reshape(shape)
        array: npt.NDArray[Any] = np.load(io.BytesIO(content[:]), allow_pickle=False)
        return array


def mapped_array(path: Path) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file, mapped from the file and read-only.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a file, is truncated, or holds Python objects.
    """
    with _parsing:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
