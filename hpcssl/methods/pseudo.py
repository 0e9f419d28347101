"""Who may be a neighbour in semi-supervised CMSF: a rule like those of ``rules.py``.

    C(u) = the rows of the bank of u's class: its label, or else arg max softmax(h(u)) where that is sure enough; else M

    paper  here          meaning
    h      memory head   2-layer perceptron on the target's embedding, of unit length; evaluation mode when it guesses
           threshold     0.85: below it a row enters the bank without a class, and a query searches the whole bank

The head is trained in the middle and at the end of each epoch on the labelled images' last embeddings (the official
code caches 128,000 of them in a ring, which may hold an image twice, and trains its empty slots as class 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcssl.errors import DataError
from hpcssl.memory.groups import Near, near
from hpcssl.memory.pseudo import Labelled, PseudoHead, PseudoOptions, visible
from hpcssl.memory.rows import Memory
from hpcssl.methods.base import Context, Emb, Scene
from hpcssl.nets import heads, resnet
from hpcssl.nets.heads import HeadOptions


@dataclass(frozen=True)
class Pseudo:
    """Images of the query's class: its label where that may be seen, else what a head says of its embedding, if it is
    sure enough: CMSF-semi. The head learns from the labelled images' last embeddings, in and after each epoch."""

    k: int
    every: bool
    legacy_fill: bool
    options: PseudoOptions
    vectors, numbers = (), ("group",)

    def memories(self, scene: Scene) -> dict[str, Memory]:
        seen = visible(scene.labels, self.options.labelled, scene.seed)
        if not seen.any():
            raise DataError("the training shards", got="no image with a label", expected="some labelled images",
                            mend="write them with `hpcssl-shard subset SRC OUT --list FILE --rest unlabelled`")
        shape = HeadOptions(hidden=[self.options.hidden], out=int(scene.labels.max()) + 1)
        net = heads.build(scene.width, shape, lambda channels, affine=True: nn.BatchNorm1d(channels, affine=affine))
        resnet.initialise(net, scene.seed, "pseudo")
        head = PseudoHead(net.to(scene.world.device, scene.dtype), self.options, seed=scene.seed, world=scene.world)
        labelled = Labelled(scene.labels, seen, scene.ledger, scene.world.device)
        return {"labelled": labelled, "head": head}

    def refresh(self, ctx: Context) -> None:
        inside, per_epoch = ctx.step % ctx.epoch_steps, self.options.per_epoch
        if ctx.step and inside in {ctx.epoch_steps * turn // per_epoch for turn in range(per_epoch)}:
            ctx.memories["head"].train(*ctx.memories["labelled"].known(), ctx.step)

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        guess_B, sure_B = ctx.memories["head"].label(target.z)
        guess_B = guess_B.masked_fill(sure_B < self.options.threshold, -1)
        return {"group": torch.where(ctx.memories["labelled"].seen(ctx.index_B), ctx.label_B, guess_B)}

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        ctx.memories["labelled"].write(ctx.index_B, target[1].z)

    def near(self, target: Emb, ctx: Context) -> Near:
        group_B = self.columns(target, ctx)["group"]
        ctx.notes["sure"] = (group_B >= 0).double().mean()
        if ctx.watch_labels:  # of the guesses that count, how many are right
            guessed_B = (group_B >= 0) & (ctx.label_B >= 0) & ~ctx.memories["labelled"].seen(ctx.index_B)
            right_B = guessed_B & (group_B == ctx.label_B)
            ctx.notes["guessed_right"] = right_B.sum() / guessed_B.sum().clamp(min=1)
        return near(ctx.bank, target.z, ("group", group_B), self.k, every=self.every, legacy_fill=self.legacy_fill)
