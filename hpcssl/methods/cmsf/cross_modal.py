"""Which bank rows may be neighbors in cross-modal CMSF.

    C(u_A) = the k' rows of the bank whose other modality is nearest to the query image's own other modality

The poster has one line about it ("NNs in other modalities"), and no code is published. Our reading is CMSF-2Q with the
other modality in place of the previous epoch. Each modality has its own encoder. Both are trained together, each
toward the neighbors that the other one allows, and the loss is the sum of the two.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hpcssl.methods.base import Embedding, StepContext
from hpcssl.methods.cmsf.constraint import ConstrainedNeighbors
from hpcssl.methods.cmsf.options import CmsfOptions

FIRST, SECOND = 1, 3
"""The target views of the two modalities in the joined view plan."""
COLUMNS = {FIRST: "key", SECOND: "second_modality"}
"""The bank column of each modality. Each bank row holds both modalities of its image."""


class CrossModalRule:
    """Cross-modal CMSF: the k' images whose other modality is nearest to the query image's.

    Args:
        options: options of CMSF.
    """

    vectors: ClassVar[tuple[str, ...]] = ("second_modality",)
    numbers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: CmsfOptions):
        self.options = options

    def bank_columns(self, target: Embedding, ctx: StepContext) -> dict[str, Tensor]:
        """Return the embeddings of the second modality."""
        return {"second_modality": ctx.target_embeddings[SECOND].z}

    def neighbors(self, target: Embedding, ctx: StepContext) -> ConstrainedNeighbors:
        """Find the k' nearest rows in the other modality, and of these the k nearest in the target's own."""
        own = target.view
        other = SECOND if own == FIRST else FIRST
        allowed = ctx.bank.nearest(ctx.target_embeddings[other].z, self.options.k_constraint, column=COLUMNS[other])
        neighbors = ctx.bank.rerank(ctx.target_embeddings[own].z, allowed.slot, self.options.k, column=COLUMNS[own])
        known = torch.ones_like(ctx.index_B, dtype=torch.bool)
        return ConstrainedNeighbors(neighbors.rows, neighbors.valid, neighbors.valid.sum(1), known)
