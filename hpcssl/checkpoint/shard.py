"""The part of a tensor that one rank saves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """A tensor of the training state as one rank holds it: the whole, or a run of its rows.

    Attributes:
        tensor: This rank's rows, [rows, …]; of a replicated tensor the whole, which may have no dimension. It is not
            copied: it may be a view of the living state.
        first_row: Index of the first of these rows in the whole tensor.
        total_rows: Number of rows of the whole tensor; None if every rank holds all of it, with equal bits.
    """

    tensor: Tensor
    first_row: int = 0
    total_rows: int | None = None

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole tensor."""
        return self.total_rows is None

    @property
    def shape(self) -> list[int]:
        """Shape of the whole tensor."""
        if not self.tensor.dim():
            return []
        rows = len(self.tensor) if self.total_rows is None else self.total_rows
        return [rows, *self.tensor.shape[1:]]
