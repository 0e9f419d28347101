"""Object masks: COCO's polygons and run lengths, and their bitmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

Segmentation = list[list[float]] | dict[str, Any]
"""Polygons, [x1, y1, x2, y2, …] each, or run lengths, as COCO annotations store them."""


def encode_mask(shape: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """Convert a segmentation to the compressed run lengths of pycocotools.

    Args:
        shape: Polygons or run lengths.
        size: Height and width of the image in pixels.
    """
    from pycocotools import mask as rle

    if isinstance(shape, dict):
        compressed: dict[str, Any] = rle.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
        return compressed
    merged: dict[str, Any] = rle.merge(rle.frPyObjects(shape, *size))
    return merged


def draw_mask(
    shape: Segmentation, size: tuple[int, int], new_size: tuple[int, int], flip: bool
) -> npt.NDArray[np.uint8]:
    """Draw a segmentation as a bitmap of a resized image.

    Polygons are scaled before they are filled, run lengths afterwards.

    Args:
        shape: Polygons or run lengths in the pixels of the stored image.
        size: Height and width of the stored image.
        new_size: Height and width of the resized image.
        flip: Whether the resized image is mirrored.

    Returns:
        uint8 [*new_size], 1 inside the object.
    """
    from pycocotools import mask as rle

    if isinstance(shape, dict):
        bitmap = torch.from_numpy(rle.decode(encode_mask(shape, size)))[None]
        nearest = pixels.InterpolationMode.NEAREST_EXACT
        drawn = pixels.resize(bitmap, list(new_size), interpolation=nearest)[0].numpy()
    else:
        scale = np.array([new_size[1] / size[1], new_size[0] / size[0]])
        scaled = [(np.reshape(ring, (-1, 2)) * scale).reshape(-1).tolist() for ring in shape]
        drawn = rle.decode(rle.merge(rle.frPyObjects(scaled, *new_size)))
    return np.ascontiguousarray(drawn[:, ::-1] if flip else drawn)


def decode_masks(masks: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
    """Decode compressed run lengths of one image to bitmaps, bool [n, *size]."""
    from pycocotools import mask as rle

    if not masks:
        return torch.zeros(0, *size, dtype=torch.bool)
    return torch.from_numpy(np.stack([rle.decode(mask) for mask in masks])).bool()


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int]) -> str:
    """Paste predicted probabilities into an image, cut them at 0.5 and return compressed run lengths.

    Args:
        mask: Probabilities inside the box, [1, 1, 28, 28].
        box: Its corners in pixels, [1, 4].
        size: Height and width of the image.
    """
    from pycocotools import mask as rle
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    drawn = (paste_masks_in_image(mask, box, size)[0, 0] > 0.5).to(torch.uint8).cpu().numpy()
    counts: bytes = rle.encode(np.asfortranarray(drawn))["counts"]
    return counts.decode()
