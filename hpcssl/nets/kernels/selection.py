"""Whether batch norms use the kernels that only a GPU has, which are tried against plain ones before a training."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hpcssl.distributed import kernel_choice
from hpcssl.distributed.collectives import Collectives
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

    On a GPU, each rank computes norms of random values with both, forward and backward. A collective there.

    Args:
        setting: One of ``kernel_choice.SETTINGS``.
        world: The processes that train together.

    Returns:
        False for ``plain`` and on a CPU. With ``auto`` also where a kernel fails or is wrong on some rank, after a
        warning with the reason.

    Raises:
        ConfigError: For ``fast``, where the kernels cannot be used.
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
        ("grouped norms", _GROUPS, lambda x, w, b: GroupedNorm.apply(x, _GROUPS, w, b, _EPS)),
        ("grouped norms with a residual", _GROUPS, _fused_norm),
        ("norms that span ranks", 1, lambda x, w, b: CudaSpanningNorm.apply(x, w, b, _EPS, peers)),
    )
    for name, groups, fast_norm in norms:
        for dtype, roundings in _ROUNDINGS.items():
            try:
                with _disable_current_modes(), torch.enable_grad():  # whoever counts operations does not mean these
                    difference = _measure_difference(fast_norm, groups, dtype, device)
            except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises, the plain kernels remain
                return kernel_choice.explain_failure(f"{name} in {dtype}", error)
            if not difference <= roundings * torch.finfo(dtype).eps:
                return f"{name} in {dtype} differ from torch's by {difference:.2g}"
    return ""


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
