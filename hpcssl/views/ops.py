"""The operations after the crop, batched, on whatever device the images are on.

Images are planar float [n, 3, S, S] in [0, 1] until the last step. On a CPU a chunk of the batch that fits the cache
goes through the whole chain before the next one starts: a whole batch per operation would read and write main memory
each time (measured: 2-3 times slower). On a GPU the chunk is the batch. Within a chunk, an operation runs on the rows
that want it at this place of their own order.

Factors are Python floats for a single row and tensors [n, 1, 1, 1] otherwise; sigmas are a NumPy array [n].
"""

from __future__ import annotations

import numpy as np
import torch

_CHUNK_PIXELS = 224 * 224  # one row of 224 x 224 x 3 floats and its temporaries lie in 2 MiB of second-level cache
_BAND = 32  # rows per block of the banded blur: smaller blocks waste calls, larger ones multiply zeros
_GRAY = (0.2989, 0.587, 0.114)  # torchvision's and PIL's luma
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


@torch.no_grad()
def pipeline(images: torch.Tensor, params: np.ndarray, blur_kernel: str, mean, std, dtype) -> torch.Tensor:
    """uint8 [B, S, S, 3] and PARAMS [B] -> ``dtype`` [B, 3, S, S], channels_last. See ``augment.apply``."""
    count, size = images.shape[:2]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(count, size, size, 3, dtype=dtype, device=images.device)
    scale, shift = _normaliser(mean, std, images.device, work)
    chunk = count if images.is_cuda else max(1, _CHUNK_PIXELS // (size * size))
    with torch.autocast(images.device.type, enabled=False):
        for first in range(0, count, max(chunk, 1)):
            part = slice(first, first + chunk)
            _chunk(images[part], params[part], blur_kernel, scale, shift, work, out[part])
    return out.permute(0, 3, 1, 2)


def _normaliser(mean, std, device, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) / std as x * scale + shift, [3] each, for x in [0, 1]."""
    scale = 1 / torch.tensor(std, dtype=torch.float64)
    shift = -torch.tensor(mean, dtype=torch.float64) * scale
    return sent(scale.numpy(), device).to(dtype), sent(shift.numpy(), device).to(dtype)


def _chunk(images, params, blur_kernel, scale, shift, dtype, out) -> None:
    """One chunk through the whole chain, into ``out`` [n, S, S, 3]."""
    size = images.shape[1]
    images = _flipped(images, np.flatnonzero(params["flip"]))
    busy = params["jitter"] | params["gray"] | (params["sigma"] > 0) | params["solarize"]
    if not busy.any():  # stays interleaved: rows of 3 S values, constants repeated S times
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
            wants = params["jitter"] & (params["order"][:, place] == op)
            wants &= params["factors"][:, op] != _NEUTRAL[op]
            _on_rows(x, wants, _JITTER[op], params["factors"][:, op])
    _on_rows(x, params["gray"], to_gray)
    _on_rows(x, params["sigma"] > 0, blur, params["sigma"], host=True, kernel=blur_kernel)
    _on_rows(x, params["solarize"], solarize)
    x.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))
    out.copy_(x.permute(0, 2, 3, 1))


def sent(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device without waiting for what runs there: a copy from pageable memory would wait."""
    there = torch.from_numpy(numbers)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there


def _flipped(images: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    if len(rows) == 0:
        return images
    planes = images.permute(0, 3, 1, 2)  # torch's fast path for mirroring knows this layout
    if len(rows) == len(images):
        return planes.flip(3).permute(0, 2, 3, 1)
    index = sent(rows, images.device)
    images = images.clone()
    images[index] = planes[index].flip(3).permute(0, 2, 3, 1)
    return images


def _on_rows(x: torch.Tensor, wants: np.ndarray, op, values: np.ndarray | None = None, *, host=False,
             **options) -> None:
    """Run ``op(rows, value)`` in place on the rows of ``x`` that want it; ``host`` leaves the values in NumPy."""
    rows = np.flatnonzero(wants)
    if len(rows) == 0:
        return
    if values is None:
        value = ()
    elif host:
        value = (values[rows],)
    elif len(rows) == 1:
        value = (float(values[rows[0]]),)
    else:
        value = (sent(values[rows], x.device).to(x.dtype).view(-1, 1, 1, 1),)
    if len(rows) == len(x):
        op(x, *value, **options)
    elif len(rows) == 1:
        op(x[rows[0]:rows[0] + 1], *value, **options)
    else:
        index = sent(rows, x.device)
        some = x[index]
        op(some, *value, **options)
        x[index] = some


def brightness(x: torch.Tensor, factor) -> None:
    """x <- clamp(factor x). torchvision's adjust_brightness, in place."""
    x.mul_(factor).clamp_(max=1)


def contrast(x: torch.Tensor, factor) -> None:
    """Blend with the mean of the gray image. torchvision's adjust_contrast, in place."""
    r, g, b = x.mean((2, 3)).unbind(1)
    mean = (r * _GRAY[0] + g * _GRAY[1] + b * _GRAY[2]).view(-1, 1, 1, 1)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x: torch.Tensor, factor) -> None:
    """Blend with the gray image. torchvision's adjust_saturation, in place."""
    gray = _gray(x).mul_(1 - factor)
    x.mul_(factor).add_(gray).clamp_(0, 1)


def hue(x: torch.Tensor, turn) -> None:
    """Turn the hue by ``turn`` of a full circle in [-0.5, 0.5], in exact HSV. torchvision's adjust_hue, in place.

    With n the least channel, C = max - n and t = (x - n) / C, the hue in sixths of a circle is
    +-(1 - t_r + t_g + t_b), signed as g - b: one formula in place of the usual three cases. Back again, a channel is
    n + C clamp(2 - d, 0, 1), with d the distance on the circle from the channel's own hue (red 0, green 2, blue -2).
    """
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    least = torch.minimum(r, g)
    torch.minimum(least, b, out=least)
    chroma = torch.maximum(r, g)
    torch.maximum(chroma, b, out=chroma).sub_(least)
    h = (g + b).sub_(r).sub_(least).div_(chroma.clamp_min(1e-20)).add_(1)
    h.copysign_(g - b).add_(turn * 6)
    if torch.is_tensor(turn) or abs(turn) > 1 / 3:
        h.sub_((h / 6).round_().mul_(6))  # back into [-3, 3]; changes nothing that is within 5
    base, away = least.sub_(chroma), torch.empty_like(h)
    for channel, own in ((x[:, 0:1], 0.0), (x[:, 1:2], -2.0), (x[:, 2:3], 2.0)):
        # | |y| - 3 | = 3 - d for |y| <= 5, up to values that the clamp cuts to 2: clamp(2 - d, 0, 1) + 1
        torch.add(h, own, out=away).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(base, chroma, away, out=channel)


def to_gray(x: torch.Tensor) -> None:
    """Three equal channels of luma. torchvision's rgb_to_grayscale, in place."""
    x.copy_(_gray(x).expand_as(x))


def solarize(x: torch.Tensor) -> None:
    """x <- x below one half, 1 - x above: PIL's solarize with its default threshold of 128 of 255, in place."""
    x.sub_(0.5).abs_().neg_().add_(0.5)


def blur(x: torch.Tensor, sigma: np.ndarray, *, kernel: str) -> None:
    """A true Gaussian blur, columns then rows, in place: products with the band of ``blur_matrix``."""
    count, _, size, _ = x.shape
    matrix, radius = blur_matrix(sigma, size, kernel, dtype=x.dtype, device=x.device)
    each = matrix[:, None].expand(count, 3, size, size).reshape(count * 3, size, size)
    planes, half = x.view(count * 3, size, size), torch.empty_like(x)
    for here, near in _bands(size, radius):
        torch.bmm(each[:, here, near], planes[:, near], out=half.view(planes.shape)[:, here])
    rows, across = half.view(count, 3 * size, size), matrix.transpose(1, 2)
    for here, near in _bands(size, radius):
        torch.bmm(rows[:, :, near], across[:, near, here], out=x.view(rows.shape)[:, :, here])


def blur_matrix(sigma: np.ndarray, size: int, kernel: str, *, dtype=torch.float32, device="cpu"):
    """The blur of one axis for sigmas [n], in pixels: a matrix [n, S, S], whose row i holds what each pixel gives to
    pixel i, and the largest radius in it.

    Weights are exp(-d^2 / 2 sigma^2) up to a radius of 4 sigma (``pil``) or a twentieth of the side (``tenth``),
    normalised to a sum of 1.
    ``pil`` repeats the edge pixel. MSF, MoCo and others blur with Pillow's GaussianBlur, which is not a Gaussian but
    three box blurs of the same variance, rounded to 8 bits: on photographs half a level away in the mean, up to 3
    inside, up to 10 within a few pixels of the border.
    ``tenth`` mirrors the image at its edge as torchvision's gaussian_blur does (the TensorFlow and JAX originals of
    SimCLR and BYOL pad with zeros, which darkens the border); 23 pixels wide at 224.
    """
    sigma = np.asarray(sigma, np.float64)[:, None]
    radii = np.minimum(size // 20 if kernel == "tenth" else np.ceil(4 * sigma), size - 1)
    radius = int(np.max(radii))
    at = np.arange(radius + 1)
    weight = np.exp(-0.5 * (at / sigma) ** 2) * (at <= radii)  # [n, radius + 1], one side
    weight[weight < 1e-12] = 0  # far below one level; subnormal numbers would slow the products tenfold
    weight /= (2 * weight.sum(1) - weight[:, 0])[:, None]
    table = np.zeros((len(sigma), 2 * size - 1))
    table[:, size - 1:size + radius] = weight
    table[:, size - 1 - radius:size] = weight[:, ::-1]
    corner = np.zeros((len(sigma), radius, radius + 1))  # what the pixels beyond the edge give to those within
    for i in range(radius):
        if kernel == "tenth":
            corner[:, i, 1:radius + 1 - i] = weight[:, i + 1:]
        else:
            corner[:, i, 0] = weight[:, i + 1:].sum(1)
    table, corner = (sent(part, torch.device(device)).to(dtype) for part in (table, corner))
    matrix = table.as_strided((len(sigma), size, size), (2 * size - 1, 1, 1)).flip(1)
    matrix[:, :radius, :radius + 1] += corner
    matrix[:, size - radius:, size - radius - 1:] += corner.flip(1, 2)
    return matrix, radius


def _bands(size: int, radius: int) -> list[tuple[slice, slice]]:
    """Blocks of the output and the stretch of the input that each needs."""
    return [(slice(first, min(first + _BAND, size)),
             slice(max(0, first - radius), min(size, first + _BAND + radius))) for first in range(0, size, _BAND)]


_JITTER = (brightness, contrast, saturation, hue)


def _gray(x: torch.Tensor) -> torch.Tensor:
    """Luma [n, 1, S, S], in memory of its own."""
    gray = x[:, 0:1] * _GRAY[0]
    return gray.add_(x[:, 1:2], alpha=_GRAY[1]).add_(x[:, 2:3], alpha=_GRAY[2])
