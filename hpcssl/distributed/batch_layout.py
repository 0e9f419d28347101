"""How the rows of the global batch are split over micro-batches and ranks, as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of the global batch are split over micro-batches and ranks.

    The global batch is cut into ``micro_batches`` runs of consecutive rows; of each run every rank holds one equal,
    consecutive slice (``data/order.py`` assigns samples in the same way). A rank's own rows are the concatenation of
    its slices.

    Attributes:
        batch: Rows of the global batch.
        micro_batches: Number of micro-batches per step.
    """

    batch: int
    micro_batches: int = 1
