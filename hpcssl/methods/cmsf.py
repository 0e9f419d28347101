"""Constrained Mean Shift Using Distant Yet Related Neighbors for Representation Learning (CMSF),
Navaneet, Koohpayegani, Tejankar, Pourahmadi, Subramanya, Pirsiavash. ECCV 2022.

    L = ½ · 1/k · Σ_{j ∈ NN_k(u, C)} dist(v, z_j)  +  ½ · 1/k · Σ_{j ∈ NN_k(u, M)} dist(v, z_j),    C ⊂ M
    dist(a, b) = ‖a − b‖²;    with labels the first sum alone, without the ½

    paper    here          meaning
    v, u     query.u, target.z   prediction of the online network; embedding of the target network, pushed to M first
    M        ctx.bank      the last N target embeddings, first in, first out
    C        options.rule  what of M may be a neighbour:
               twin (2Q)     the k' rows whose images' embeddings of the epoch before are nearest to u's own
               kmeans (KM)   images of u's cluster; the clusters are found anew after each epoch
               label (sup)   images of u's class, noisy or not
    M'       bank "twin"   each row's embedding of the epoch before (another augmentation), kept when it was pushed

Where C is not known (the first epoch, an image not met before, no label) it is M: the official script searches noise
there. It also fills up fewer than k allowed rows with forbidden ones at an equal "distance 5"; here the mean is over
the allowed ones, of which u is always one, unless ``legacy_fill`` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcssl.errors import ConfigError, nearest
from hpcssl.memory.bank import Hits
from hpcssl.memory.groups import Near
from hpcssl.memory.rows import Memory
from hpcssl.methods import equations, rules
from hpcssl.methods.base import BankSpec, Context, Emb, Scene
from hpcssl.methods.diagnostics import purity
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, one_way

RULES = ("twin", "kmeans", "label")


@dataclass(frozen=True, kw_only=True)
class CmsfOptions:
    """``rule``: what constrains the neighbours. ``k`` of them, or with ``every`` all that are allowed ("top-all").
    ``twins``: k' of 2Q. ``clusters`` of k-means (0: one per 25.6 images) after ``iterations`` of Lloyd's.
    ``legacy_fill``: as the official code, take forbidden rows where fewer than k are allowed (those of the lowest
    slots; which ones a top-k takes among equals is the library's own affair)."""

    name: str = "cmsf"
    rule: str = "twin"
    k: int = 5
    every: bool = False
    twins: int = 5
    clusters: int = 0
    iterations: int = 20
    legacy_fill: bool = False
    ema: EmaOptions = field(default_factory=EmaOptions)

    def __post_init__(self):
        twin = self.rule == "twin"
        for key, wrong, expected, mend in (
                ("rule", self.rule not in RULES, "one of " + ", ".join(RULES), nearest(str(self.rule), RULES)),
                ("k", self.k < 1, "1 or more neighbours", "set method.k=5"),
                ("twins", twin and self.twins < self.k, "at least method.k", f"set method.twins={self.k}"),
                ("clusters", self.clusters < 0, "0 or more", "set method.clusters=0 for one per 25.6 images"),
                ("iterations", self.iterations < 1, "1 or more", "set method.iterations=20"),
                ("every", twin and self.every, "false, since k' is what 2Q allows", "set method.every=false"),
                ("legacy_fill", self.legacy_fill and (twin or self.every), "false where nothing can be too few",
                 "set method.legacy_fill=false")):
            if wrong:
                raise ConfigError(f"method.{key}", got=repr(getattr(self, key)), expected=expected, mend=mend)

    def made(self) -> rules.Labels | rules.Clusters | rules.Twins:
        if self.rule == "twin":
            return rules.Twins(self.k, self.twins)
        if self.rule == "kmeans":
            return rules.Clusters(self.k, self.every, self.legacy_fill, self.clusters, self.iterations)
        return rules.Labels(self.k, self.every, self.legacy_fill)


@dataclass(frozen=True)
class Aim:
    """Neighbours in M and in C."""

    free: Hits
    near: Near


class Cmsf:
    """Plan: query → target, one way. Target: moving average. Bank: fed before the lookup. Memories: the rule's."""

    target, predictor, in_batch, constant_lr = "ema", True, False, ()

    def __init__(self, options: CmsfOptions, views: ViewOptions):
        self.options, self.plan, self.rule = options, one_way(*views.pair()), options.made()
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
        free, near = ctx.bank.nearest(target.z, self.options.k), self.rule.near(target, ctx)
        purity(free, ctx)
        ctx.notes["allowed"] = near.count.double().mean()
        return Aim(free, near)

    def agree(self, query: Emb, aim: Aim, pos_B: Tensor, ctx: Context) -> Tensor:
        free_B = equations.mean_shift(query.u, aim.free.rows[pos_B], aim.free.valid[pos_B])
        near_B = equations.mean_shift(query.u, aim.near.rows[pos_B], aim.near.valid[pos_B])
        near_B = torch.where(aim.near.known[pos_B], near_B, free_B)
        return near_B if self.options.rule == "label" else (near_B + free_B) / 2
