"""Whether a file is a whole image: every one is decoded to its last row before it enters a shard. And the one way to
encode those that come as pixels."""

from __future__ import annotations

import io
import warnings

import simplejpeg
from PIL import Image

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def suffix(data) -> str | None:
    """``jpg`` or ``png`` by the first bytes, None for anything else.

    Names do not decide: ImageNet's n02105855_2933.JPEG is a PNG, and readers that trust a suffix choke on it.
    """
    if data[:3] == JPEG:
        return "jpg"
    return "png" if data[:8] == PNG else None


def png(image: Image.Image) -> bytes:
    """An image as a PNG. Stored without compression: zlibs differ, bytes must not."""
    body = io.BytesIO()
    image.save(body, "PNG", compress_level=0)
    return body.getvalue()


def damage(data) -> str | None:
    """Why these bytes are not an image that can be trained on, or None when they decode completely.

    The fast decoder is strict and refuses files that only carry odd bytes between markers, and CMYK; Pillow, which
    also finds every truncation, has the last word. Gray is asked for because the entropy decoding, which is what
    finds damage, is the same, and the colour conversion is saved.
    """
    if not len(data):
        return "empty file"
    kind = suffix(data)
    if kind is None:
        return "no JPEG and no PNG inside"
    if kind == "jpg":
        try:
            simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True)
            return None
        except ValueError:
            pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of very large images below its limit
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                image.load()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        return f"cannot be decoded ({str(error) or type(error).__name__})"
    return None
