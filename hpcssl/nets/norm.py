"""Batch normalization over groups of the global batch: one class, three scopes.

A *group* is a run of consecutive samples of the global batch that share their statistics. The scope of a recipe
(``model.norm``) sets its size:

* ``sync``: the global batch is one group (known as SyncBN).
* ``local``: one group per rank.
* ``ghost``: groups of a given size. This reproduces a paper's "64 images per GPU" on any number of GPUs.

A group that is larger than a rank's rows spans ranks, which exchange statistics among themselves alone. No activation
is sent. The arithmetic is in ``kernels``: plain code, which runs everywhere and defines the results, and kernels that
only a GPU has.

The running statistics are equal on all ranks. Each step's group means and variances wait in ``pending`` until all ranks
agree to take the step. ``commit_pending`` then averages them over groups and ranks in one small reduction, or takes
those of the first group of the batch, which is what DataParallel and DistributedDataParallel keep: the statistics of
their first GPU. So every rank holds the same bits, and a step that is skipped leaves no trace.

Letters in shapes: b rows of this rank, C channels, R ranks of a group, V views of a step, W ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.distributed.world import World
from hpcssl.nets.kernels import grouped
from hpcssl.nets.kernels.constants import ZeroPool
from hpcssl.nets.kernels.grouped import GroupedNorm
from hpcssl.nets.kernels.spanning import CudaSpanningNorm, PlainSpanningNorm
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
        fast: Whether CUDA tensors are normalized by the kernels that ``kernels.selection`` has tried. The same on all
            ranks.
        zeros: Shared by the norms of a network; None if this norm fills its own.

    Attributes:
        running_mean: float [C], 0 at first.
        running_var: float [C], the unbiased variance, 1 at first.
        micro_batches: Forward passes that make up one batch of a step (gradient accumulation).
        rows_per_sample: Consecutive rows of each sample in a forward pass: more than 1 where several views pass
            together and share their statistics.
        pending: Per forward pass since the last commit, means and unbiased variances of this rank's groups: [2·C], if
            they are averaged already or only those of the first group count, or [G, 2·C].
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
        fast: bool = False,
        zeros: ZeroPool | None = None,
    ):
        super().__init__()
        self.channels, self.group, self.world, self.eps, self.momentum = channels, group, world, eps, momentum
        self.running, self.fast, self.zeros = running, fast, zeros or ZeroPool(block=0)
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

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalize this rank's rows of a batch. In training, a collective where groups span ranks.

        A residual and the ReLU after it are part of the kernels where those are fast and groups lie within the rank.
        Elsewhere they are operations of their own.

        Args:
            x: [b, C] or [b, C, H, W], consecutive rows of the global batch (of a micro-batch under accumulation). b is
                the same on all ranks.
            residual: Added to the normalized rows, of their shape and type. Only with ``relu``.
            relu: Whether negative results become 0.

        Returns:
            A tensor of the shape and type of ``x``.

        Raises:
            ValueError: If a group has a single value per channel, which has no variance (from torch).
        """
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return _activate(y, residual, relu)
        group = self.group * self.rows_per_sample
        is_fast = self.fast and x.device.type == "cuda" and len(x) % group == 0 and grouped.takes(x)
        if group > len(x):
            y, statistics = self._spanning(x, group)
        elif is_fast and (relu or group < len(x)):
            residual = None if residual is None else grouped.like(x, residual)
            y, statistics = GroupedNorm.apply(x, len(x) // group, self.weight, self.bias, self.eps, residual, relu)
            residual, relu = None, False
        elif group == len(x):
            y, statistics = self._one_group(x)
        else:
            y, statistics = self._several_groups(x, group)
        if statistics.dim() == 2 and (len(statistics) == 1 or self.running == "first_group"):
            statistics = statistics[0]
        self.pending.append(statistics)
        return _activate(y, residual, relu)

    def _one_group(self, x: Tensor, statistics: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalize all of ``x`` with its own statistics, which go to ``statistics``, zeros [2·C]."""
        if statistics is None:
            statistics = self.zeros.take(2 * self.channels, self.running_mean)
        # with momentum 1, torch writes the group's mean and unbiased variance into the two buffers
        mean_C, var_C = statistics.chunk(2)
        y = F.batch_norm(x, mean_C, var_C, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        return y, statistics

    def _several_groups(self, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
        groups = -(-len(x) // group)  # outside of training steps, the last one may be smaller
        statistics = torch.zeros(groups, 2 * self.channels, dtype=self.running_mean.dtype, device=x.device)
        parts = zip(torch.split(x, group), statistics.unbind(), strict=True)
        y = torch.cat([self._one_group(part, of_part)[0] for part, of_part in parts])
        return y, statistics if self.running == "first_group" else statistics.mean(0)

    def _spanning(self, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
        peers = self.world.neighbors(group // len(x))
        norm = CudaSpanningNorm if self.fast and x.device.type == "cuda" else PlainSpanningNorm
        y, statistics = norm.apply(x, self.weight, self.bias, self.eps, peers, self.zeros)
        return y, statistics.to(self.running_mean.dtype)


def _activate(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add a residual and make the ReLU, in place."""
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


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
    local = [statistics for norm in norms for statistics in _average_micro_batches(norm)]
    flat = _average_groups(local)  # by norm, then by view: [2·C] each
    if norms[0].running == "all_groups":
        flat = world.all_reduce_mean(flat)
    else:
        flat = world.all_reduce_sum(flat if world.rank == 0 else torch.zeros_like(flat))
    halves = iter(torch.split(flat, [statistics.shape[-1] // 2 for statistics in local for _ in range(2)]))
    updates = [[(next(halves), next(halves)) for _ in norm.pending[:: norm.micro_batches]] for norm in norms]
    with unchanged_unless(taken, [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]):
        for view in range(max(map(len, updates))):
            seen = [(norm, *of_norm[view]) for norm, of_norm in zip(norms, updates, strict=True) if view < len(of_norm)]
            running = [norm.running_mean for norm, _, _ in seen] + [norm.running_var for norm, _, _ in seen]
            torch._foreach_lerp_(running, [m for _, m, _ in seen] + [v for _, _, v in seen], norms[0].momentum)
    discard_pending(norms)


def _average_micro_batches(norm: BatchNorm) -> list[Tensor]:
    """A layer's pending statistics by view: averaged over micro-batches, or those of the first one."""
    views = len(norm.pending) // norm.micro_batches
    if norm.micro_batches == 1 or norm.running == "first_group":
        return norm.pending[:views]
    return list(torch.unflatten(torch.stack(norm.pending), 0, (norm.micro_batches, views)).mean(0))


def _average_groups(statistics: list[Tensor]) -> Tensor:
    """Join [2·C] and [G, 2·C] of several layers and views, averaged over groups: in one pass if all have as many."""
    if all(s.dim() == 2 and len(s) == len(statistics[0]) for s in statistics):
        return torch.cat(statistics, 1).mean(0)
    return torch.cat([s.mean(0) if s.dim() == 2 else s for s in statistics])
