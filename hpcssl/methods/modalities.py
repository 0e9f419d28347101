"""Who may be a neighbour in cross-modal CMSF: a rule like those of ``rules.py``.

    C(u_A) = the k' rows of the bank whose other modality is nearest to the query image's own other modality

The poster says one line of it ("NNs in other modalities"), and no code is published: our reading is 2Q with the other
modality in the place of the epoch before. Both modalities have encoders of their own, trained at once, each towards the
neighbours that the other allows; the loss is the sum of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.memory.groups import Near
from hpcssl.memory.rows import Memory
from hpcssl.methods.base import Context, Emb, Scene


@dataclass(frozen=True)
class Modalities:
    """The ``twins`` images whose other modality is nearest to the query image's: cross-modal CMSF. Each bank row holds
    both modalities of its image: ``key`` the first, ``twin`` the second. An image of either is led by the other."""

    k: int
    twins: int
    vectors, numbers = ("twin",), ()

    def memories(self, scene: Scene) -> dict[str, Memory]:
        return {}

    def refresh(self, ctx: Context) -> None:
        pass

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        return {"twin": ctx.targets[3].z}

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        pass

    def near(self, target: Emb, ctx: Context) -> Near:
        (own, column), other, leading = {1: ((1, "key"), 3, "twin"), 3: ((3, "twin"), 1, "key")}[target.view]
        twins = ctx.bank.nearest(ctx.targets[other].z, self.twins, column=leading)
        hits = ctx.bank.best(ctx.targets[own].z, twins.slot, self.k, column=column)
        return Near(hits.rows, hits.valid, hits.valid.sum(1), torch.ones_like(ctx.index_B, dtype=torch.bool))
