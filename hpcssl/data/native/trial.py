"""Whether the native decoder gives the bits of the plain one, tried on small images of every kind that it takes."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from hpcssl.data.crop import crop_view
from hpcssl.data.decode import ScratchBuffer, decode
from hpcssl.data.native.library import NativeError, ViewDecoder
from hpcssl.views.augment import Augmentation, ViewSpec

_HEIGHT, _WIDTH = 67, 93  # neither fills its last block of 8 or 16 pixels
_BOXES = ((0, 0, _HEIGHT, _WIDTH), (19, 33, 17, 9), (33, 1, 30, 55), (1, 50, 64, 43), (66, 92, 1, 1))
_SIDES = (7, 24, 101)
_SAMPLINGS = ("444", "422", "420", "440", "411", "Gray")


def run_trial(library: ctypes.CDLL) -> None:
    """Compare crops of small JPEGs with those of the plain decoder, and offer a file that is cut off.

    Takes some milliseconds.

    Args:
        library: The opened library.

    Raises:
        NativeError: A pixel differs, a file was refused that it should take, or the damaged one was taken.
    """
    decoder = ViewDecoder(library)
    for sampling in _SAMPLINGS:
        data = _make_jpeg(sampling)
        image = decode(data)
        for kind in ("bilinear", "bicubic"):
            for box in _BOXES:
                _compare(decoder, data, image, sampling, kind, box)
    data, place = _make_jpeg("420"), np.empty((7, 7, 3), np.uint8)
    for share in (0.5, 0.9):
        part = data[: int(share * len(data))]
        if decoder.decode(part, (_HEIGHT, _WIDTH), [(_BOXES[1], len(place), "bilinear", place.ctypes.data)]):
            raise NativeError("it takes a JPEG that is cut off")


def _compare(
    decoder: ViewDecoder, data: bytes, image: npt.NDArray[np.uint8], sampling: str, kind: str, box: tuple[int, ...]
) -> None:
    places = [np.zeros((side, side, 3), np.uint8) for side in _SIDES]
    views = [(box, len(place), kind, place.ctypes.data) for place in places]
    if not decoder.decode(data, (_HEIGHT, _WIDTH), views):
        raise NativeError(f"it refuses a JPEG with sampling {sampling}")
    for place in places:
        view = ViewSpec(name="trial", augment=Augmentation(interpolation=kind), size=len(place))
        plain = torch.zeros(1, *place.shape, dtype=torch.uint8)
        crop_view(image, box, view, plain.permute(0, 3, 1, 2), ScratchBuffer())
        if not np.array_equal(plain[0].numpy(), place):
            raise NativeError(f"its pixels differ from the plain ones (sampling {sampling}, {kind} to {len(place)})")


def _make_jpeg(sampling: str) -> bytes:
    """A color gradient with noise, and edges whose chroma differs from that of their neighbors."""
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    noise = (x * 2654435761 + y * 40503 * (x % 97 + 1)) >> 7 & 63
    planes = (3 * x + noise) % 256, (3 * y + noise + 128 * (x // 11 % 2)) % 256, (x + y + 2 * noise) % 256
    image = np.stack(planes, -1).astype(np.uint8)
    data: bytes
    if sampling == "Gray":
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image[..., :1]), colorspace="Gray", colorsubsampling="Gray")
    else:
        data = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=sampling)
    return data
