"""Numbers that say whether a run is healthy, at no cost to the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcssl.memory.bank import Hits
from hpcssl.methods.base import Context


@torch.no_grad()
def purity(hits: Hits, ctx: Context) -> None:
    """Note the share of neighbours that carry the query's label, the query itself left out.

    Labels are only watched, never trained on. Queries without a label, and neighbours without one, do not count.
    """
    if not ctx.watch_labels:
        return
    label_BK = ctx.bank.get("label", hits.slot)
    index_BK = ctx.bank.get("index", hits.slot)
    counts_BK = hits.valid & (label_BK >= 0) & (ctx.label_B >= 0)[:, None] & (index_BK != ctx.index_B[:, None])
    same_BK = counts_BK & (label_BK == ctx.label_B[:, None])
    ctx.notes["purity"] = same_BK.sum() / counts_BK.sum().clamp(min=1)


@torch.no_grad()
def spread(z_BD: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit rows, times √D: 1 for evenly spread, 0 for collapsed."""
    return z_BD.std(0).mean() * z_BD.shape[1] ** 0.5
