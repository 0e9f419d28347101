"""Batch normalisation over groups of the global batch: one class, three scopes.

A *group* is a run of consecutive samples of the global batch that share their statistics. ``whole`` makes the
global batch one group (SyncBN), ``local`` one group per rank, ``ghost`` groups of a stated size, which is how a
paper's "64 images per GPU" is reproduced on any number of GPUs. Where a group is larger than a rank's part it spans
ranks, through ``World``: torch's SyncBatchNorm refuses CPU tensors.

Running statistics are state of the world: each step's group means and variances wait in ``pending`` until the step
is agreed to be good, and are then averaged over groups and ranks in one small reduction (``commit``). So every rank
holds the same bits, and a step that is skipped leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.world import World

SCOPES = ("local", "whole", "ghost")


def group_size(scope: str, *, global_batch: int, world_size: int, ghost: int) -> int:
    """Samples per group that a scope means for this world; what ``model.norm`` contributes to the fingerprint."""
    return {"whole": global_batch, "local": global_batch // world_size, "ghost": ghost}[scope]


def why_not(group: int, *, global_batch: int, world_size: int) -> str | None:
    """Why groups of this size cannot be, or None: they must tile the global batch, and split a rank's part or span
    whole ranks."""
    part = global_batch // world_size
    if group >= 2 and global_batch % group == 0 and (part % group == 0 or group % part == 0):
        return None
    return (f"norm groups of {group} samples, which do not tile a batch of {global_batch} or neither split a process's "
            f"{part} nor span whole processes")


class BatchNorm(nn.Module):
    """Batch norm of [b, C] or [b, C, H, W] over groups of ``group`` samples of the global batch [W·b].

    Parameters and buffers carry nn.BatchNorm2d's names, so that exported weights load anywhere.
    """

    def __init__(self, channels: int, *, group: int, world: World, eps: float = 1e-5, momentum: float = 0.1,
                 affine: bool = True):
        super().__init__()
        self.channels, self.group, self.world, self.eps, self.momentum = channels, group, world, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.micro_batches = 1  # forward passes that make up one batch of the step (accumulation)
        self.views = 1  # rows of each sample that stand together in a forward pass, and share its statistics
        self.pending: list[Tensor] = []  # [2, C] mean and unbiased variance of each forward pass, over its groups

    def extra_repr(self) -> str:
        return f"{self.channels}, group={self.group}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        group = self.group * self.views
        if group > len(x):
            return self._spanning(x, group)
        parts, statistics = zip(*(self._one_group(part) for part in x.split(group)), strict=True)
        self.pending.append(torch.stack(statistics).mean(0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _one_group(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # torch writes this group's mean and unbiased variance into the two buffers when its momentum is 1
        found_2C = torch.zeros(2, self.channels, dtype=self.running_mean.dtype, device=x.device)
        y = F.batch_norm(x, *found_2C, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        return y, found_2C

    def _spanning(self, x: Tensor, group: int) -> Tensor:
        y, mean_C, var_C = _SpanningNorm.apply(x, self.weight, self.bias, self.eps, group // len(x), self.world)
        count = group * (x.numel() // x.shape[0] // x.shape[1])
        self.pending.append(torch.stack((mean_C, var_C * (count / (count - 1)))).to(self.running_mean.dtype))
        return y


class _SpanningNorm(torch.autograd.Function):
    """One group over ``span`` neighbouring ranks. Statistics are combined in rank order (Chan et al. 1979)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, span, world):
        axes, shape = _axes(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var_C, mean_C = torch.var_mean(wide, axes, correction=0)
        means_RC, vars_RC = _of_group(torch.stack((mean_C, var_C)), span, world)
        mean_C = means_RC.mean(0)
        var_C = vars_RC.mean(0) + (means_RC - mean_C).square().mean(0)
        invstd_C = (var_C + eps).rsqrt()
        scale_C = invstd_C if weight is None else invstd_C * weight
        shift_C = -mean_C * scale_C if bias is None else bias - mean_C * scale_C
        ctx.save_for_backward(x, weight, mean_C, invstd_C)
        ctx.span, ctx.world = span, world
        ctx.mark_non_differentiable(mean_C, var_C)
        return (wide * scale_C.view(shape) + shift_C.view(shape)).to(x.dtype), mean_C, var_C

    @staticmethod
    def backward(ctx, grad, _mean, _var):
        x, weight, mean_C, invstd_C = ctx.saved_tensors
        axes, shape = _axes(x)
        wide, grad_wide = x.to(mean_C.dtype), grad.to(mean_C.dtype)
        normal = (wide - mean_C.view(shape)) * invstd_C.view(shape)
        sum_C, dot_C = grad_wide.sum(axes), (grad_wide * normal).sum(axes)
        sums_RC, dots_RC = _of_group(torch.stack((sum_C, dot_C)), ctx.span, ctx.world)
        count = ctx.span * (x.numel() // x.shape[1])
        mean_grad_C, mean_dot_C = sums_RC.sum(0) / count, dots_RC.sum(0) / count
        scale_C = invstd_C if weight is None else invstd_C * weight
        grad_x = (grad_wide - mean_grad_C.view(shape) - normal * mean_dot_C.view(shape)) * scale_C.view(shape)
        # weight and bias keep this rank's sums: DDP averages them over ranks like every other gradient
        return (grad_x.to(x.dtype), None if weight is None else dot_C.to(weight.dtype),
                None if weight is None else sum_C.to(weight.dtype), None, None, None)


def _axes(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    return [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))


def _of_group(pair_2C: Tensor, span: int, world: World) -> Tensor:
    """[2, R, C]: the pair of every rank of this rank's group, in rank order."""
    every_W2C = world.gather(pair_2C[None])
    first = world.rank // span * span
    return every_W2C[first:first + span].transpose(0, 1)


def norms_of(networks: Iterable[nn.Module]) -> list[BatchNorm]:
    """All of our norms in the networks, in a fixed order."""
    return [m for network in networks for m in network.modules() if isinstance(m, BatchNorm)]


def discard(norms: list[BatchNorm]) -> None:
    """Forget the statistics of a step that was not taken."""
    for norm in norms:
        norm.pending.clear()


@torch.no_grad()
def commit(norms: list[BatchNorm], world: World) -> None:
    """Move the pending statistics into the running ones: one flat reduction, the same bits on every rank.

    Each view counts as one update, as its forward pass would in torch; its micro-batches are averaged first.
    """
    norms = [norm for norm in norms if norm.pending]
    if not norms:
        return
    waiting = [torch.stack(norm.pending).unflatten(0, (norm.micro_batches, -1)).mean(0) for norm in norms]
    flat = world.mean(torch.cat([found_V2C.flatten() for found_V2C in waiting]))
    means = [part.view_as(found) for part, found in zip(flat.split([f.numel() for f in waiting]), waiting, strict=True)]
    for view in range(max(map(len, means))):
        seen = [(norm, *means_V2C[view]) for norm, means_V2C in zip(norms, means, strict=True) if view < len(means_V2C)]
        running = [norm.running_mean for norm, _, _ in seen] + [norm.running_var for norm, _, _ in seen]
        torch._foreach_lerp_(running, [m for _, m, _ in seen] + [v for _, _, v in seen], norms[0].momentum)
    discard(norms)
