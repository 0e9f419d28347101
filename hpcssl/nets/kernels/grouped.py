"""Batch normalization of several groups of a rank's rows in one pass, for CUDA tensors in the channels-last layout.

Group by group, torch needs the kernels of each group, a concatenation of the results, and another one of the gradients.
Here the groups are a dimension: rows [G·n, C, H, W] in channels-last layout are read as [G, n·H·W, C] without a copy.
The kernels themselves are in ``grouped_triton.py``. They stand behind two operators of torch, which also have shape
functions, so that the path that a GPU takes can be followed with fake tensors on a machine without one.

Letters in shapes: G groups, n samples of a group, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPERATORS = torch.library.Library("hpcssl", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no annotation
for _schema in (
    "grouped_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? residual=None, "
    "bool relu=False) -> (Tensor, Tensor, Tensor)",
    "grouped_norm_backward(Tensor grad, Tensor x, Tensor moments, Tensor? weight, Tensor? activated=None, "
    "bool residual=False) -> (Tensor, Tensor, Tensor, Tensor)",
):
    _OPERATORS.define(_schema)  # type: ignore[no-untyped-call]


def takes(x: Tensor) -> bool:
    """Whether rows [b, C] or [b, C, H, W] have a layout and type that ``GroupedNorm`` is written for."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return x.is_contiguous() if x.dim() == 2 else x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def like(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the type and layout of ``x``, for which ``takes`` holds."""
    return other.to(x.dtype, memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


class GroupedNorm(torch.autograd.Function):
    """Normalize each of several groups of consecutive rows with its own statistics; then add a residual, and ReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Normalize rows for which ``takes`` holds.

        The sum is rounded once, where separate operations would round after the norm as well.

        Args:
            ctx: Of autograd.
            x: The rows.
            groups: G.
            weight: [C] or None.
            bias: [C] or None.
            eps: Added to the variance.
            residual: Added to the normalized rows; of the shape, type and layout of ``x``. Only with ``relu``.
            relu: Whether negative results become 0.

        Returns:
            The rows, and mean and unbiased variance of each group, float32 [G, 2·C].
        """
        y, moments_G2C, statistics = torch.ops.hpcssl.grouped_norm(x, groups, weight, bias, eps, residual, relu)
        ctx.save_for_backward(x, moments_G2C, weight, y if relu else None)
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # no zeros for the gradient that the statistics do not get
        return y, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple[Tensor | None, ...]:
        """Gradients for ``x``, ``weight``, ``bias`` and ``residual``."""
        x, moments_G2C, weight, activated = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else like(x, grad)
        grad_x, dot_C, sum_C, grad_residual = torch.ops.hpcssl.grouped_norm_backward(
            grad, x, moments_G2C, weight, activated, ctx.has_residual
        )
        of_weight, of_bias = (None, None) if weight is None else (dot_C, sum_C)
        return grad_x, None, of_weight, of_bias, None, grad_residual if ctx.has_residual else None, None


def _forward_on_cuda(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    from hpcssl.nets.kernels import grouped_triton  # needs triton, which a CPU build of torch does not bring

    return grouped_triton.forward(x, groups, weight, bias, eps, residual, relu)


def _backward_on_cuda(
    grad: Tensor,
    x: Tensor,
    moments_G2C: Tensor,
    weight: Tensor | None,
    activated: Tensor | None = None,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from hpcssl.nets.kernels import grouped_triton

    return grouped_triton.backward(grad, x, moments_G2C, weight, activated, residual)


def _forward_shapes(
    x: Tensor,
    groups: int,
    _weight: Tensor | None,
    _bias: Tensor | None,
    _eps: float,
    _residual: Tensor | None = None,
    _relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    moments_G2C = x.new_empty((groups, 2, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x), moments_G2C, x.new_empty((groups, 2 * x.shape[1]), dtype=torch.float32)


def _backward_shapes(
    _grad: Tensor,
    x: Tensor,
    _moments: Tensor,
    _weight: Tensor | None,
    _activated: Tensor | None = None,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_weight, of_bias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), of_weight, of_bias, torch.empty_like(x) if residual else x.new_empty(0)


for _name, _function, _key in (
    ("grouped_norm", _forward_on_cuda, "CUDA"),
    ("grouped_norm", _forward_shapes, "Meta"),
    ("grouped_norm_backward", _backward_on_cuda, "CUDA"),
    ("grouped_norm_backward", _backward_shapes, "Meta"),
):
    _OPERATORS.impl(_name, _function, _key)  # type: ignore[no-untyped-call]
