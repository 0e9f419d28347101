"""Cut a view out of a decoded image straight into its place in the batch, with torch's antialiased resize.

Views with DeepMind's operations have TensorFlow's bicubic resize instead, which is not antialiased.

The kernel that writes into given memory (``_upsample_*2d_aa.out``) is private to torch. It takes half the time of the
public function and gives the same bits. Where it is missing or has changed, the public function is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from hpcssl.data.decode import ScratchBuffer
from hpcssl.views.augment import ViewSpec

_Image = npt.NDArray[np.uint8]


def crop_view(image: _Image, box: Sequence[int], spec: ViewSpec, out: torch.Tensor, scratch: ScratchBuffer) -> None:
    """Crop and resize an image into ``out``.

    Args:
        image: uint8 [H, W, 3].
        box: Top, left, height, width in pixels, as drawn for this view. Used by random crops only.
        spec: The view; its augmentation names the kind of crop.
        out: uint8 [1, 3, S, S] in channels_last memory; written to.
        scratch: A buffer for intermediate results; not the one that ``image`` lies in.
    """
    kind, size = spec.augment.interpolation, spec.size
    if spec.augment.crop == "random":
        top, left, height, width = box
        part = image[top : top + height, left : left + width]
        if spec.augment.library == "deepmind":
            out.copy_(torch.from_numpy(resize_without_antialiasing(part, size)).permute(2, 0, 1))
        else:
            resize(_make_contiguous(part, scratch), out, kind)
        return
    if spec.augment.crop == "squash" and spec.augment.zoom == 1:
        resize(image, out, kind)
        return
    height, width = image.shape[:2]
    short, zoomed = min(height, width), round(size * spec.augment.zoom)
    new_height, new_width = (zoomed if side == short else int(zoomed * side / short) for side in (height, width))
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    if (new_height, new_width) == (size, size):
        resize(image, out, kind)
        return
    count = new_height * new_width * 3
    flat = torch.from_numpy(scratch.take(count)[:count])
    resized = flat.view(1, new_height, new_width, 3).permute(0, 3, 1, 2)
    resize(image, resized, kind)
    if spec.augment.crop == "squash":
        resize(flat.view(new_height, new_width, 3).numpy(), out, kind)
    else:
        out.copy_(resized[:, :, top : top + size, left : left + size])


def _make_contiguous(crop: _Image, scratch: ScratchBuffer) -> _Image:
    """The crop in memory of its own. The kernel would copy a window of a wider image anyway, more slowly."""
    if crop.flags.c_contiguous:
        return crop
    dense = scratch.take(crop.size)[: crop.size].reshape(crop.shape)
    np.copyto(dense, crop)
    return dense


def resize(image: _Image, out: torch.Tensor, interpolation: str) -> None:
    """Resize an image, with antialiasing, to the size of ``out``.

    Args:
        image: uint8 [h, w, 3], contiguous.
        out: uint8 [1, 3, H, W] in channels_last memory; written to.
        interpolation: ``bilinear`` or ``bicubic``.
    """
    source = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    kernel = private_kernel(interpolation)
    if kernel is None:
        resize_public(source, out, interpolation)
    else:
        kernel(source, out.shape[2:], False, None, None, out=out)


def resize_public(source: torch.Tensor, out: torch.Tensor, interpolation: str) -> None:
    """Do the same as ``resize`` through torch's public interface, at the cost of one copy.

    Args:
        source: uint8 [1, 3, h, w] in channels_last memory.
        out: uint8 [1, 3, H, W] in channels_last memory; written to.
        interpolation: ``bilinear`` or ``bicubic``.
    """
    out.copy_(
        torch.nn.functional.interpolate(
            source, size=out.shape[2:], mode=interpolation, antialias=True, align_corners=False
        )
    )


def resize_without_antialiasing(image: _Image, size: int) -> _Image:
    """Resize an image as TensorFlow's ``tf.image.resize`` with ``BICUBIC``, rounded to 8 bits.

    A pixel is made of the 4 x 4 pixels around its place in the image, however small it becomes. Keys' cubic with
    a = -1/2; beyond the edge there is nothing, and the other weights are scaled to a sum of 1.

    Args:
        image: uint8 [h, w, 3].
        size: Side of the result, S.

    Returns:
        uint8 [S, S, 3].
    """
    height, width, _ = image.shape
    tall = _resize_rows(image.reshape(height, width * 3).astype(np.float32), size)
    columns = tall.reshape(size, width, 3).transpose(1, 0, 2).reshape(width, size * 3)
    resized = _resize_rows(columns, size).reshape(size, size, 3).transpose(1, 0, 2)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def _resize_rows(rows: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Make ``size`` rows of four source rows each, [size, n] of [length, n]."""
    taps, weights = _cubic_taps(len(rows), size)
    resized: npt.NDArray[np.float32] = np.matmul(weights[:, None], rows[taps])[:, 0]
    return resized


def _cubic_taps(length: int, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """The four source pixels of each of ``size`` pixels along an axis, and their weights, [size, 4] each."""
    place = (np.arange(size) + 0.5) * (length / size) - 0.5
    taps = np.floor(place).astype(np.intp)[:, None] + np.arange(-1, 3)
    d = np.abs(place[:, None] - taps)
    weights = np.where(d <= 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
    weights *= (taps >= 0) & (taps < length)
    return taps.clip(0, length - 1), (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@functools.cache
def private_kernel(interpolation: str) -> Callable[..., torch.Tensor] | None:
    """Torch's private resize kernel with an ``out`` argument, after a trial on a small image.

    Returns:
        The kernel, or None where this version of torch has none that agrees with the public function.
    """
    source = torch.arange(5 * 7 * 3, dtype=torch.uint8).view(1, 5, 7, 3).permute(0, 3, 1, 2)
    private, public = (torch.zeros(1, 4, 3, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in range(2))
    try:
        kernel: Callable[..., torch.Tensor] = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").out
        kernel(source, private.shape[2:], False, None, None, out=private)
    except (AttributeError, RuntimeError, TypeError):
        return None
    resize_public(source, public, interpolation)
    return kernel if torch.equal(private, public) else None
