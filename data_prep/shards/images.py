"""Encoded images: name their formats, check that a file decodes completely, and encode pixels as PNG."""

from __future__ import annotations

import io
import warnings

import simplejpeg
from PIL import Image

from hpcssl.data import decode
from hpcssl.data.decode import DamagedImageError
from hpcssl.data.image_files.formats import sniff_suffix

Buffer = bytes | bytearray | memoryview


def detect_suffix(data: Buffer) -> str:
    """Return the suffix of an image by its content, such as ``jpg``; ``bin`` for no image.

    File names do not decide: n02105855_2933.JPEG of ImageNet is a PNG, and readers that trust the suffix fail on it.
    """
    suffix = sniff_suffix(data)
    if suffix is None:
        try:
            suffix = (decode.open_image(bytes(data)).format or "bin").lower()
        except DamagedImageError:
            return "bin"
    return suffix


def smaller_side(data: Buffer) -> int:
    """Return the smaller of height and width in pixels, from the header. Raises DamagedImageError for no image."""
    return min(decode.read_size(bytes(data)))


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG, without compression: versions of zlib differ, and the bytes must not."""
    body = io.BytesIO()
    image.save(body, "PNG", compress_level=0)
    return body.getvalue()


def find_damage(data: Buffer) -> str | None:
    """Decode an image to its last row.

    The fast decoder is strict: it refuses CMYK and files with stray bytes between markers. The decoder of the training,
    which also detects every truncation, then decides. Decoding to gray finds the same damage, because the entropy
    decoding is the same, and saves the color conversion.

    Args:
        data: The bytes of an image file.

    Returns:
        The reason why it cannot be used for training, or None if it decodes completely.
    """
    if not len(data):
        return "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of very large images below its limit
            if data[:3] == b"\xff\xd8\xff":
                try:
                    height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
                    if height * width <= decode.MAX_PIXELS:
                        simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True)
                        return None
                except (ValueError, KeyError):  # a KeyError where the header is cut off
                    pass
            decode.decode(bytes(data))
    except DamagedImageError as error:
        return f"cannot be decoded ({error})"
    return None
