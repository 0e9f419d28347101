"""Which bank rows may be neighbors in CMSF-2Q.

C(u) = NN_k'(u', M'),  the k' rows whose embeddings of the previous epoch are nearest to u's own of that epoch

paper  here                  meaning
M'     bank, previous_epoch  the second queue: each row's embedding of the previous epoch
u'     embedding table       the query image's embedding of the previous epoch
k'     k_constraint          number of rows that M' allows
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hpcssl.memory.checkpointed import CheckpointedMemory
from hpcssl.methods.base import Embedding, MemoryContext, StepContext
from hpcssl.methods.cmsf.constraint import ConstrainedNeighbors
from hpcssl.methods.cmsf.options import CmsfOptions


class TwoQueuesRule:
    """CMSF-2Q: the k' images whose embeddings of the previous epoch are nearest to the query's own of that epoch.

    A row keeps in ``previous_epoch`` the embedding that its image had when the row was pushed, so that two rows of one
    image keep two different ones. ``group`` is 0 for rows that have one, else -1.

    Args:
        options: options of CMSF.
    """

    vectors: ClassVar[tuple[str, ...]] = ("previous_epoch",)
    numbers: ClassVar[tuple[str, ...]] = ("group",)
    heeds_taken = True

    def __init__(self, options: CmsfOptions):
        self.options = options

    def build_memories(self, context: MemoryContext) -> dict[str, CheckpointedMemory]:
        """Keep the last embedding of each image."""
        return {"embedding_table": context.embedding_table()}

    def bank_columns(self, target: Embedding, ctx: StepContext) -> dict[str, Tensor]:
        """Return each image's embedding of the previous epoch, and whether it has one."""
        previous_BD, known_B = ctx.memories["embedding_table"].read(ctx.index_B)
        return {"previous_epoch": previous_BD, "group": known_B.to(torch.int64) - 1}

    def after_step(self, targets: dict[int, Embedding], ctx: StepContext) -> None:
        """Keep the embeddings for the next epoch."""
        ctx.memories["embedding_table"].write(ctx.index_B, targets[1].z, ctx.taken)

    def neighbors(self, target: Embedding, ctx: StepContext) -> ConstrainedNeighbors:
        """Find the k' nearest rows in M', and of these the k nearest in M."""
        own = self.bank_columns(target, ctx)
        allowed = ctx.bank.nearest(
            own["previous_epoch"], self.options.k_constraint, column="previous_epoch", among=("group", own["group"])
        )
        neighbors = ctx.bank.rerank(target.z, allowed.slot, self.options.k)
        return ConstrainedNeighbors(neighbors.rows, neighbors.valid, neighbors.valid.sum(1), own["group"] >= 0)
