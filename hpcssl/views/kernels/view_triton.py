"""Triton kernels that augment a view. The launches are in ``augment``; all formulas are those of ``views.color``.

Three things need all pixels of an image, or those of a whole column or row, before the next operation can begin: the
mean color that a contrast blends with, and each pass of a blur. Where a view has them, they are kernels of their own;
everything else happens in one:

    _mean_colors   uint8 -> operations before the contrast -> sums of blocks     only if a row changes its contrast
    _colors        uint8 -> flip, jitter, gray -> solarize, normalize            always; for rows with a blur the colors
    _blur          colors -> blur along a column or a row -> solarize, normalize     twice, only if a row has a blur

A program handles a block of pixels of one image, and decides by the row of the table which operations it runs. Nothing
is added atomically, so that equal inputs give equal bits.

Letters in shapes: B samples, n those with a blur, K blocks of an image, S pixels per side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hpcssl.views.kernels import table as columns
from hpcssl.views.kernels.table import TableFacts

_PIXELS = 1024
"""Pixels that a program holds at once."""
_FLIP, _OPERATIONS, _FACTORS = (
    tl.constexpr(columns.FLIP),
    tl.constexpr(columns.OPERATIONS),
    tl.constexpr(columns.FACTORS),
)
_GRAY, _SOLARIZE = tl.constexpr(columns.GRAY), tl.constexpr(columns.SOLARIZE)
_BLURRED_ROW, _TAPS = tl.constexpr(columns.BLURRED_ROW), tl.constexpr(columns.TAPS)
_CONTRAST, _NO_OPERATION = tl.constexpr(columns.CONTRAST), tl.constexpr(columns.NO_OPERATION)

# without this, triton compiles again for every kind of number here: 1, multiples of 16, and others
_compiled = triton.jit(do_not_specialize=["size", "width", "blocks", "edge", "radius"])


@triton.jit
def _luma(r, g, b):
    return r * 0.2989 + g * 0.587 + b * 0.114


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _load(images, row, sample, pixel, exists, size):
    """Red, green and blue of uint8 [B, S, S, 3] in [0, 1], mirrored where the row of the table says so."""
    x = pixel % size
    x = tl.where(tl.load(row + _FLIP) > 0, size - 1 - x, x)
    place = images + (sample.to(tl.int64) * size * size + (pixel // size) * size + x) * 3
    r = tl.load(place, mask=exists, other=0).to(tl.float32) * (1 / 255)
    g = tl.load(place + 1, mask=exists, other=0).to(tl.float32) * (1 / 255)
    b = tl.load(place + 2, mask=exists, other=0).to(tl.float32) * (1 / 255)
    return r, g, b


@triton.jit
def _hue_channel(base, chroma, hue, own):
    return base + chroma * tl.minimum(tl.maximum(tl.abs(tl.abs(hue + own) - 3.0), 1.0), 2.0)


@triton.jit
def _turn_hue(r, g, b, turn):
    least = tl.minimum(tl.minimum(r, g), b)
    chroma = tl.maximum(tl.maximum(r, g), b) - least
    hue = (g + b - r - least) / tl.maximum(chroma, 1e-20) + 1.0
    hue = tl.where(g < b, -hue, hue) + turn * 6.0
    hue = hue - tl.floor(hue / 6.0 + 0.5) * 6.0
    base = least - chroma
    return (
        _hue_channel(base, chroma, hue, 0.0),
        _hue_channel(base, chroma, hue, -2.0),
        _hue_channel(base, chroma, hue, 2.0),
    )


@triton.jit
def _saturate(r, g, b, factor, DEEPMIND: tl.constexpr):
    if DEEPMIND:
        value = tl.maximum(tl.maximum(r, g), b)
        chroma = value - tl.minimum(tl.minimum(r, g), b)
        scale = tl.minimum(value / tl.maximum(chroma, 1e-20), factor)
        r, g, b = value - (value - r) * scale, value - (value - g) * scale, value - (value - b) * scale
    else:
        gray = _luma(r, g, b) * (1.0 - factor)
        r, g, b = r * factor + gray, g * factor + gray, b * factor + gray
    return _clamp(r), _clamp(g), _clamp(b)


@triton.jit
def _jitter(r, g, b, operation, factor, mean_r, mean_g, mean_b, DEEPMIND: tl.constexpr):
    """One operation of the color jitter on pixels of an image with this mean color."""
    if operation == 0:
        if DEEPMIND:
            r, g, b = _clamp(r + factor), _clamp(g + factor), _clamp(b + factor)
        else:
            r, g, b = tl.minimum(r * factor, 1.0), tl.minimum(g * factor, 1.0), tl.minimum(b * factor, 1.0)
    elif operation == 1:
        if not DEEPMIND:
            mean_r = _luma(mean_r, mean_g, mean_b)
            mean_g = mean_r
            mean_b = mean_r
        r = _clamp(r * factor + mean_r * (1.0 - factor))
        g = _clamp(g * factor + mean_g * (1.0 - factor))
        b = _clamp(b * factor + mean_b * (1.0 - factor))
    elif operation == 2:
        r, g, b = _saturate(r, g, b, factor, DEEPMIND)
    elif operation == 3:
        r, g, b = _turn_hue(r, g, b, factor)
    return r, g, b


@triton.jit
def _store(out, place, exists, r, g, b, row, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b):
    """Solarize where the row of the table says so, normalize, and write to [B, S, S, 3]."""
    if tl.load(row + _SOLARIZE) > 0:
        r, g, b = 0.5 - tl.abs(r - 0.5), 0.5 - tl.abs(g - 0.5), 0.5 - tl.abs(b - 0.5)
    kind = out.dtype.element_ty
    tl.store(out + place * 3, (r * scale_r + shift_r).to(kind), mask=exists)
    tl.store(out + place * 3 + 1, (g * scale_g + shift_g).to(kind), mask=exists)
    tl.store(out + place * 3 + 2, (b * scale_b + shift_b).to(kind), mask=exists)


@_compiled
def _mean_colors(images, table, sums, size, width, blocks, DEEPMIND: tl.constexpr, PIXELS: tl.constexpr):
    """Sums of each block's colors as they are before the contrast is changed, to ``sums`` [B, K, 3]."""
    block, sample = tl.program_id(0), tl.program_id(1)
    row = table + sample * width
    needs_mean = 0
    for place in tl.static_range(4):
        needs_mean += (tl.load(row + _OPERATIONS + place).to(tl.int32) == _CONTRAST).to(tl.int32)
    if needs_mean > 0:
        pixel = block * PIXELS + tl.arange(0, PIXELS)
        exists = pixel < size * size
        r, g, b = _load(images, row, sample, pixel, exists, size)
        is_before = 1
        for place in tl.static_range(4):
            operation = tl.load(row + _OPERATIONS + place).to(tl.int32)
            is_before = tl.where(operation == _CONTRAST, 0, is_before)
            operation = tl.where(is_before > 0, operation, _NO_OPERATION)
            r, g, b = _jitter(r, g, b, operation, tl.load(row + _FACTORS + place), 0.0, 0.0, 0.0, DEEPMIND)
        out = sums + (sample * blocks + block) * 3
        tl.store(out, tl.sum(tl.where(exists, r, 0.0), 0))
        tl.store(out + 1, tl.sum(tl.where(exists, g, 0.0), 0))
        tl.store(out + 2, tl.sum(tl.where(exists, b, 0.0), 0))


