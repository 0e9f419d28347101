"""Triton kernels of ``grouped.py``. Values of one channel are summed in float32, in an order that the shapes fix.

Each direction has three kernels: one sums the rows of every split of a group, one adds up the splits, and one
writes the result for every element. Nothing is added atomically, so that equal inputs give equal bits.

Letters in shapes: G groups, M = n·H·W rows of a group, C channels, S splits of a group's rows. Capital names of kernel
arguments are constants of a compilation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
"""Rows that a program holds at once."""
_PROGRAMS = 1024
"""Programs that the kernels that read everything are split into, at least: some seven per multiprocessor of an H200."""
_MAX_SPLITS = 256

# fmt: off
# Without this, triton compiles again for every kind of number here: 1, multiples of 16, and others. The number of
# channels is left out, because it decides whether a kernel may read several values at once.
_compiled = triton.jit(do_not_specialize=["rows", "split_rows", "splits", "groups"])


@triton.jit
def _tile(pointer, g, row, channel, rows, channels, end):
    """Offsets of [rows, channels] of group ``g``, and which of them exist: rows before ``end``."""
    offset = g.to(tl.int64) * rows * channels + row[:, None].to(tl.int64) * channels + channel[None, :]
    return pointer + offset, (row[:, None] < end) & (channel[None, :] < channels)


@_compiled
def _sum_moments(x, partial, rows, channels, split_rows, splits, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared deviations of each split, to ``partial`` [G, 2, S, C] (Chan et al. 1979)."""
    split, g, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    first = split * split_rows
    end = tl.minimum(first + split_rows, rows)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    seen = 0.0
    for start in range(first, end, ROWS):
        pointers, exists = _tile(x, g, start + tl.arange(0, ROWS), channel, rows, channels, end)
        values = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
        count = tl.minimum(end - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(values, 0) / count
        deviation = tl.where(exists, values - tile_mean[None, :], 0.0)
        change = tile_mean - mean
        share = count / (seen + count)
        squares += tl.sum(deviation * deviation, 0) + change * change * seen * share
        mean += change * share
        seen += count
    place = partial + (g * 2 * splits + split) * channels + channel
    tl.store(place, mean, mask=channel < channels)
    tl.store(place + splits * channels, squares, mask=channel < channels)


@_compiled
def _join_moments(
    partial, moments, statistics, rows, channels, split_rows, splits, eps, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and inverse deviation to ``moments`` [G, 2, C], mean and unbiased variance to ``statistics`` [G, 2, C]."""
    g, block = tl.program_id(0), tl.program_id(1)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)
    exists = (split[:, None] < splits) & (channel[None, :] < channels)
    place = partial + (g * 2 * splits + split[:, None]) * channels + channel[None, :]
    means = tl.load(place, mask=exists, other=0.0)
    squares = tl.load(place + splits * channels, mask=exists, other=0.0)
    counts = tl.maximum(tl.minimum(rows - split * split_rows, split_rows), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * counts, 0) / rows
    deviation = tl.where(exists, means - mean[None, :], 0.0)
    total = tl.sum(squares, 0) + tl.sum(deviation * deviation * counts, 0)
    out = g * 2 * channels + channel
    stored = channel < channels
    tl.store(moments + out, mean, mask=stored)
    tl.store(moments + out + channels, 1.0 / tl.sqrt(total / rows + eps), mask=stored)
    tl.store(statistics + out, mean, mask=stored)
    tl.store(statistics + out + channels, total / (rows - 1), mask=stored)


@_compiled
def _normalize(
    x, y, moments, weight, bias, residual, rows, channels, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, RELU:
    tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """``y = (x - mean) * invstd * weight + bias``, plus ``residual``, and 0 where that is negative."""
    g, block = tl.program_id(1), tl.program_id(2)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    mean = tl.load(moments + g * 2 * channels + channel, mask=known, other=0.0)
    scale = tl.load(moments + (g * 2 + 1) * channels + channel, mask=known, other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pointers, exists = _tile(x, g, row, channel, rows, channels, rows)
    normal = (tl.load(pointers, mask=exists, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    if AFFINE:
        normal = normal * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)[None, :]
        normal += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        pointers, exists = _tile(residual, g, row, channel, rows, channels, rows)
        normal += tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    if RELU:
        normal = tl.where(normal < 0, 0.0, normal)  # which keeps a NaN, unlike a maximum
    pointers, exists = _tile(y, g, row, channel, rows, channels, rows)
    tl.store(pointers, normal.to(y.dtype.element_ty), mask=exists)


@_compiled
def _sum_gradients(
    grad, x, moments, activated, grad_residual, partial, rows, channels, split_rows, splits, RELU: tl.constexpr,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Sums of the gradient, and of its product with the normalized values, of each split, to [G, 2, S, C].

    With RELU, the gradient is that where ``activated`` is positive, and 0 elsewhere. With RESIDUAL this is written to
    ``grad_residual``, too.
    """
    split, g, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    mean = tl.load(moments + g * 2 * channels + channel, mask=known, other=0.0)
    scale = tl.load(moments + (g * 2 + 1) * channels + channel, mask=known, other=0.0)
    first = split * split_rows
    end = tl.minimum(first + split_rows, rows)
    total = tl.zeros([CHANNELS], tl.float32)
    dot = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        pointers, exists = _tile(x, g, row, channel, rows, channels, end)
        normal = (tl.load(pointers, mask=exists, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
        pointers, exists = _tile(grad, g, row, channel, rows, channels, end)
        slope = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
        if RELU:
            pointers, exists = _tile(activated, g, row, channel, rows, channels, end)
            slope = tl.where(tl.load(pointers, mask=exists, other=0.0).to(tl.float32) <= 0, 0.0, slope)
        if RESIDUAL:
            pointers, exists = _tile(grad_residual, g, row, channel, rows, channels, end)
            tl.store(pointers, slope.to(grad_residual.dtype.element_ty), mask=exists)
        total += tl.sum(slope, 0)
        dot += tl.sum(slope * normal, 0)
    place = partial + (g * 2 * splits + split) * channels + channel
    tl.store(place, total, mask=known)
    tl.store(place + splits * channels, dot, mask=known)


@_compiled
def _join_gradients(
    partial, sums, grad_weight, grad_bias, groups, channels, splits, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Sums of each group to ``sums`` [G, 2, C], and over all groups to the gradients of weight and bias [C]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    split = tl.arange(0, SPLITS)
    exists = (split[:, None] < splits) & known[None, :]
    all_total = tl.zeros([CHANNELS], tl.float32)
    all_dot = tl.zeros([CHANNELS], tl.float32)
    for g in range(groups):
        place = partial + (g * 2 * splits + split[:, None]) * channels + channel[None, :]
        total = tl.sum(tl.load(place, mask=exists, other=0.0), 0)
        dot = tl.sum(tl.load(place + splits * channels, mask=exists, other=0.0), 0)
        tl.store(sums + g * 2 * channels + channel, total, mask=known)
        tl.store(sums + (g * 2 + 1) * channels + channel, dot, mask=known)
        all_total += total
        all_dot += dot
    tl.store(grad_weight + channel, all_dot, mask=known)
    tl.store(grad_bias + channel, all_total, mask=known)


@_compiled
def _propagate(
    grad, x, grad_x, moments, sums, weight, activated, rows, channels, AFFINE: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """``grad_x = (grad - mean(grad) - normal * mean(grad * normal)) * invstd * weight``, ``grad`` as summed."""
    g, block = tl.program_id(1), tl.program_id(2)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    mean = tl.load(moments + g * 2 * channels + channel, mask=known, other=0.0)
    scale = tl.load(moments + (g * 2 + 1) * channels + channel, mask=known, other=0.0)
    total = tl.load(sums + g * 2 * channels + channel, mask=known, other=0.0) / rows
    dot = tl.load(sums + (g * 2 + 1) * channels + channel, mask=known, other=0.0) / rows
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pointers, exists = _tile(x, g, row, channel, rows, channels, rows)
    normal = (tl.load(pointers, mask=exists, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :]
    pointers, exists = _tile(grad, g, row, channel, rows, channels, rows)
    slope = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    if RELU:
        pointers, exists = _tile(activated, g, row, channel, rows, channels, rows)
        slope = tl.where(tl.load(pointers, mask=exists, other=0.0).to(tl.float32) <= 0, 0.0, slope)
    slope = slope - total[None, :] - normal * dot[None, :]
    if AFFINE:
        scale = scale * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    pointers, exists = _tile(grad_x, g, row, channel, rows, channels, rows)
    tl.store(pointers, (slope * scale[None, :]).to(grad_x.dtype.element_ty), mask=exists)


# fmt: on
class _Layout:
    """How rows [G·n, C, ...] are cut into programs."""

    def __init__(self, x: Tensor, groups: int):
        self.groups, self.channels = groups, x.shape[1]
        self.rows = x.numel() // self.channels // groups
        self.block = min(64, max(16, triton.next_power_of_2(self.channels)))
        self.blocks = triton.cdiv(self.channels, self.block)
        wanted = triton.next_power_of_2(triton.cdiv(_PROGRAMS, groups * self.blocks))
        wanted = min(wanted, _MAX_SPLITS, triton.cdiv(self.rows, _ROWS))
        self.split_rows = triton.cdiv(triton.cdiv(self.rows, wanted), _ROWS) * _ROWS
        self.splits = triton.cdiv(self.rows, self.split_rows)
        self.padded_splits = max(16, triton.next_power_of_2(self.splits))  # few numbers: few compilations
        self.whole = (triton.cdiv(self.rows, _ROWS), groups, self.blocks)
        self.partial = x.new_empty((groups, 2, self.splits, self.channels), dtype=torch.float32)

    def launch_partial(self, kernel: Any, *tensors: Tensor, constants: tuple[bool, ...] = ()) -> None:
        sizes = self.rows, self.channels, self.split_rows, self.splits
        kernel[(self.splits, self.groups, self.blocks)](*tensors, self.partial, *sizes, *constants, _ROWS, self.block)


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize rows [G·n, C] or [G·n, C, H, W] in channels-last layout, add ``residual`` of this layout, and ReLU.

    Returns:
        The rows; mean and inverse deviation of each group, float32 [G, 2, C]; mean and unbiased variance,
        float32 [G, 2·C].
    """
    at = _Layout(x, groups)
    moments_G2C = x.new_empty((groups, 2, at.channels), dtype=torch.float32)
    y, statistics = torch.empty_like(x), x.new_empty((groups, 2 * at.channels), dtype=torch.float32)
    at.launch_partial(_sum_moments, x)
    _join_moments[(groups, at.blocks)](
        at.partial,
        moments_G2C,
        statistics,
        at.rows,
        at.channels,
        at.split_rows,
        at.splits,
        eps,
        at.padded_splits,
        at.block,
    )
    affine = weight is not None
    has_residual = residual is not None
    tensors = x, y, moments_G2C, weight if affine else x, bias if affine else x, residual if has_residual else x
    _normalize[at.whole](*tensors, at.rows, at.channels, affine, has_residual, relu, _ROWS, at.block)
    return y, moments_G2C, statistics


def backward(
    grad: Tensor,
    x: Tensor,
    moments_G2C: Tensor,
    weight: Tensor | None,
    activated: Tensor | None = None,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what ``forward`` took; all layouts as there.

    Args:
        grad: Gradient of the rows that ``forward`` returned.
        x: Its input.
        moments_G2C: What it returned.
        weight: Its weight.
        activated: The rows that it returned, if it made the ReLU.
        residual: Whether it added a residual.

    Returns:
        Gradients of the rows, in their type; of weight and bias, float32 [C]; of the residual, empty without one.
    """
    groups = len(moments_G2C)
    at = _Layout(x, groups)
    sums_G2C, grad_x = torch.empty_like(moments_G2C), torch.empty_like(x)
    grad_weight, grad_bias = moments_G2C.new_empty(at.channels), moments_G2C.new_empty(at.channels)
    has_relu, grad_residual = activated is not None, torch.empty_like(x) if residual else x.new_empty(0)
    activated = activated if activated is not None else x
    at.launch_partial(_sum_gradients, grad, x, moments_G2C, activated, grad_residual, constants=(has_relu, residual))
    if residual:  # is the gradient after the ReLU already
        grad, has_relu = grad_residual, False
    _join_gradients[(at.blocks,)](
        at.partial, sums_G2C, grad_weight, grad_bias, groups, at.channels, at.splits, at.padded_splits, at.block
    )
    affine = weight is not None
    tensors = grad, x, grad_x, moments_G2C, sums_G2C, weight if affine else x, activated
    _propagate[at.whole](*tensors, at.rows, at.channels, affine, has_relu, _ROWS, at.block)
    return grad_x, grad_weight, grad_bias, grad_residual
