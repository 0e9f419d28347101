"""Cut one view out of a decoded image straight into its place in the batch, with the antialiased resize of torch.

The kernel that writes into given memory is private to torch (``_upsample_*2d_aa.out``), half the time of the public
one, and equal to it bit for bit; where it is missing or has changed, the public one is taken.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from hpcssl.data.decode import Scratch
from hpcssl.views.augment import ViewSpec


def cut(image: np.ndarray, box, spec: ViewSpec, out: torch.Tensor, scratch: Scratch) -> None:
    """Crop and resize uint8 [H, W, 3] into ``out``, uint8 [1, 3, S, S] in channels_last memory.

    ``box``: top, left, height, width as drawn. ``scratch`` is another one than the image lies in.
    """
    kind, size = spec.augment.interpolation, spec.size
    if spec.augment.crop == "random":
        top, left, height, width = box
        resize(_whole(image[top:top + height, left:left + width], scratch), out, kind)
        return
    if spec.augment.crop == "squash" and spec.augment.zoom == 1:
        resize(image, out, kind)
        return
    height, width = image.shape[:2]
    short, zoomed = min(height, width), round(size * spec.augment.zoom)
    tall, wide = (zoomed if side == short else int(zoomed * side / short) for side in (height, width))
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    if (tall, wide) == (size, size):
        resize(image, out, kind)
        return
    flat = torch.from_numpy(scratch.take(tall * wide * 3)[:tall * wide * 3])
    whole = flat.view(1, tall, wide, 3).permute(0, 3, 1, 2)
    resize(image, whole, kind)
    if spec.augment.crop == "squash":
        resize(flat.view(tall, wide, 3).numpy(), out, kind)
    else:
        out.copy_(whole[:, :, top:top + size, left:left + size])


def _whole(crop: np.ndarray, scratch: Scratch) -> np.ndarray:
    """The crop in memory of its own: the kernel would copy a window of a wider image anyway, more slowly."""
    if crop.flags.c_contiguous:
        return crop
    dense = scratch.take(crop.size)[:crop.size].reshape(crop.shape)
    np.copyto(dense, crop)
    return dense


def resize(image: np.ndarray, out: torch.Tensor, interpolation: str) -> None:
    """Antialiased resize of a contiguous uint8 [h, w, 3] to the size of ``out``, uint8 [1, 3, H, W] channels_last."""
    source = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    kernel = private_kernel(interpolation)
    if kernel is None:
        resize_public(source, out, interpolation)
    else:
        kernel(source, out.shape[2:], False, None, None, out=out)


def resize_public(source: torch.Tensor, out: torch.Tensor, interpolation: str) -> None:
    """The same through torch's public interface and one copy."""
    out.copy_(torch.nn.functional.interpolate(source, size=out.shape[2:], mode=interpolation, antialias=True,
                                              align_corners=False))


@functools.cache
def private_kernel(interpolation: str):
    """torch's kernel with an ``out`` argument, tried on a small image; None where this torch has no such thing."""
    source = torch.arange(5 * 7 * 3, dtype=torch.uint8).view(1, 5, 7, 3).permute(0, 3, 1, 2)
    given, wanted = (torch.zeros(1, 4, 3, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in range(2))
    try:
        kernel = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").out
        kernel(source, given.shape[2:], False, None, None, out=given)
    except (AttributeError, RuntimeError, TypeError):
        return None
    resize_public(source, wanted, interpolation)
    return kernel if torch.equal(given, wanted) else None