@_compiled
def _colors(
    images, table, sums, colors, out, size, width, blocks,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    DEEPMIND: tl.constexpr, CONTRAST: tl.constexpr, PIXELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Flip, jitter and gray; then to ``out`` [B, S, S, 3], or to ``colors`` [n, 3, S, S] for rows with a blur."""
    sample = tl.program_id(1)
    row = table + sample * width
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    area = size * size
    exists = pixel < area
    mean_r, mean_g, mean_b = 0.0, 0.0, 0.0
    if CONTRAST:
        block = tl.arange(0, BLOCKS)
        place_of_sums = sums + (sample * blocks + block) * 3
        mean_r = tl.sum(tl.load(place_of_sums, mask=block < blocks, other=0.0), 0) / area
        mean_g = tl.sum(tl.load(place_of_sums + 1, mask=block < blocks, other=0.0), 0) / area
        mean_b = tl.sum(tl.load(place_of_sums + 2, mask=block < blocks, other=0.0), 0) / area
    r, g, b = _load(images, row, sample, pixel, exists, size)
    for place in tl.static_range(4):
        operation = tl.load(row + _OPERATIONS + place).to(tl.int32)
        r, g, b = _jitter(r, g, b, operation, tl.load(row + _FACTORS + place), mean_r, mean_g, mean_b, DEEPMIND)
    if tl.load(row + _GRAY) > 0:
        gray = _luma(r, g, b)
        r, g, b = gray, gray, gray
    blurred = tl.load(row + _BLURRED_ROW).to(tl.int64)
    if blurred < 0:
        place = sample.to(tl.int64) * area + pixel
        _store(out, place, exists, r, g, b, row, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b)
    else:
        target = colors + blurred * 3 * area + pixel
        tl.store(target, r, mask=exists)
        tl.store(target + area, g, mask=exists)
        tl.store(target + 2 * area, b, mask=exists)


@_compiled
def _blur(
    source, target, table, size, width, edge, radius,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    LAST: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Blur planes [n, 3, S, S]: along columns to planes, and in the ``LAST`` pass along rows to [B, S, S, 3]."""
    sample = tl.program_id(1)
    row = table + sample * width
    blurred = tl.load(row + _BLURRED_ROW).to(tl.int64)
    if blurred >= 0:
        area = size * size
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        exists = pixel < area
        if LAST:
            at, stride = pixel % size, 1
        else:
            at, stride = pixel // size, size
        to_end = size - 1 - at
        is_mirrored = at > to_end
        taps = row + _TAPS + tl.minimum(tl.minimum(at, to_end), edge) * (2 * radius + 1)
        place = source + blurred * 3 * area + pixel
        r = tl.zeros([PIXELS], tl.float32)
        g = tl.zeros([PIXELS], tl.float32)
        b = tl.zeros([PIXELS], tl.float32)
        for tap in range(2 * radius + 1):
            distance = tap - radius
            inside = exists & (at + distance >= 0) & (at + distance < size)
            weight = tl.load(taps + tl.where(is_mirrored, 2 * radius - tap, tap), mask=inside, other=0.0)
            r += weight * tl.load(place + distance * stride, mask=inside, other=0.0)
            g += weight * tl.load(place + distance * stride + area, mask=inside, other=0.0)
            b += weight * tl.load(place + distance * stride + 2 * area, mask=inside, other=0.0)
        if LAST:
            to = sample.to(tl.int64) * area + pixel
            _store(target, to, exists, r, g, b, row, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b)
        else:
            to = target + blurred * 3 * area + pixel
            tl.store(to, r, mask=exists)
            tl.store(to + area, g, mask=exists)
            tl.store(to + 2 * area, b, mask=exists)


def augment(
    images: Tensor, numbers: Tensor, facts: TableFacts, deepmind: bool, affine: list[float], out: Tensor
) -> None:
    """Augment a view: one launch, one more if a contrast is changed, and two more if there is a blur.

    Args:
        images: uint8 [B, S, S, 3], contiguous.
        numbers: What ``table.make_table`` returned, on the device of the images.
        facts: What it returned with them.
        deepmind: Whether the color operations are those of BYOL's authors.
        affine: Scale of red, green and blue, and then shift, which normalize values in [0, 1].
        out: [B, S, S, 3], contiguous, of a type of up to 32 bits, which is written.
    """
    count, size = images.shape[:2]
    width, blocks = numbers.shape[1], triton.cdiv(size * size, _PIXELS)
    grid = (blocks, count)
    sums = numbers.new_empty((count, blocks, 3) if facts.has_contrast else (0,))
    colors, half = (numbers.new_empty((facts.blurred, 3, size, size)) for _ in range(2))
    if facts.has_contrast:
        _mean_colors[grid](images, numbers, sums, size, width, blocks, deepmind, _PIXELS)
    padded = triton.next_power_of_2(blocks)
    _colors[grid](
        images, numbers, sums, colors, out, size, width, blocks, *affine, deepmind, facts.has_contrast, _PIXELS, padded
    )
    if facts.blurred:
        shape = size, width, facts.edge, facts.radius
        _blur[grid](colors, half, numbers, *shape, *affine, False, _PIXELS)
        _blur[grid](half, out, numbers, *shape, *affine, True, _PIXELS)
