"""Which bank rows may be neighbors in supervised CMSF (CMSF-sup).

C(u) = the rows of the bank with u's label, which may be noisy
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hpcssl.errors import DataError
from hpcssl.memory.checkpointed import CheckpointedMemory
from hpcssl.methods.base import Embedding, MemoryContext, StepContext
from hpcssl.methods.cmsf.constraint import ConstrainedNeighbors, find_constrained
from hpcssl.methods.cmsf.options import CmsfOptions


def require_labels(labels: npt.NDArray[np.int64], fix: str) -> None:
    """Raise ``DataError`` if no image of the data set has a label.

    Args:
        labels: [images] int64, -1 for no label.
        fix: what to do then, for the message.
    """
    if not (labels >= 0).any():
        raise DataError(
            "the training shards",
            got="no image with a label",
            expected="labels, which decide who may be a neighbor",
            fix=fix,
        )


class SupervisedRule:
    """CMSF-sup: images of the query's class.

    Args:
        options: options of CMSF.
    """

    vectors: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: CmsfOptions):
        self.options = options

    def build_memories(self, context: MemoryContext) -> dict[str, CheckpointedMemory]:
        """Keep nothing. Raises ``DataError`` if the data set has no labels."""
        require_labels(context.labels, "write shards from folders named by class, or choose another method.rule")
        return {}

    def neighbors(self, target: Embedding, ctx: StepContext) -> ConstrainedNeighbors:
        """Find the nearest rows with the query's label."""
        return find_constrained(
            ctx.bank,
            target.z,
            ("label", ctx.label_B),
            self.options.k,
            all_allowed=self.options.all_allowed,
            legacy_fill=self.options.legacy_fill,
        )
