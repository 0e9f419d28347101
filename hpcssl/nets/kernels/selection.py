"""Whether batch norms use the kernels that only a GPU has, which are tried against plain ones before a training."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl.distributed import kernel_choice
from hpcssl.distributed.collectives import Collectives
from hpcssl.distributed.kernel_choice import Trial
from hpcssl.distributed.world import World
from hpcssl.nets.kernels.grouped import GroupedNorm
from hpcssl.nets.kernels.spanning import CudaSpanningNorm

_GROUPS, _EPS = 2, 1e-5
_ROUNDINGS = {torch.float32: 32, torch.bfloat16: 4}
"""How many roundings correct results may be apart: in float32 those of sums, in bfloat16 of what is stored."""
_Norm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From rows, weight and bias to normalized rows, and mean and unbiased variance of each group."""


def use_fast_kernels(setting: str, world: World) -> bool:
    """Decide, alike on all ranks, whether batch norms use the kernels of ``grouped.py`` and ``CudaSpanningNorm``.

    On a GPU, each rank computes norms of random values with both, forward and backward. Arguments, result and errors
    are those of ``kernel_choice.choose``. A collective on a GPU.
    """
    return kernel_choice.choose(setting, world, find_fault, "Batch norms")


@functools.cache
def find_fault(device: torch.device) -> str:
    """Compare the fast kernels with torch's batch norm on random values. Not a collective.

    Returns:
        What is wrong, as a clause; empty if nothing is.
    """
    peers = Collectives(0, 1, device)
    norms: tuple[tuple[str, int, _Norm], ...] = (
        ("a grouped norm", _GROUPS, lambda x, w, b: GroupedNorm.apply(x, _GROUPS, w, b, _EPS)),
        ("a grouped norm with a residual", _GROUPS, _fused_norm),
        ("a norm that spans ranks", 1, lambda x, w, b: CudaSpanningNorm.apply(x, w, b, _EPS, peers)),
    )
    return kernel_choice.run_trials(
        Trial(
            f"{name} in {dtype}",
            "that of torch",
            roundings * torch.finfo(dtype).eps,
            functools.partial(_measure_difference, fast_norm, groups, dtype, device),
        )
        for name, groups, fast_norm in norms
        for dtype, roundings in _ROUNDINGS.items()
    )


def _measure_difference(fast_norm: _Norm, groups: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference of outputs, statistics and gradients, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    shape = (groups * 6, 72, 7, 5)  # neither rows nor channels fill the blocks of a kernel
    x, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator).to(device) for _ in range(2))
    results = [
        _results(norm, x.contiguous(memory_format=torch.channels_last), grad, weight, bias)
        for norm in (fast_norm, functools.partial(_plain_norm, groups=groups, fused=fast_norm is _fused_norm))
    ]
    return max(
        float((ours.double().flatten() - theirs.double().flatten()).abs().max() / theirs.double().abs().max())
        for ours, theirs in zip(*results, strict=True)
    )


def _results(norm: _Norm, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y, statistics = norm(*leaves)
    y.backward(grad)  # type: ignore[no-untyped-call]  # torch has no annotation
    return [y.detach(), statistics, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _residual_of(x: Tensor) -> Tensor:
    """16 or -16 by the sign of ``x``: far from -y, so that no rounding decides which values are positive after it."""
    return 16 * torch.where(x > 0, 1, -1).to(x)


def _fused_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    y, statistics = GroupedNorm.apply(x, _GROUPS, weight, bias, _EPS, _residual_of(x), True)
    return y, statistics


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, fused: bool = False) -> tuple[Tensor, Tensor]:
    statistics = torch.zeros(groups, 2, x.shape[1], device=x.device)
    parts = [
        F.batch_norm(part, mean_C, var_C, weight, bias, training=True, momentum=1.0, eps=_EPS)
        for part, (mean_C, var_C) in zip(x.chunk(groups), statistics, strict=True)
    ]
    y = torch.cat(parts)
    return torch.relu(y + _residual_of(x)) if fused else y, statistics
