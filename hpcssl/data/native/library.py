"""Load the library that was built from the C files of this folder, and call it."""

from __future__ import annotations

import ctypes
import struct
import sysconfig
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcssl.data.decode import MAX_PIXELS, read_orientation

FILE = Path(__file__).with_name(f"_views{sysconfig.get_config_var('EXT_SUFFIX')}")
"""Where setup.py lets the library be built."""
NOT_BUILT = "not built"
"""The fault where there is no library, which is no reason for a warning."""
_INTERFACE = 1  # of views.c
_DONE = 0  # a return value of views.c
_KINDS = {"bilinear": 0, "bicubic": 1}
_pack_view = struct.Struct("=6iQ").pack  # View of views.c

Box = Sequence[int]
"""Top, left, height and width in pixels."""


class NativeError(Exception):
    """The library cannot be used; the text says why."""


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library.

    Args:
        path: The file.

    Raises:
        NativeError: It is missing, cannot be loaded here, or was built from other sources.
    """
    if not path.exists():
        raise NativeError(NOT_BUILT)
    try:
        library = ctypes.CDLL(str(path))
        library.hpcssl_interface.restype = ctypes.c_int
        version = library.hpcssl_interface()
    except (OSError, AttributeError) as error:
        raise NativeError(f"it cannot be loaded ({error})") from error
    if version != _INTERFACE:
        raise NativeError(f"it was built from an older or newer source (interface {version}, not {_INTERFACE})")
    library.hpcssl_decoder_new.restype = ctypes.c_void_p
    library.hpcssl_decoder_new.argtypes = []
    library.hpcssl_decoder_free.restype = None
    library.hpcssl_decoder_free.argtypes = [ctypes.c_void_p]
    library.hpcssl_decode_views.restype = ctypes.c_int
    library.hpcssl_decode_views.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
    ]
    return library


class ViewDecoder:
    """Decodes views of JPEGs with the library. For one thread.

    Args:
        library: What ``open_library`` returned.

    Raises:
        NativeError: libjpeg cannot be set up, for example because it is another one than that of the headers.
    """

    def __init__(self, library: ctypes.CDLL):
        self._handle = library.hpcssl_decoder_new()
        if not self._handle:
            raise NativeError("it cannot set up libjpeg (is it the one whose headers it was built with?)")
        self._decode = library.hpcssl_decode_views
        # not at exit: a thread that is stuck in a read may still use it then
        weakref.finalize(self, library.hpcssl_decoder_free, self._handle).atexit = False

    def decode(self, data: bytes, size: tuple[int, int], views: Iterable[tuple[Box, int, str, int]]) -> bool:
        """Decode all views of one image.

        Args:
            data: Content of the file.
            size: Height and width of the image, for which the boxes were drawn.
            views: Per view its box, its side S in pixels, ``bilinear`` or ``bicubic``, and the address of the uint8
                [S, S, 3] to write to.

        Returns:
            False where the file must be decoded in another way: it is damaged, of another size, turned by its EXIF
            orientation, or of a kind that the library does not take. The views are undefined then.
        """
        if size[0] * size[1] > MAX_PIXELS or read_orientation(data) != 1:
            return False
        packed = [_pack_view(*box, side, _KINDS[kind], address) for box, side, kind, address in views]
        return bool(self._decode(self._handle, data, len(data), *size, b"".join(packed), len(packed)) == _DONE)
