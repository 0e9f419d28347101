"""The augmentation operations after the crop, batched, on the device of the images.

Images are planar float [n, 3, S, S] in [0, 1] until the last step. On a CPU, a chunk of the batch that fits into the
cache goes through all operations before the next chunk starts: a whole batch per operation would read and write main
memory each time (measured: 2-3 times slower). On a GPU the chunk is the batch. Within a chunk, an operation runs on the
rows that use it at this place of their own order.

Jitter factors are Python floats for a single row and tensors [n, 1, 1, 1] otherwise; sigmas are a NumPy array [n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl.distributed.devices import to_device
from hpcssl.views.blur import blur_matrix
from hpcssl.views.color import (
    NEUTRAL,
    brightness,
    contrast,
    deepmind_brightness,
    deepmind_contrast,
    deepmind_saturation,
    hue,
    saturation,
    solarize,
    to_gray,
)

_CHUNK_PIXELS = 224 * 224  # one row of 224 x 224 x 3 floats and its temporaries fit in 2 MiB of second-level cache
_BAND = 32  # rows per block of the banded blur: smaller blocks cost more calls, larger ones multiply zeros
_JITTER = {
    "torchvision": (brightness, contrast, saturation, hue),
    "deepmind": (deepmind_brightness, deepmind_contrast, deepmind_saturation, hue),
}


@torch.no_grad()
def run_pipeline(
    images: Tensor,
    params: npt.NDArray[np.void],
    library: str,
    blur_kernel: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Apply all operations to a batch. ``augment.augment_batch`` checks the arguments and calls this.

    Args:
        images: uint8 [B, S, S, 3].
        params: ``PARAMS`` [B].
        library: Whose color operations: ``torchvision`` or ``deepmind`` (see ``color``).
        blur_kernel: One of ``blur.KERNELS``.
        mean: Per channel, on the scale 0-1.
        std: Per channel, on the scale 0-1.
        dtype: Type of the result.

    Returns:
        ``dtype`` [B, 3, S, S] in channels_last memory.
    """
    count, size = images.shape[:2]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(count, size, size, 3, dtype=dtype, device=images.device)
    scale, shift = _make_normalizer(mean, std, images.device, work)
    chunk = count if images.is_cuda else max(1, _CHUNK_PIXELS // (size * size))
    with torch.autocast(images.device.type, enabled=False):
        for first in range(0, count, max(chunk, 1)):
            rows = slice(first, first + chunk)
            _run_chunk(images[rows], params[rows], library, blur_kernel, scale, shift, work, out[rows])
    return out.permute(0, 3, 1, 2)


def _make_normalizer(
    mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x - mean) / std as x * scale + shift, [3] each, for x in [0, 1]."""
    scale = 1 / torch.tensor(std, dtype=torch.float64)
    shift = -torch.tensor(mean, dtype=torch.float64) * scale
    return to_device(scale.numpy(), device).to(dtype), to_device(shift.numpy(), device).to(dtype)


def _run_chunk(
    images: Tensor,
    params: npt.NDArray[np.void],
    library: str,
    blur_kernel: str,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Apply all operations to one chunk and write the result into ``out`` [n, S, S, 3]."""
    size = images.shape[1]
    images = _flip_rows(images, np.flatnonzero(params["flip"]))
    has_work = params["jitter"] | params["gray"] | (params["sigma"] > 0) | params["solarize"]
    if not has_work.any():  # stays interleaved: rows of 3 S values, constants repeated S times
        target = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        target.copy_(images)
        target.view(-1, size * 3).mul_(scale.div(255).repeat(size)).add_(shift.repeat(size))
        if target is not out:
            out.copy_(target)
        return
    x = torch.empty(len(images), 3, size, size, dtype=dtype, device=images.device)
    x.copy_(images.permute(0, 3, 1, 2)).mul_(1 / 255)
    for place in range(4):
        for op in range(4):
            mask = params["jitter"] & (params["order"][:, place] == op)
            mask &= params["factors"][:, op] != NEUTRAL[library][op]
            _apply_to_rows(x, mask, _JITTER[library][op], params["factors"][:, op])
    _apply_to_rows(x, params["gray"], to_gray)
    _apply_to_rows(x, params["sigma"] > 0, blur, params["sigma"], keep_numpy=True, kernel=blur_kernel)
    _apply_to_rows(x, params["solarize"], solarize)
    x.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))
    out.copy_(x.permute(0, 2, 3, 1))


def _flip_rows(images: Tensor, rows: npt.NDArray[np.intp]) -> Tensor:
    """Mirror these rows of uint8 [n, S, S, 3] images left to right."""
    if len(rows) == 0:
        return images
    planes = images.permute(0, 3, 1, 2)  # torch's fast path for mirroring needs this layout
    if len(rows) == len(images):
        return planes.flip(3).permute(0, 2, 3, 1)
    index = to_device(rows, images.device)
    images = images.clone()
    images[index] = planes[index].flip(3).permute(0, 2, 3, 1)
    return images


def _apply_to_rows(
    x: Tensor,
    mask: npt.NDArray[np.bool_],
    op: Callable[..., None],
    values: npt.NDArray[np.float32] | None = None,
    *,
    keep_numpy: bool = False,
    **options: Any,
) -> None:
    """Run ``op(rows, value, **options)`` in place on some rows of ``x``.

    Args:
        x: float [n, 3, S, S].
        mask: bool [n], the rows to change.
        op: An operation of ``color``, or ``blur``.
        values: One value per row of ``x``; None for an operation without one.
        keep_numpy: Whether to hand on the values as a NumPy array rather than a number or tensor.
        options: Further arguments of ``op``.
    """
    rows = np.flatnonzero(mask)
    if len(rows) == 0:
        return
    value: tuple[Any, ...]
    if values is None:
        value = ()
    elif keep_numpy:
        value = (values[rows],)
    elif len(rows) == 1:
        value = (float(values[rows[0]]),)
    else:
        value = (to_device(values[rows], x.device).to(x.dtype).view(-1, 1, 1, 1),)
    if len(rows) == len(x):
        op(x, *value, **options)
    elif len(rows) == 1:
        op(x[rows[0] : rows[0] + 1], *value, **options)
    else:
        index = to_device(rows, x.device)
        part = x[index]
        op(part, *value, **options)
        x[index] = part


def blur(x: Tensor, sigma: npt.NDArray[np.floating], *, kernel: str) -> None:
    """Blur columns, then rows, in place.

    Args:
        x: float [n, 3, S, S].
        sigma: Standard deviation per row, in pixels, [n].
        kernel: One of ``blur.KERNELS``.
    """
    count, _, size, _ = x.shape
    matrix, radius = blur_matrix(sigma, size, kernel, dtype=x.dtype, device=x.device)
    each = matrix[:, None].expand(count, 3, size, size).reshape(count * 3, size, size)
    planes, half = x.view(count * 3, size, size), torch.empty_like(x)
    for block, source in _bands(size, radius):
        torch.bmm(each[:, block, source], planes[:, source], out=half.view(planes.shape)[:, block])
    rows, across = half.view(count, 3 * size, size), matrix.transpose(1, 2)
    for block, source in _bands(size, radius):
        torch.bmm(rows[:, :, source], across[:, source, block], out=x.view(rows.shape)[:, :, block])


def _bands(size: int, radius: int) -> list[tuple[slice, slice]]:
    """Blocks of the output, and the part of the input that each of them needs."""
    return [
        (slice(first, min(first + _BAND, size)), slice(max(0, first - radius), min(size, first + _BAND + radius)))
        for first in range(0, size, _BAND)
    ]
