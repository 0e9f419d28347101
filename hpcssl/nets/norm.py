"""Batch normalization over groups of the global batch: one class, three scopes.

A *group* is a run of consecutive samples of the global batch that share their statistics. The scope of a recipe
(``model.norm``) sets its size:

* ``sync``: the global batch is one group (known as SyncBN).
* ``local``: one group per rank.
* ``ghost``: groups of a given size. This reproduces a paper's "64 images per GPU" on any number of GPUs.

A group that is larger than a rank's rows spans ranks. Its statistics are combined through ``World``, because torch's
SyncBatchNorm refuses CPU tensors.

The running statistics are equal on all ranks. Each step's group means and variances wait in ``pending`` until all ranks
agree to take the step. ``commit_pending`` then averages them over groups and ranks in one small reduction, or takes
those of the first group of the batch, which is what DataParallel and DistributedDataParallel keep: the statistics of
their first GPU. So every rank holds the same bits, and a step that is skipped leaves no trace.

Letters in shapes: b rows of this rank, C channels, R ranks of a group, V views of a step, W ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.distributed.world import World
from hpcssl.optim.masked import unchanged_unless

SCOPES = ("local", "sync", "ghost")
"""Values of the recipe key ``model.norm``."""
RUNNING = ("all_groups", "first_group")
"""Values of the recipe key ``model.norm_running``."""


def resolve_group_size(scope: str, *, global_batch: int, world_size: int, ghost: int) -> int:
    """Compute the group size of a scope. It enters the recipe's fingerprint, because it changes results.

    Args:
        scope: One of ``SCOPES``.
        global_batch: Rows of all ranks in one forward pass.
        world_size: Number of ranks.
        ghost: Group size of the scope ``ghost``.

    Returns:
        Samples per group.
    """
    return {"sync": global_batch, "local": global_batch // world_size, "ghost": ghost}[scope]


def explain_invalid_group(group: int, *, global_batch: int, world_size: int) -> str | None:
    """Check a group size: groups must tile the global batch, and either divide a rank's rows or span whole ranks.

    Args:
        group: Samples per group.
        global_batch: Rows of all ranks in one forward pass.
        world_size: Number of ranks.

    Returns:
        Why the group size is impossible, as a clause for an error message; None if it is possible.
    """
    rows = global_batch // world_size
    if group >= 2 and global_batch % group == 0 and (rows % group == 0 or group % rows == 0):
        return None
    return (
        f"norm groups of {group} samples, which do not tile a batch of {global_batch}, or neither divide a process's "
        f"{rows} samples nor span whole processes"
    )


class BatchNorm(nn.Module):
    """Batch normalization whose statistics are those of groups of the global batch.

    In training, each channel of a group is normalized with the group's own mean and biased variance, as in
    ``torch.nn.BatchNorm2d`` (Ioffe & Szegedy 2015)::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In evaluation mode, the running statistics are used instead, and rows do not depend on each other. A forward pass in
    training does not change the running statistics. It appends to ``pending``, and ``commit_pending`` or
    ``discard_pending`` must be called once per step.

    Parameters and buffers have the names of ``nn.BatchNorm2d``, so that exported weights load anywhere.

    Args:
        channels: C, the number of channels.
        group: Samples of the global batch per group, 2 or more. Must pass ``explain_invalid_group``.
        world: The processes that train together.
        eps: Added to the variance before the square root.
        momentum: Weight of a step's statistics in the running ones, as in torch: 0.1 keeps 90 % of the old value.
        affine: Whether there are a trainable ``weight`` (1 at first) and ``bias`` (0 at first).
        running: Whose statistics enter the running ones: the mean over ``all_groups``, or those of the ``first_group``.

    Attributes:
        running_mean: float [C], 0 at first.
        running_var: float [C], the unbiased variance, 1 at first.
        micro_batches: Forward passes that make up one batch of a step (gradient accumulation).
        rows_per_sample: Consecutive rows of each sample in a forward pass: more than 1 where several views pass
            together and share their statistics.
        pending: [2, C] per forward pass since the last commit: mean and unbiased variance, averaged over this rank's
            groups, or those of its first group.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        *,
        group: int,
        world: World,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        running: str = "all_groups",
    ):
        super().__init__()
        self.channels, self.group, self.world, self.eps, self.momentum = channels, group, world, eps, momentum
        self.running = running
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.micro_batches = 1
        self.rows_per_sample = 1
        self.pending: list[Tensor] = []

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"{self.channels}, group={self.group}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize this rank's rows of a batch. In training, a collective where groups span ranks.

        Args:
            x: [b, C] or [b, C, H, W], consecutive rows of the global batch (of a micro-batch under accumulation). b is
                the same on all ranks.

        Returns:
            A tensor of the shape and type of ``x``.

        Raises:
            ValueError: If a group has a single value per channel, which has no variance (from torch).
        """
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        group = self.group * self.rows_per_sample
        if group > len(x):
            return self._spanning(x, group)
        parts, statistics = zip(*(self._one_group(part) for part in torch.split(x, group)), strict=True)
        self.pending.append(statistics[0] if self.running == "first_group" else torch.stack(statistics).mean(0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _one_group(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # with momentum 1, torch writes this group's mean and unbiased variance into the two buffers
        statistics_2C = torch.zeros(2, self.channels, dtype=self.running_mean.dtype, device=x.device)
        mean_C, var_C = statistics_2C
        y = F.batch_norm(x, mean_C, var_C, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        return y, statistics_2C

    def _spanning(self, x: Tensor, group: int) -> Tensor:
        y: Tensor
        y, mean_C, var_C = _SpanningNorm.apply(x, self.weight, self.bias, self.eps, group // len(x), self.world)
        count = group * (x.numel() // x.shape[0] // x.shape[1])
        self.pending.append(torch.stack((mean_C, var_C * (count / (count - 1)))).to(self.running_mean.dtype))
        return y


class _SpanningNorm(torch.autograd.Function):
    """One group over ``span`` neighboring ranks. Statistics are combined in rank order (Chan et al. 1979)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, span: int, world: World
    ) -> tuple[Tensor, Tensor, Tensor]:
        axes, shape = _reduced_axes(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var_C, mean_C = torch.var_mean(wide, axes, correction=0)
        means_RC, vars_RC = _gather_group(torch.stack((mean_C, var_C)), span, world)
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
    def backward(ctx: Any, grad: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean_C, invstd_C = ctx.saved_tensors
        axes, shape = _reduced_axes(x)
        wide, grad_wide = x.to(mean_C.dtype), grad.to(mean_C.dtype)
        normal = (wide - mean_C.view(shape)) * invstd_C.view(shape)
        sum_C, dot_C = grad_wide.sum(axes), (grad_wide * normal).sum(axes)
        sums_RC, dots_RC = _gather_group(torch.stack((sum_C, dot_C)), ctx.span, ctx.world)
        count = ctx.span * (x.numel() // x.shape[1])
        mean_grad_C, mean_dot_C = sums_RC.sum(0) / count, dots_RC.sum(0) / count
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


def _reduced_axes(x: Tensor) -> tuple[list[int], tuple[int, ...]]:
    """The axes that statistics reduce, and the shape that broadcasts [C] over ``x``."""
    return [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))


def _gather_group(pair_2C: Tensor, span: int, world: World) -> Tensor:
    """Gather [2, C] of every rank of this rank's group as [2, R, C], in rank order."""
    all_W2C = world.all_gather(pair_2C[None])
    first = world.rank // span * span
    return all_W2C[first : first + span].transpose(0, 1)


def find_norms(networks: Iterable[nn.Module]) -> list[BatchNorm]:
    """List all ``BatchNorm`` layers of the networks, in the order of their modules."""
    return [m for network in networks for m in network.modules() if isinstance(m, BatchNorm)]


def discard_pending(norms: list[BatchNorm]) -> None:
    """Drop the statistics of a step that was not taken."""
    for norm in norms:
        norm.pending.clear()


@torch.no_grad()
def commit_pending(norms: list[BatchNorm], world: World, taken: Tensor | None = None) -> None:
    """Fold the pending statistics into the running ones, with the same bits on every rank. A collective.

    Each view counts as one update, as its forward pass would in torch. The micro-batches of a view are averaged first;
    for the first group, only the first micro-batch counts.

    Args:
        norms: Layers with equal ``momentum`` and ``running``; those without pending statistics are left alone. Must be
            the same layers on all ranks.
        world: The processes that train together.
        taken: bool [] on the device; where it is false, the running statistics stay as they are. None means True.
    """
    norms = [norm for norm in norms if norm.pending]
    if not norms:
        return
    batches = [torch.unflatten(torch.stack(norm.pending), 0, (norm.micro_batches, -1)) for norm in norms]
    if norms[0].running == "first_group":
        local = [statistics[0] if world.rank == 0 else torch.zeros_like(statistics[0]) for statistics in batches]
        flat = world.all_reduce_sum(torch.cat([statistics_V2C.flatten() for statistics_V2C in local]))
    else:
        local = [statistics.mean(0) for statistics in batches]
        flat = world.all_reduce_mean(torch.cat([statistics_V2C.flatten() for statistics_V2C in local]))
    chunks = torch.split(flat, [statistics_V2C.numel() for statistics_V2C in local])
    means = [chunk.view_as(statistics_V2C) for chunk, statistics_V2C in zip(chunks, local, strict=True)]
    with unchanged_unless(taken, [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]):
        for view in range(max(map(len, means))):
            updates = [
                (norm, *means_V2C[view]) for norm, means_V2C in zip(norms, means, strict=True) if view < len(means_V2C)
            ]
            running = [norm.running_mean for norm, _, _ in updates] + [norm.running_var for norm, _, _ in updates]
            torch._foreach_lerp_(running, [m for _, m, _ in updates] + [v for _, _, v in updates], norms[0].momentum)
    discard_pending(norms)
