"""Decode image files to uint8 RGB. Sequential 8-bit JPEGs take the fast decoder, everything else Pillow.

Pillow reads PNG, WebP, TIFF, GIF, BMP, AVIF and about forty more formats; HEIC takes the package pillow-heif.

A file that ends early or whose data are corrupt raises ``DamagedImageError``. The part that could be read is never
returned; Pillow would fill the rest with gray.
"""

from __future__ import annotations

import functools
import io
import threading

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: where Pillow begins to warn of a decompression bomb, 256 MiB of RGB."""
_JPEG, _EXIF = b"\xff\xd8", b"Exif\x00\x00"
_SCAN, _APP1 = 0xDA, 0xE1  # markers: start of the compressed data; the segment that holds EXIF
_HARMLESS = ("extraneous bytes", "unknown adobe color transform", "unsupported color conversion", "invalid sos")
_ORIENTATION = 0x0112
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""Formats that Pillow recognizes and that are not read: EPS runs Ghostscript, which runs the program that a file is,
and the others have no decoder in Pillow itself."""


class DamagedImageError(Exception):
    """The bytes are not a complete image; the text says why. ``Reader`` replaces such samples up to a limit."""


class ScratchBuffer(threading.local):
    """A buffer per thread that grows as needed.

    A fresh array per image costs a page fault every 4 KiB, which is 15-20 % of a decode.
    """

    def __init__(self) -> None:
        self.memory: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """A buffer of at least ``size`` bytes. The content of the last one is overwritten."""
        if len(self.memory) < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory


def decode(data: bytes, scratch: ScratchBuffer | None = None) -> npt.NDArray[np.uint8]:
    """Decode an image file to RGB and turn it upright as its EXIF orientation says.

    Gray becomes three equal channels. Pillow converts CMYK and palettes. Transparency is dropped, and 16-bit samples
    keep their upper 8 bits. Of an animation (GIF, APNG, WebP) the first frame is returned, of a TIFF the first page.
    Color profiles are ignored. Floating-point pixels are refused, since their range is unknown.

    Args:
        data: Content of the file.
        scratch: A buffer to decode into. The returned array may lie in it, and is then valid until this thread's next
            decode.

    Returns:
        uint8 [height, width, 3].

    Raises:
        DamagedImageError: If the bytes are not a complete image, or it has more than ``MAX_PIXELS`` pixels.
    """
    if len(data) == 0:
        raise DamagedImageError("no bytes")
    if data[:2] == _JPEG:
        return _decode_jpeg(data, scratch)
    return _decode_with_pillow(data)


def peek_size(data: bytes) -> tuple[int, int]:
    """Read the size of a JPEG from its header, without decoding it.

    Returns:
        Height and width in pixels, before the EXIF orientation is applied; (0, 0) where only decoding can tell.
    """
    if data[:2] == _JPEG:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
            return height, width
        except (ValueError, KeyError):
            pass
    return 0, 0


def read_size(data: bytes) -> tuple[int, int]:
    """Read the size of an image of any format from its header.

    Returns:
        Height and width in pixels, before the EXIF orientation is applied.

    Raises:
        DamagedImageError: It is no image of a format that is read here, or has more than ``MAX_PIXELS`` pixels.
    """
    height, width = peek_size(data)
    if not height:
        width, height = open_image(data).size
    return height, width


def _decode_jpeg(data: bytes, scratch: ScratchBuffer | None) -> npt.NDArray[np.uint8]:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        _check_size(height, width)
        # strict: libjpeg only warns where data are missing, and then fills up with gray
        if space == "CMYK" or space == "YCCK":
            simplejpeg.decode_jpeg(data, colorspace="CMYK")  # only to find damage; Pillow converts the inks
            return _decode_with_pillow(data)
        if scratch is None:
            image = simplejpeg.decode_jpeg(data)
        else:
            image = simplejpeg.decode_jpeg(data, buffer=scratch.take(height * width * 3))
    except (ValueError, KeyError) as error:  # a KeyError where the header is cut off
        if any(text in str(error).lower() for text in _HARMLESS):
            return _decode_with_pillow(data)
        reason = "JPEG: a truncated header" if isinstance(error, KeyError) else f"JPEG: {error}"
        raise DamagedImageError(reason) from error
    orientation = read_orientation(data)
    return image if orientation == 1 else _turn_upright(image, orientation)


def _has_exif(data: bytes) -> bool:
    """Whether a segment before the compressed data is EXIF. Few images of the usual data sets have one."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        if data[at + 1] == _APP1 and data[at + 4 : at + 10] == _EXIF:
            return True
        at += 1 if data[at + 1] == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])  # 0xFF may pad a marker
    return False


def read_orientation(data: bytes) -> int:
    """Read the EXIF orientation of a JPEG.

    Returns:
        EXIF tag 0x0112; 1, upright, where there is none or the EXIF block is broken.
    """
    if not _has_exif(data):
        return 1
    try:
        orientation = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - the image itself can be decoded; Pillow's EXIF parser fails in many ways
        return 1
    return int(orientation) if orientation in range(2, 9) else 1


def _turn_upright(image: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Turn or mirror the image as an EXIF orientation from 2 to 8 says."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


@functools.cache
def pillow_formats() -> tuple[str, ...]:
    """Names of the formats that Pillow reads here, such as ``WEBP``, in the order in which it tries them."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_READ and name != "HEIF")


@functools.cache
def _register_heic() -> tuple[str, ...]:
    """Let Pillow read HEIC, if pillow-heif is installed. Returns the names of its formats."""
    try:
        import pillow_heif
    except ImportError:
        return ()
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def is_heic(start: bytes) -> bool:
    """Whether a file that starts with these bytes, 12 or more, is HEIC."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


def open_image(data: bytes) -> Image.Image:
    """Open an image with Pillow, which reads its header and no pixels.

    Args:
        data: Content of the file.

    Raises:
        DamagedImageError: It is no image of a format that is read here, or has more than ``MAX_PIXELS`` pixels.
    """
    heic = is_heic(data[:12])
    formats = pillow_formats() if not heic else (*_register_heic(), *pillow_formats())  # AVIF shares a brand with HEIC
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:  # its own text names an address in memory
        if heic and not _register_heic():
            raise DamagedImageError("HEIC, which needs pillow-heif: pip install 'hpcssl[images]'") from error
        raise DamagedImageError("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise DamagedImageError(f"far more pixels than the limit of {MAX_PIXELS}") from error
    _check_size(image.height, image.width)
    return image


def _decode_with_pillow(data: bytes) -> npt.NDArray[np.uint8]:
    try:
        image = open_image(data)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":
            return _upper_8_bits(np.asarray(image))
        if image.mode == "F":
            raise DamagedImageError("floating-point pixels, whose range is unknown; 8 or 16 bits are read")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))
    except DamagedImageError:
        raise
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError and many others
        raise DamagedImageError(f"{type(error).__name__}: {error}") from error


def _upper_8_bits(gray: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """RGB from gray of more than 8 bits: the upper 8 of 16 bits, where Pillow's own convert would clip at 255."""
    high = (np.clip(gray, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
    return np.repeat(high[:, :, None], 3, axis=2)


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DamagedImageError(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
