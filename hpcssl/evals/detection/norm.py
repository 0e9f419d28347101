"""Batch norm over all ranks for detection, where ranks hold different numbers of regions.

``nets/norm.py`` needs equal parts on all ranks; the regions of a detection head are not. Here the mean and variance of
every rank are weighted by its count and combined in rank order (Chan et al. 1979), forward and backward, on CPU and GPU
alike (torch's SyncBatchNorm does not take CPU tensors).

Shapes: n images or regions of this rank, C channels, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.distributed.world import World


class SyncNorm(nn.Module):
    """Batch norm of [n, C, H, W] over all ranks, with n different on each rank.

    Parameters and buffers have the names of ``nn.BatchNorm2d``. The running statistics are updated in ``forward``, to
    the same bits on every rank: this training never discards a step.

    Args:
        channels: Number of channels, C.
        world: The processes that train together.
        eps: Added to the variance.
        momentum: Weight of the new statistics in the running ones.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, world: World, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels, self.world, self.eps, self.momentum = channels, world, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def extra_repr(self) -> str:
        """Arguments in the printed network."""
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [n, C, H, W]. A collective in training mode."""
        if not self.training or self.world.size == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        y, mean_C, var_C, count = _WeightedSyncNorm.apply(x, self.weight, self.bias, self.eps, self.world)
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * (count / (count - 1)), self.momentum)
        normalized: Tensor = y
        return normalized


class _WeightedSyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        var_C, mean_C = torch.var_mean(x, (0, 2, 3), correction=0)
        counts_W = world.all_gather(x.new_full((1,), x.numel() // x.shape[1]))
        share_W1 = (counts_W / counts_W.sum())[:, None]
        means_WC, vars_WC = world.all_gather(torch.stack((mean_C, var_C))[None]).unbind(1)
        means_WC, vars_WC = means_WC.nan_to_num(), vars_WC.nan_to_num()  # NaN on a rank without a region
        mean_C = (share_W1 * means_WC).sum(0)
        var_C = (share_W1 * (vars_WC + (means_WC - mean_C).square())).sum(0)
        invstd_C = (var_C + eps).rsqrt()
        normal = (x - _as_map(mean_C)) * _as_map(invstd_C)
        ctx.save_for_backward(normal, weight, invstd_C)
        ctx.count, ctx.world = counts_W.sum(), world
        ctx.mark_non_differentiable(mean_C, var_C, ctx.count)
        return normal * _as_map(weight) + _as_map(bias), mean_C, var_C, ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        normal, weight, invstd_C = ctx.saved_tensors
        sum_C, dot_C = grad.sum((0, 2, 3)), (grad * normal).sum((0, 2, 3))
        mean_grad_C, mean_dot_C = (ctx.world.all_reduce_sum(torch.stack((sum_C, dot_C))) / ctx.count).unbind(0)
        grad_x = (grad - _as_map(mean_grad_C) - normal * _as_map(mean_dot_C)) * _as_map(invstd_C * weight)
        # weight and bias keep this rank's sums: DDP averages them over ranks like every other gradient
        return grad_x, dot_C, sum_C, None, None


def _as_map(value_C: Tensor) -> Tensor:
    return value_C[:, None, None]


@torch.no_grad()
def accumulate_statistics(network: nn.Module, passes: int) -> None:
    """Make the next forward pass average its statistics with those of the ``passes`` forward passes before it.

    Precise BN (Wu and Johnson 2021, section 3): the running statistics become the mean over many batches under the
    final weights.

    Args:
        network: Its ``SyncNorm`` layers are changed.
        passes: Forward passes that are already averaged.
    """
    for module in network.modules():
        if isinstance(module, SyncNorm):
            module.momentum = 1 / (passes + 1)
