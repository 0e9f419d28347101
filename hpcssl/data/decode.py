"""Encoded bytes to uint8 RGB. Sequential 8-bit JPEGs take the fast decoder, everything else Pillow.

Nothing here guesses: a file that ends early or whose data are corrupt raises ``Damaged`` and never gives the half that
could be read, which Pillow would pad with gray.
"""

from __future__ import annotations

import io
import threading

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb: 256 MiB of RGB
_JPEG, _EXIF = b"\xff\xd8", b"Exif\x00\x00"
_SCAN, _APP1 = 0xDA, 0xE1  # markers: the compressed data begin; the segment that EXIF lives in
_HARMLESS = ("extraneous bytes", "unknown adobe color transform", "unsupported color conversion", "invalid sos")
_ORIENTATION = 0x0112


class Damaged(Exception):
    """These bytes are no whole image; the text says why. The reader's policy decides what follows."""


class Scratch(threading.local):
    """One growing buffer per thread. A fresh array per image costs a page fault every 4 KiB: 15-20 % of a decode."""

    def __init__(self):
        self.memory = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        if len(self.memory) < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory


def decode(data: bytes, scratch: Scratch | None = None) -> np.ndarray:
    """uint8 [height, width, 3], RGB, turned upright as its EXIF orientation says.

    Gray becomes three equal channels, CMYK and palettes are converted by Pillow, transparency is dropped, 16-bit
    samples keep their upper 8 bits; what moves (GIF, APNG, WebP) gives its first picture. With ``scratch`` the array
    may lie in that buffer and is valid until this thread's next decode. Raises ``Damaged``.
    """
    if len(data) == 0:
        raise Damaged("no bytes")
    if data[:2] == _JPEG:
        return _jpeg(data, scratch)
    return _pillow(data)


def peek(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG from its header, before any turn by EXIF; (0, 0) where only decoding can tell."""
    if data[:2] == _JPEG:
        try:
            return simplejpeg.decode_jpeg_header(data, strict=False)[:2]
        except (ValueError, KeyError):
            pass
    return 0, 0


def _jpeg(data: bytes, scratch: Scratch | None) -> np.ndarray:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        _check_size(height, width)
        # strict: libjpeg only warns where data are missing, and then fills up with gray
        if space == "CMYK" or space == "YCCK":
            simplejpeg.decode_jpeg(data, colorspace="CMYK")  # for the check alone: the inks are Pillow's to convert
            return _pillow(data)
        if scratch is None:
            image = simplejpeg.decode_jpeg(data)
        else:
            image = simplejpeg.decode_jpeg(data, buffer=scratch.take(height * width * 3))
    except (ValueError, KeyError) as error:  # a KeyError where the header is cut off
        if any(text in str(error).lower() for text in _HARMLESS):
            return _pillow(data)
        raise Damaged("JPEG: a header that is cut off" if isinstance(error, KeyError) else f"JPEG: {error}") from error
    return _upright(image, data) if _has_exif(data) else image


def _has_exif(data: bytes) -> bool:
    """Whether a segment before the compressed data is EXIF. Few images of the usual sets have one."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        if data[at + 1] == _APP1 and data[at + 4:at + 10] == _EXIF:
            return True
        at += 1 if data[at + 1] == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])  # 0xFF may pad a marker
    return False


def _upright(image: np.ndarray, data: bytes) -> np.ndarray:
    """Turn or mirror as EXIF tag 0x0112 says; a broken EXIF block says nothing."""
    try:
        turn = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - the image itself was decoded whole: Pillow's parser fails in many ways
        return image
    if turn in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        image = image[:, ::-1]
    if turn in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _pillow(data: bytes) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data))
        _check_size(image.height, image.width)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":
            return _wide(np.asarray(image))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))
    except Damaged:
        raise
    except UnidentifiedImageError as error:  # whose text names an address in memory
        raise Damaged("no image of a kind that is known") from error
    except Image.DecompressionBombError as error:
        raise Damaged(f"far more pixels than the limit of {MAX_PIXELS}") from error
    except Exception as error:  # decoders of damaged files raise what they like: OSError, SyntaxError, ...
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _wide(gray: np.ndarray) -> np.ndarray:
    """More than 8 bits of gray: the upper 8 of 16, where Pillow's own convert would clip at 255."""
    high = (np.clip(gray, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
    return np.repeat(high[:, :, None], 3, axis=2)


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise Damaged(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
