"""The box of a random crop, from given random numbers.

Both rules draw an area and an aspect ratio, uniform in its logarithm. They differ where such a box does not fit:
torchvision tries again up to ten times, DeepMind's BYOL clips the sides to those of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

TRIES = 10
"""Boxes that ``random_box`` tries, which use two random numbers each."""
TOP, LEFT = 2 * TRIES, 2 * TRIES + 1
"""Positions of the random numbers for the corner."""

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def random_box(
    u: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Compute torchvision's ``RandomResizedCrop.get_params`` from given random numbers.

    Args:
        u: Uniform numbers in [0, 1): u[0:20] for the ten tries, u[20:22] for the corner.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        scale: Smallest and largest area, as fractions of the image's.
        ratio: Smallest and largest aspect ratio.

    Returns:
        Top, left, height and width of the crop in pixels.
    """
    for attempt in range(TRIES):
        h, w = _draw_sides(u[2 * attempt : 2 * attempt + 2], height * width, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return _place(u, height, width, h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def clipped_box(
    u: Sequence[float], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Compute the box of ``_decode_and_random_crop`` (byol/utils/dataset.py) from given random numbers.

    Args:
        u: Uniform numbers in [0, 1): u[0:2] for the area and the ratio, u[20:22] for the corner.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        scale: Smallest and largest area before clipping, as fractions of the image's.
        ratio: Smallest and largest aspect ratio before clipping.

    Returns:
        Top, left, height and width of the crop in pixels.
    """
    h, w = _draw_sides(u[:2], height * width, scale, ratio)
    return _place(u, height, width, min(max(h, 1), height), min(max(w, 1), width))


def _draw_sides(
    u: Sequence[float], area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Height and width of a box, which may be larger than the image."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    target = area * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = math.exp(low + (high - low) * u[1])
    return round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))


def _place(u: Sequence[float], height: int, width: int, h: int, w: int) -> Box:
    return int(u[TOP] * (height - h + 1)), int(u[LEFT] * (width - w + 1)), h, w
