"""Batch normalization of one group of samples that several ranks hold. Only statistics travel, never activations.

``PlainSpanningNorm`` runs everywhere and defines the results. ``CudaSpanningNorm`` computes the same with kernels of
torch's SyncBatchNorm, which take no CPU tensors: it reads an activation twice forward and twice backward, without
copies in float32.

Letters in shapes: b rows of this rank, C channels, R ranks of the group.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hpcssl.distributed.collectives import Collectives
from hpcssl.nets.kernels.constants import ZeroPool

REDUCED_FROM = 64
"""From this number of ranks in a group, statistics are reduced instead of gathered: what a rank receives then no longer
grows with the group. Smaller groups gather, in half as many collectives and in a fixed order of summation."""

Normalized = tuple[Tensor, Tensor]
"""The normalized rows, and mean and unbiased variance of the group, [2·C]."""


class PlainSpanningNorm(torch.autograd.Function):
    """One group over all ranks of ``peers``, in plain tensor code."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        peers: Collectives,
        zeros: ZeroPool | None = None,
    ) -> Normalized:
        """Normalize rows [b, C, ...]; ``weight`` and ``bias`` are [C] or None. A collective."""
        axes, shape = _reduced_axes(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var_C, mean_C = torch.var_mean(wide, axes, correction=0)
        mean_C, var_C = _combine_moments(mean_C, var_C, peers)
        invstd_C = (var_C + eps).rsqrt()
        scale_C = invstd_C if weight is None else invstd_C * weight
        shift_C = -mean_C * scale_C if bias is None else bias - mean_C * scale_C
        statistics = _as_statistics(mean_C, var_C, peers.size * _count(x))
        ctx.save_for_backward(x, weight, mean_C, invstd_C)
        ctx.peers = peers
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # no zeros for the gradient that the statistics do not get
        return (wide * scale_C.view(shape) + shift_C.view(shape)).to(x.dtype), statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple[Tensor | None, ...]:
        """Gradients for ``x``, ``weight`` and ``bias``. A collective."""
        x, weight, mean_C, invstd_C = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else grad  # the other ranks wait for this one
        axes, shape = _reduced_axes(x)
        wide, grad_wide = x.to(mean_C.dtype), grad.to(mean_C.dtype)
        normal = (wide - mean_C.view(shape)) * invstd_C.view(shape)
        sum_C, dot_C = grad_wide.sum(axes), (grad_wide * normal).sum(axes)
        total_C, total_dot_C = _combine_sums(sum_C, dot_C, ctx.peers)
        count = ctx.peers.size * _count(x)
        mean_grad_C, mean_dot_C = total_C / count, total_dot_C / count
        scale_C = invstd_C if weight is None else invstd_C * weight
        grad_x = (grad_wide - mean_grad_C.view(shape) - normal * mean_dot_C.view(shape)) * scale_C.view(shape)
        # weight and bias keep this rank's sums: DDP averages them over ranks like every other gradient
        return (
            grad_x.to(x.dtype),
            None if weight is None else dot_C.to(weight.dtype),
            None if weight is None else sum_C.to(weight.dtype),
            None,
            None,
            None,
        )


class CudaSpanningNorm(torch.autograd.Function):
    """One group over all ranks of ``peers``, with torch's kernels for CUDA tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        peers: Collectives,
        zeros: ZeroPool | None = None,
    ) -> Normalized:
        """Normalize rows [b, C, ...]; ``weight`` and ``bias`` are [C] or None. A collective."""
        zeros = zeros or ZeroPool(block=0)
        x = _dense(x, x)
        mean_C, invstd_C = torch.batch_norm_stats(x, eps)
        if peers.size < REDUCED_FROM:
            statistics = zeros.take(2 * len(mean_C), mean_C)
            means_RC, invstds_RC = peers.all_gather(torch.stack((mean_C, invstd_C))[None]).unbind(1)
            counts_R = zeros.counts(peers.size, _count(x), mean_C.dtype, x.device)
            # with momentum 1, the kernel writes the group's mean and unbiased variance into the two buffers
            running_C, running_var_C = statistics.chunk(2)
            mean_C, invstd_C = torch.batch_norm_gather_stats_with_counts(
                x, means_RC, invstds_RC, running_C, running_var_C, 1.0, eps, counts_R
            )
        else:
            mean_C, var_C = _combine_moments(mean_C, invstd_C.square().reciprocal() - eps, peers)
            invstd_C = (var_C + eps).rsqrt()
            statistics = _as_statistics(mean_C, var_C, peers.size * _count(x))
        ctx.save_for_backward(x, weight, mean_C, invstd_C)
        ctx.peers, ctx.zeros = peers, zeros
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return torch.batch_norm_elemt(x, weight, bias, mean_C, invstd_C, eps), statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple[Tensor | None, ...]:
        """Gradients for ``x``, ``weight`` and ``bias``. A collective."""
        x, weight, mean_C, invstd_C = ctx.saved_tensors
        grad = torch.zeros_like(x) if grad is None else _dense(grad, x)
        peers, affine = ctx.peers, weight is not None
        sum_C, dot_C, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean_C, invstd_C, weight, True, affine, affine
        )
        total_C, total_dot_C = peers.all_reduce_sum(torch.stack((sum_C, dot_C)), in_place=True).unbind()
        counts_R = ctx.zeros.counts(peers.size, _count(x), torch.int32, x.device)
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean_C, invstd_C, weight, total_C, total_dot_C, counts_R)
        return grad_x, grad_weight if affine else None, grad_bias if affine else None, None, None, None


def _reduced_axes(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    """The axes that statistics reduce, and the shape that broadcasts [C] over ``x``."""
    return [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))


def _count(x: Tensor) -> int:
    """Values per channel."""
    return x.numel() // x.shape[1]


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the one of two layouts, both known to torch's kernels, that ``like`` has or is nearest to."""
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _as_statistics(mean_C: Tensor, var_C: Tensor, count: int) -> Tensor:
    return torch.cat((mean_C, var_C * (count / (count - 1))))


def _combine_moments(mean_C: Tensor, var_C: Tensor, peers: Collectives) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the group from those of its ranks, which hold equally many values (Chan et al. 1979).

    The variance is taken about the mean of the group. The difference of mean square and squared mean would be shorter,
    and wrong where a mean is far from zero.
    """
    if peers.size < REDUCED_FROM:
        means_RC, vars_RC = _gather_pair(mean_C, var_C, peers)
        mean_C = means_RC.mean(0)
        return mean_C, vars_RC.mean(0) + (means_RC - mean_C).square().mean(0)
    common_C = peers.all_reduce_mean(mean_C)
    return common_C, peers.all_reduce_mean(var_C + (mean_C - common_C).square())


def _combine_sums(first_C: Tensor, second_C: Tensor, peers: Collectives) -> tuple[Tensor, Tensor]:
    """The sums of two values of each rank over the group, in one collective."""
    if peers.size < REDUCED_FROM:
        firsts_RC, seconds_RC = _gather_pair(first_C, second_C, peers)
        return firsts_RC.sum(0), seconds_RC.sum(0)
    return cast(tuple[Tensor, Tensor], peers.all_reduce_sum(torch.stack((first_C, second_C)), in_place=True).unbind(0))


def _gather_pair(first_C: Tensor, second_C: Tensor, peers: Collectives) -> tuple[Tensor, ...]:
    """Two values [C] of every rank as two tensors [R, C], in rank order."""
    return peers.all_gather(torch.stack((first_C, second_C))[None]).unbind(1)
