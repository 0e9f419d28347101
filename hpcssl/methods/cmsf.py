"""Constrained Mean Shift Using Distant Yet Related Neighbors for Representation Learning (CMSF),
Navaneet, Koohpayegani, Tejankar, Pourahmadi, Subramanya, Pirsiavash. ECCV 2022.

    L = ½ · 1/k · Σ_{j ∈ NN_k(u, C)} dist(v, z_j)  +  ½ · 1/k · Σ_{j ∈ NN_k(u, M)} dist(v, z_j),    C ⊂ M
    dist(a, b) = ‖a − b‖²;    with labels or guessed ones the first sum alone, without the ½

    paper    here          meaning
    v, u     query.u, target.z   prediction of the online network; embedding of the target network, pushed to M first
    M        ctx.bank      the last N target embeddings, first in, first out
    C        options.rule  what of M may be a neighbour:
               twin (2Q)     the k' rows whose images' embeddings of the epoch before are nearest to u's own
               kmeans (KM)   images of u's cluster; the clusters are found anew after each epoch
               label (sup)   images of u's class, noisy or not
               pseudo (semi) the same, where the class is known or guessed with confidence (``pseudo.py``)
               modality      the k' rows whose other modality is nearest to u's own other one (``modalities.py``)
    M'       bank "twin"   each row's embedding of the epoch before (another augmentation), kept when it was pushed

Where C is not known (the first epoch, an image not met before, no label) it is M: the official script searches noise
there. It also fills up fewer than k allowed rows with forbidden ones at an equal "distance 5"; here the mean is over
the allowed ones, of which u is always one, unless ``legacy_fill`` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.memory.bank import Hits
from hpcssl.memory.groups import Near
from hpcssl.memory.rows import Memory
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Context, Emb, Heads, Scene
from hpcssl.methods.constraints import CmsfOptions
from hpcssl.methods.diagnostics import purity
from hpcssl.views.plan import ViewOptions, one_way, side_by_side


@dataclass(frozen=True)
class Aim:
    """Neighbours in M and in C."""

    free: Hits
    near: Near


class Cmsf:
    """Plan: query → target, one way. Target: moving average. Bank: fed before the lookup. Memories: the rule's."""

    target, heads, in_batch = "ema", Heads(predictor="mlp"), False

    def __init__(self, options: CmsfOptions, views: ViewOptions):
        self.options, self.plan, self.rule = options, one_way(*views.pair()), options.made()
        if options.rule == "modality":
            self.plan = side_by_side(self.plan, one_way(*views.pair(second=True)))
        self.bank = BankSpec(push="before", views=(1,), vectors=self.rule.vectors, numbers=self.rule.numbers)

    def memories(self, scene: Scene) -> dict[str, Memory]:
        return self.rule.memories(scene)

    def refresh(self, ctx: Context) -> None:
        self.rule.refresh(ctx)

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        return self.rule.columns(target, ctx)

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        self.rule.after(target, ctx)

    def aim(self, target: Emb, ctx: Context) -> Aim:
        column = "twin" if self.plan.views[target.view].second else "key"
        free, near = ctx.bank.nearest(target.z, self.options.k, column=column), self.rule.near(target, ctx)
        purity(free, ctx)
        ctx.notes["allowed"] = near.count.double().mean()
        return Aim(free, near)

    def agree(self, query: Emb, aim: Aim, pos_B: Tensor, ctx: Context) -> Tensor:
        free_B = equations.mean_shift(query.u, aim.free.rows[pos_B], aim.free.valid[pos_B])
        near_B = equations.mean_shift(query.u, aim.near.rows[pos_B], aim.near.valid[pos_B])
        near_B = torch.where(aim.near.known[pos_B], near_B, free_B)
        return near_B if self.options.rule in ("label", "pseudo") else (near_B + free_B) / 2
