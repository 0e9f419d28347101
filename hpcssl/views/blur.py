"""The matrices that blur one axis of an image.

    tenth, tenth_zeros    weights exp(-d^2 / 2 sigma^2) up to a radius of a twentieth of the side, with a sum of 1
    pil                   three passes of a box of the fractional radius l + a, as Pillow's GaussianBlur

    L = sqrt(12 sigma^2 / 3 + 1),  l = floor((L - 1) / 2)
    a = (2l + 1) (l (l + 1) - sigma^2) / (6 (sigma^2 / 3 - (l + 1)^2))                  (Gwosdek et al. 2011)

A box of radius r = l + a has the weight 1 / (2r + 1) up to the distance l, and a / (2r + 1) at l + 1. It repeats the
edge pixel in each pass. Pillow rounds to 8 bits after each of the six passes over an image, here nothing is rounded.

``tenth`` mirrors the image at its edge as torchvision's gaussian_blur does; it is 23 pixels wide at 224. The JAX code
of BYOL pads with zeros, which darkens the border: ``tenth_zeros``.

Letters in shapes: n images, R the largest radius, S pixels per side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl.distributed.devices import to_device

KERNELS = ("pil", "tenth", "tenth_zeros")

_Array = npt.NDArray[np.float64]


def blur_matrix(
    sigma: npt.ArrayLike,
    size: int,
    kernel: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """Build the matrix that blurs one axis of an image.

    Args:
        sigma: Standard deviations in pixels, [n].
        size: S, the side of the image in pixels.
        kernel: One of ``KERNELS``.
        dtype: Type of the matrix.
        device: Device of the matrix.

    Returns:
        A matrix [n, S, S] whose row i holds what each pixel contributes to pixel i, and the largest radius in it.
    """
    column = np.asarray(sigma, np.float64)[:, None]
    device = torch.device(device)
    if (matrix_of_edges := _overlapping_edges(column, size, kernel)) is not None:
        return to_device(matrix_of_edges, device).to(dtype), size - 1
    weight, corner = _weights(column, size, kernel)
    radius = weight.shape[1] - 1
    table = np.zeros((len(column), 2 * size - 1))
    table[:, size - 1 : size + radius] = weight
    table[:, size - 1 - radius : size] = weight[:, ::-1]
    bands, corners = (to_device(part, device).to(dtype) for part in (table, corner))
    matrix = bands.as_strided((len(column), size, size), (2 * size - 1, 1, 1)).flip(1)
    matrix[:, :radius, : radius + 1] += corners
    matrix[:, size - radius :, size - radius - 1 :] += corners.flip(1, 2)
    return matrix, radius


def blur_taps(sigma: npt.ArrayLike, size: int, kernel: str) -> tuple[_Array, int, int]:
    """List the different rows of ``blur_matrix`` in compact form.

    All rows of the matrix that are further than E from both edges have the same taps, and its lower half mirrors the
    upper one.

    Args:
        sigma: Standard deviations in pixels, [n], one or more.
        size: S, the side of the image in pixels.
        kernel: One of ``KERNELS``.

    Returns:
        Taps [n, E + 1, 2R + 1], E, and R. Row i of the upper half of the matrix holds ``taps[min(i, E), R + d]`` in
        column i + d.
    """
    column = np.asarray(sigma, np.float64)[:, None]
    matrix = _overlapping_edges(column, size, kernel)
    if matrix is not None:
        edge, radius = (size - 1) // 2, size - 1
        taps = np.zeros((len(column), edge + 1, 2 * radius + 1))
        for row in range(edge + 1):
            taps[:, row, radius - row : radius - row + size] = matrix[:, row]
        return taps, edge, radius
    weight, corner = _weights(column, size, kernel)
    radius = weight.shape[1] - 1
    taps = np.repeat(np.concatenate([weight[:, :0:-1], weight], 1)[:, None], radius + 1, axis=1)
    for row in range(radius):
        taps[:, row, radius - row : 2 * radius - row + 1] += corner[:, row]
    return taps, radius, radius


def _overlapping_edges(sigma: _Array, size: int, kernel: str) -> _Array | None:
    """The whole matrix [n, S, S] of an image so small that both edges are near each other; None for others."""
    box = _pillow_box(sigma) if kernel == "pil" else None
    return None if box is None or size >= 6 * box.shape[1] else _three_passes(box, size)


def _weights(sigma: _Array, size: int, kernel: str) -> tuple[_Array, _Array]:
    """Weights [n, R + 1] of one side, and what pixels beyond the edge contribute to those within, [n, R, R + 1]."""
    if kernel == "pil":
        return _weights_and_corners(_pillow_box(sigma))
    return _gaussian(sigma, size, mirrored=kernel == "tenth")


def _gaussian(sigma: _Array, size: int, *, mirrored: bool) -> tuple[_Array, _Array]:
    """Weights [n, R + 1] of one side, and what the pixels beyond the edge contribute to those within, [n, R, R + 1]."""
    radius = min(size // 20, size - 1)
    weight = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    weight[weight < 1e-12] = 0  # far below one level; subnormal numbers would slow the products tenfold
    weight /= (2 * weight.sum(1) - weight[:, 0])[:, None]
    corner = np.zeros((len(sigma), radius, radius + 1))
    for i in range(radius if mirrored else 0):
        corner[:, i, 1 : radius + 1 - i] = weight[:, i + 1 :]
    return weight, corner


def _pillow_box(sigma: _Array) -> _Array:
    """Weights [n, r + 1] of one side of Pillow's box."""
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    at = np.arange(int(whole.max(initial=0)) + 2)
    weight: _Array = np.where(at <= whole, 1.0, np.where(at == whole + 1, part, 0.0)) / (2 * (whole + part) + 1)
    return weight


def _three_passes(box: _Array, size: int) -> _Array:
    """The matrix [n, size, size] of three passes of a box [n, r + 1] that repeats the edge pixel."""
    one, at = np.zeros((len(box), size, size)), np.arange(size)
    for distance in range(1 - box.shape[1], box.shape[1]):
        one[:, at, np.clip(at + distance, 0, size - 1)] += box[:, [abs(distance)]]
    passes: _Array = one @ one @ one
    return passes


def _weights_and_corners(box: _Array) -> tuple[_Array, _Array]:
    """The same as ``_gaussian`` returns, of three passes of a box.

    They are read off a matrix that is just large enough: an edge reaches R pixels far, and pixels within R of it are
    reached from up to 2R.
    """
    radius = 3 * (box.shape[1] - 1)
    passes = _three_passes(box, 4 * radius + 1)
    weight = passes[:, 2 * radius, 2 * radius : 3 * radius + 1]
    corner = passes[:, :radius, : radius + 1].copy()
    for i in range(radius):
        corner[:, i] -= weight[:, np.abs(np.arange(radius + 1) - i)]
    return weight, corner
