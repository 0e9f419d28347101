"""Arrays in the bytes of a ``.npy`` file, without a copy."""

from __future__ import annotations

import io
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADER_BYTES = 2**16 + 64  # of a version 1 header, at most


def array_of(content: bytes | mmap.mmap) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file, read-only. It keeps ``content`` alive.

    Raises:
        ValueError: If the bytes are not such a file, are too few, or hold Python objects.
    """
    head = io.BytesIO(content[:_HEADER_BYTES])
    if np.lib.format.read_magic(head) == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(head)
        if not is_fortran and not dtype.hasobject:
            count = int(np.prod(shape, dtype=np.int64))
            flat: npt.NDArray[Any] = np.frombuffer(content, dtype, count, head.tell()) if count else np.empty(0, dtype)
            return flat.reshape(shape)
    array: npt.NDArray[Any] = np.load(io.BytesIO(content[:]), allow_pickle=False)
    return array
