"""Color operations on batches of planar images, float [n, 3, S, S] in [0, 1], in place.

They compute what torchvision's functional operations compute, for a batch in which every row has its own factor. Three
have a second form, that of BYOL's authors (byol/utils/augmentations.py), named ``deepmind_...``; hue and gray are the
same there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GRAY = (0.2989, 0.587, 0.114)  # luma of torchvision and PIL
NEUTRAL = {"torchvision": (1.0, 1.0, 1.0, 0.0), "deepmind": (0.0, 1.0, 1.0, 0.0)}
"""The factors of the four jitter operations that change nothing, by library."""

Factor = float | Tensor
"""A factor: a number for a single row, or a tensor [n, 1, 1, 1] with one value per row."""


def brightness(x: Tensor, factor: Factor) -> None:
    """Scale the brightness: x <- clamp(factor * x). torchvision's adjust_brightness, in place on [n, 3, S, S]."""
    x.mul_(factor).clamp_(max=1)


def contrast(x: Tensor, factor: Factor) -> None:
    """Blend with the mean of the gray image. torchvision's adjust_contrast, in place on [n, 3, S, S]."""
    r, g, b = x.mean((2, 3)).unbind(1)
    mean = (r * _GRAY[0] + g * _GRAY[1] + b * _GRAY[2]).view(-1, 1, 1, 1)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x: Tensor, factor: Factor) -> None:
    """Blend with the gray image. torchvision's adjust_saturation, in place on [n, 3, S, S]."""
    gray = _luma(x).mul_(1 - factor)
    x.mul_(factor).add_(gray).clamp_(0, 1)


def hue(x: Tensor, turn: Factor) -> None:
    """Turn the hue in exact HSV. torchvision's adjust_hue, in place on [n, 3, S, S].

    With n the least channel, C = max - n and t = (x - n) / C, the hue in sixths of a circle is
    +-(1 - t_r + t_g + t_b), signed as g - b: one formula in place of the usual three cases. Back again, a channel is
    n + C clamp(2 - d, 0, 1), with d the distance on the circle from the channel's own hue (red 0, green 2, blue -2).

    Args:
        x: float [n, 3, S, S] in [0, 1].
        turn: Fraction of a full circle, in [-0.5, 0.5].
    """
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    least = torch.minimum(r, g)
    torch.minimum(least, b, out=least)
    chroma = torch.maximum(r, g)
    torch.maximum(chroma, b, out=chroma).sub_(least)
    h = (g + b).sub_(r).sub_(least).div_(chroma.clamp_min(1e-20)).add_(1)
    h.copysign_(g - b).add_(turn * 6)
    if isinstance(turn, Tensor) or abs(turn) > 1 / 3:
        h.sub_((h / 6).round_().mul_(6))  # back into [-3, 3]; a smaller turn stays within [-5, 5]
    base, distance = least.sub_(chroma), torch.empty_like(h)
    for channel, own in ((x[:, 0:1], 0.0), (x[:, 1:2], -2.0), (x[:, 2:3], 2.0)):
        # | |y| - 3 | = 3 - d for |y| <= 5, up to values that the clamp cuts to 2: clamp(2 - d, 0, 1) + 1
        torch.add(h, own, out=distance).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(base, chroma, distance, out=channel)


def deepmind_brightness(x: Tensor, summand: Factor) -> None:
    """Add to the brightness: x <- clamp(x + summand), in place on [n, 3, S, S]."""
    x.add_(summand).clamp_(0, 1)


def deepmind_contrast(x: Tensor, factor: Factor) -> None:
    """Blend each channel with its own mean, in place on [n, 3, S, S]."""
    mean = x.mean((2, 3), keepdim=True)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def deepmind_saturation(x: Tensor, factor: Factor) -> None:
    """Scale the saturation of HSV, up to 1, in place on [n, 3, S, S].

    With v the largest channel, the saturation is s = (v - min) / v, and a channel is v - s v q where q depends on the
    hue alone. So scaling s by f scales v - x by f, or by 1 / s where f s would exceed 1.
    """
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    limit = value / chroma.clamp_min(1e-20)  # 1 / s; where the chroma is 0, v - x is 0 as well
    scale = torch.minimum(limit, torch.as_tensor(factor, dtype=x.dtype, device=x.device))
    torch.sub(value, (value - x).mul_(scale), out=x)
    x.clamp_(0, 1)


def to_gray(x: Tensor) -> None:
    """Replace the image by three equal channels of luma. torchvision's rgb_to_grayscale, in place on [n, 3, S, S]."""
    x.copy_(_luma(x).expand_as(x))


def solarize(x: Tensor) -> None:
    """Invert pixels above one half: x <- min(x, 1 - x), in place. PIL's solarize with its threshold of 128 of 255."""
    x.sub_(0.5).abs_().neg_().add_(0.5)


def _luma(x: Tensor) -> Tensor:
    """Luma [n, 1, S, S], in memory of its own."""
    gray = x[:, 0:1] * _GRAY[0]
    return gray.add_(x[:, 1:2], alpha=_GRAY[1]).add_(x[:, 2:3], alpha=_GRAY[2])
