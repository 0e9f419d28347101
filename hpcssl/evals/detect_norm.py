"""SyncBN for detection: one batch of the whole world, however many regions each rank holds.

``nets/norm.py`` asks for equal parts; the regions of a detection head are not. Every rank's mean and variance are
weighted by its count and combined in rank order (Chan et al. 1979), forward and backward, on CPU and GPU alike
(torch's SyncBatchNorm refuses CPU tensors). Letters in shapes: n images or regions of this rank, C channels, W ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.world import World


class SyncNorm(nn.Module):
    """Batch norm of [n, C, H, W] over all ranks, n differing between them. Names are nn.BatchNorm2d's.

    Running statistics move in ``forward``, by the same bits on every rank, as no step is ever taken back here.
    """

    def __init__(self, channels: int, *, world: World, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.channels, self.world, self.eps, self.momentum = channels, world, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.world.size == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                                self.momentum, self.eps)
        y, mean_C, var_C, count = _Spread.apply(x, self.weight, self.bias, self.eps, self.world)
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * (count / (count - 1)), self.momentum)
        return y


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, world):
        var_C, mean_C = torch.var_mean(x, (0, 2, 3), correction=0)
        counts_W = world.gather(x.new_full((1,), x.numel() // x.shape[1]))
        share_W1 = (counts_W / counts_W.sum())[:, None]
        means_WC, vars_WC = world.gather(torch.stack((mean_C, var_C))[None]).unbind(1)
        means_WC, vars_WC = means_WC.nan_to_num(), vars_WC.nan_to_num()  # a rank without a region has neither
        mean_C = (share_W1 * means_WC).sum(0)
        var_C = (share_W1 * (vars_WC + (means_WC - mean_C).square())).sum(0)
        invstd_C = (var_C + eps).rsqrt()
        normal = (x - _wide(mean_C)) * _wide(invstd_C)
        ctx.save_for_backward(normal, weight, invstd_C)
        ctx.count, ctx.world = counts_W.sum(), world
        ctx.mark_non_differentiable(mean_C, var_C, ctx.count)
        return normal * _wide(weight) + _wide(bias), mean_C, var_C, ctx.count

    @staticmethod
    def backward(ctx, grad, *_):
        normal, weight, invstd_C = ctx.saved_tensors
        sum_C, dot_C = grad.sum((0, 2, 3)), (grad * normal).sum((0, 2, 3))
        mean_grad_C, mean_dot_C = (ctx.world.sum(torch.stack((sum_C, dot_C))) / ctx.count).unbind(0)
        grad_x = (grad - _wide(mean_grad_C) - normal * _wide(mean_dot_C)) * _wide(invstd_C * weight)
        # weight and bias keep this rank's sums: DDP averages them over ranks like every other gradient
        return grad_x, dot_C, sum_C, None, None


def _wide(value_C: Tensor) -> Tensor:
    return value_C[:, None, None]


@torch.no_grad()
def averaging(network: nn.Module, seen: int) -> None:
    """Let the next forward pass, the one after ``seen`` others, make the running statistics the mean over them all.

    Precise BN (Wu and Johnson 2021, §3): the statistics of many batches under the final weights.
    """
    for part in network.modules():
        if isinstance(part, SyncNorm):
            part.momentum = 1 / (seen + 1)
