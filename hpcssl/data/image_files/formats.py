"""Recognize image files by their names and by their first bytes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from PIL import Image

from hpcssl.data import decode

PNG = b"\x89PNG\r\n\x1a\n"
START_BYTES = 32
"""Bytes of a file by which ``sniff_suffix`` recognizes a format."""
RAW_SUFFIXES = (".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw")
"""Raw files of cameras. Many begin like a TIFF, of which Pillow would read the thumbnail."""
_SYSTEM_FOLDERS = ("@eaDir", "__MACOSX")  # thumbnails of Synology's file server; metadata in archives of macOS
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (PNG, "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP  ", "jp2"),
)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the files that Pillow and pillow-heif decode, such as ``.webp``."""
    formats = decode.pillow_formats()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(known | {".heic", ".heif", ".hif"})


def sniff_suffix(start: bytes | bytearray | memoryview) -> str | None:
    """Return the suffix for one of the common formats, such as ``jpg``, by the first ``START_BYTES``; or None."""
    start = bytes(start[:START_BYTES])
    for magic, suffix in _MAGIC:
        if start.startswith(magic):
            return suffix
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if start[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if start[:2] == b"BM" and start[6:10] == bytes(4):  # two letters alone begin many texts; these bytes are reserved
        return "bmp"
    return "heic" if decode.is_heic(start) else None


def is_hidden(name: str) -> bool:
    """Whether programs for images skip a file or folder of this name, such as ``._x.jpg`` of macOS."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def why_left_out(name: str, read_start: Callable[[], bytes]) -> str | None:
    """Return why a file is not taken for an image; None for an image by its suffix or its first bytes.

    Args:
        name: Its name in the source, with ``/`` between folders.
        read_start: Reads its first bytes; only called where the suffix is not that of an image.
    """
    if any(is_hidden(part) for part in name.split("/")):
        return "hidden file"
    suffix = os.path.splitext(name)[1].lower()
    if suffix in RAW_SUFFIXES:
        return "raw file of a camera, which is not decoded"
    return None if suffix in image_suffixes() or sniff_suffix(read_start()) else "not an image"
