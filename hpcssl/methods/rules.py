"""Who may be a neighbour in CMSF. A rule has the functions of ``base.Remembering``, and ``near``: whom it allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.errors import DataError
from hpcssl.memory.groups import Groups, Near, kmeans, near, need_faiss
from hpcssl.memory.rows import Memory
from hpcssl.methods.base import Context, Emb, Scene


@dataclass(frozen=True)
class Labels:
    """Images of the query's class: CMSF-sup."""

    k: int
    every: bool
    legacy_fill: bool
    vectors, numbers = (), ()

    def memories(self, scene: Scene) -> dict[str, Memory]:
        if not (scene.labels >= 0).any():
            raise DataError("the training shards", got="no image with a label", expected="labels, which say who may be "
                            "a neighbour", mend="write shards from folders named by class, or take another method.rule")
        return {}

    def refresh(self, ctx: Context) -> None:
        pass

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        return {}

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        pass

    def near(self, target: Emb, ctx: Context) -> Near:
        return near(ctx.bank, target.z, ("label", ctx.label_B), self.k, every=self.every, legacy_fill=self.legacy_fill)


@dataclass(frozen=True)
class Clusters:
    """Images of the query's cluster: CMSF-KM. Clusters are found in the ledger at the start of each epoch, and given to
    the rows that the bank holds from the epoch before; an image that the ledger does not know has none."""

    k: int
    every: bool
    legacy_fill: bool
    clusters: int
    iterations: int
    vectors, numbers = (), ("group",)

    def memories(self, scene: Scene) -> dict[str, Memory]:
        need_faiss("method.rule=kmeans")
        return {"ledger": scene.ledger(), "groups": Groups(len(scene.labels), scene.world)}

    def refresh(self, ctx: Context) -> None:
        if ctx.step % ctx.epoch_steps:
            return
        groups = ctx.memories["groups"]
        clusters = self.clusters or max(1, round(groups.images / 25.6))  # 50,000 for ImageNet's 1,281,167
        seed = rng.key(ctx.seed, "kmeans", ctx.step)
        found = partial(kmeans, clusters=clusters, iterations=self.iterations, seed=seed)
        groups.cluster(ctx.memories["ledger"], found)
        ctx.bank.rewrite("group", "index", groups.of)

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        return {"group": ctx.memories["groups"].of(ctx.index_B)}

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        ctx.memories["ledger"].write(ctx.index_B, target[1].z)

    def near(self, target: Emb, ctx: Context) -> Near:
        among = ("group", self.columns(target, ctx)["group"])
        return near(ctx.bank, target.z, among, self.k, every=self.every, legacy_fill=self.legacy_fill)


@dataclass(frozen=True)
class Twins:
    """The ``twins`` images whose embeddings of the epoch before are nearest to the query's own of then: CMSF-2Q.

    A row takes its embedding of the epoch before into the bank (``twin``) when it is pushed, so that a bank that holds
    an image twice tells its two twins apart. ``group`` 0 marks the rows that have one.
    """

    k: int
    twins: int
    vectors, numbers = ("twin",), ("group",)

    def memories(self, scene: Scene) -> dict[str, Memory]:
        return {"ledger": scene.ledger()}

    def refresh(self, ctx: Context) -> None:
        pass

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        twin_BD, known_B = ctx.memories["ledger"].read(ctx.index_B)
        return {"twin": twin_BD, "group": known_B.to(torch.int64) - 1}

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        ctx.memories["ledger"].write(ctx.index_B, target[1].z)

    def near(self, target: Emb, ctx: Context) -> Near:
        own = self.columns(target, ctx)
        twins = ctx.bank.nearest(own["twin"], self.twins, column="twin", among=("group", own["group"]))
        hits = ctx.bank.best(target.z, twins.slot, self.k)
        return Near(hits.rows, hits.valid, hits.valid.sum(1), own["group"] >= 0)
