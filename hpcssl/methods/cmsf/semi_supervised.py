"""Which bank rows may be neighbors in semi-supervised CMSF (CMSF-semi).

    C(u) = the rows of the bank of u's class: its label, or else arg max softmax(h(u)) if confident enough; else M

    paper  here             meaning
    h      memories "head"  two-layer perceptron on the target's embedding, of unit length; evaluation mode to predict
           threshold        0.85: below it, a row enters the bank without a class, and a query searches the whole bank

The head is trained in the middle and at the end of each epoch on the last embeddings of the labeled images. (The
official code caches 128,000 of them in a ring, which may hold an image twice, and trains its empty slots as class 0.)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from hpcssl.errors import DataError
from hpcssl.memory.checkpointed import CheckpointedMemory
from hpcssl.methods.base import Embedding, MemoryContext, StepContext
from hpcssl.methods.cmsf.constraint import ConstrainedNeighbors, find_constrained
from hpcssl.methods.cmsf.options import CmsfOptions
from hpcssl.methods.cmsf.pseudo_labels import LabeledEmbeddings, PseudoLabelHead, choose_visible_labels
from hpcssl.nets import heads, resnet
from hpcssl.nets.heads import HeadOptions


class SemiSupervisedRule:
    """CMSF-semi: images of the query's class, which is its label if visible, else a confident pseudo-label.

    Args:
        options: options of CMSF.
    """

    vectors: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ("group",)
    heeds_taken = True

    def __init__(self, options: CmsfOptions):
        self.options = options

    def build_memories(self, context: MemoryContext) -> dict[str, CheckpointedMemory]:
        """Keep the embeddings of labeled images, and the head. Raises ``DataError`` if no image has a label."""
        options = self.options.pseudo_labels
        visible = choose_visible_labels(context.labels, options.labeled_fraction, context.seed)
        if not visible.any():
            raise DataError(
                "the training shards",
                got="no image with a label",
                expected="some labeled images",
                fix="write them with `hpcssl-shard subset SRC OUT --list FILE --rest unlabeled`",
            )
        shape = HeadOptions(hidden=[options.hidden], out=int(context.labels.max()) + 1)
        net = heads.build(context.width, shape, lambda channels, affine=True: nn.BatchNorm1d(channels, affine=affine))
        resnet.initialize(net, context.seed, "pseudo")
        head = PseudoLabelHead(
            net.to(context.world.device, context.dtype), options, seed=context.seed, world=context.world
        )
        labeled = LabeledEmbeddings(context.labels, visible, context.embedding_table, context.world.device)
        return {"labeled": labeled, "head": head}

    def before_step(self, ctx: StepContext) -> None:
        """Train the head, ``fits_per_epoch`` times per epoch at equal distances."""
        step_of_epoch, fits = ctx.step % ctx.steps_per_epoch, self.options.pseudo_labels.fits_per_epoch
        if ctx.step and step_of_epoch in {ctx.steps_per_epoch * fit // fits for fit in range(fits)}:
            ctx.memories["head"].fit(*ctx.memories["labeled"].known_rows(), ctx.step)

    def bank_columns(self, target: Embedding, ctx: StepContext) -> dict[str, Tensor]:
        """Return the class of each image: its label, its pseudo-label, or -1."""
        predicted_B, probability_B = ctx.memories["head"].predict(target.z)
        predicted_B = predicted_B.masked_fill(probability_B < self.options.pseudo_labels.threshold, -1)
        visible_B = ctx.memories["labeled"].is_visible(ctx.index_B)
        return {"group": torch.where(visible_B, ctx.label_B, predicted_B)}

    def after_step(self, targets: dict[int, Embedding], ctx: StepContext) -> None:
        """Keep the embeddings of labeled images for the head."""
        ctx.memories["labeled"].write(ctx.index_B, targets[1].z, ctx.taken)

    def neighbors(self, target: Embedding, ctx: StepContext) -> ConstrainedNeighbors:
        """Find the nearest rows of the query's class.

        Logs ``class_known``, the share of images with a label or a confident pseudo-label, and on labeled data
        ``pseudo_label_accuracy``, the share of confident pseudo-labels that are right.
        """
        class_B = self.bank_columns(target, ctx)["group"]
        ctx.metrics["class_known"] = (class_B >= 0).double().mean()
        if ctx.has_labels:
            pseudo_B = (class_B >= 0) & (ctx.label_B >= 0) & ~ctx.memories["labeled"].is_visible(ctx.index_B)
            right_B = pseudo_B & (class_B == ctx.label_B)
            ctx.metrics["pseudo_label_accuracy"] = right_B.sum() / pseudo_B.sum().clamp(min=1)
        return find_constrained(
            ctx.bank,
            target.z,
            ("group", class_B),
            self.options.k,
            all_allowed=self.options.all_allowed,
            legacy_fill=self.options.legacy_fill,
        )
