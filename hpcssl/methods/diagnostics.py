"""Scalars that show whether a run is healthy. They do not affect the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcssl.memory.bank import Neighbors
from hpcssl.methods.base import StepContext


@torch.no_grad()
def record_purity(neighbors: Neighbors, ctx: StepContext, *, with_self: bool = False) -> None:
    """Log ``purity``: the share of neighbors that have the query's label, not counting the query itself.

    Labels are only compared here, never trained on. Queries and neighbors without a label do not count. On data without
    labels nothing is logged.

    Args:
        neighbors: The neighbors of each query.
        ctx: The step.
        with_self: Whether to log ``purity_with_self`` as well, which is the purity of the official code of MSF and
            CMSF: the query itself is one of the k neighbors and counts, and so do neighbors without a label.
    """
    if not ctx.has_labels:
        return
    label_BK = ctx.bank.get("label", neighbors.slot)
    index_BK = ctx.bank.get("index", neighbors.slot)
    counts_BK = neighbors.valid & (label_BK >= 0) & (ctx.label_B >= 0)[:, None] & (index_BK != ctx.index_B[:, None])
    same_BK = counts_BK & (label_BK == ctx.label_B[:, None])
    ctx.metrics["purity"] = same_BK.sum() / counts_BK.sum().clamp(min=1)
    if with_self:
        ctx.metrics["purity_with_self"] = (neighbors.valid & (label_BK == ctx.label_B[:, None])).double().mean()


@torch.no_grad()
def spread(z_BD: Tensor) -> Tensor:
    """Return how evenly unit vectors are spread: 1 for evenly over the sphere, 0 for a collapsed network.

    It is the mean over dimensions of their standard deviation, times √D (as in SimSiam, section 4.1).
    """
    return z_BD.std(0).mean().mul(z_BD.shape[1] ** 0.5)
