"""How state beside the networks is saved by some number of ranks and loaded by another number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hpcssl.checkpoint.shard import TensorShard
from hpcssl.errors import ResumeError

RowReader = Callable[[str, int, int], Tensor]
"""``read(name, start, stop)``: rows start … stop-1 of a saved tensor, whichever ranks wrote them."""


class CheckpointedMemory(Protocol):
    """State beside the networks that outlives a step, such as the memory bank.

    It consists of tensors, whose rows may be split over ranks, and of a few integers.
    """

    def state(self) -> tuple[dict[str, TensorShard], dict[str, int]]:
        """Return what this rank saves. Not a collective.

        Returns:
            This rank's shard of each tensor, by name, and integers that are equal on all ranks. The shards may be
            views of the state itself: copy them before the next change.
        """

    def replicas(self) -> dict[str, Tensor]:
        """Return the tensors that ``state`` splits although every rank holds all rows of them.

        They have the same bits on every rank, which the replica check compares. Not a collective.
        """

    def load(self, numbers: Mapping[str, int], read: RowReader) -> None:
        """Restore what any number of ranks saved.

        All ranks call it, and read the same rows of the tensors in ``replicas``, in the same order: ``read`` may be a
        collective for these.

        Args:
            numbers: the integers that ``state`` returned.
            read: gives rows of a saved tensor.

        Raises:
            ResumeError: if the saved state has other sizes or dtypes than this one.
        """


def row_reader(shards: Mapping[str, Sequence[TensorShard]]) -> RowReader:
    """Build the ``read`` function of ``CheckpointedMemory.load`` from shards in memory.

    Args:
        shards: for each tensor the shards of all ranks, in any order.

    Returns:
        A function that raises ``ResumeError`` if the shards of a tensor leave a gap.
    """

    def read(name: str, start: int, stop: int) -> Tensor:
        pieces = sorted((s for s in shards.get(name, ()) if len(s.tensor)), key=lambda s: s.first_row)
        rows = 0
        for piece in pieces:
            if piece.first_row != rows:
                break
            rows += len(piece.tensor)
        if not pieces or {piece.total_rows for piece in pieces} != {rows}:
            raise ResumeError(
                f"the saved column {name!r} of the bank",
                got=f"{len(pieces)} shards that leave a gap",
                expected="the shards of all ranks",
                fix="resume from a complete checkpoint",
            )
        wanted = [s for s in pieces if s.first_row < stop and s.first_row + len(s.tensor) > start]
        return torch.cat([s.tensor[max(0, start - s.first_row) : stop - s.first_row] for s in wanted])

    return read
