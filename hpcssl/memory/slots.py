"""Which slots of a ring buffer lie on which rank, and which rows of a batch go there.

A rank holds the slots first … last-1: all N of a replicated buffer, its own block of a sharded one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hpcssl import rng
from hpcssl.distributed.world import World
from hpcssl.memory.columns import ColumnSpec

Piece = tuple[slice | Tensor, slice | Tensor]
"""Rows of a global batch that are stored on this rank: (rows of the batch, rows of this rank's tensor)."""

_BLOCK = 4096  # slots whose initial rows share an RNG key: changing it changes every run


@dataclass(frozen=True)
class PushUndo:
    """What one push has overwritten on this rank. ``RingBuffer.undo`` restores it.

    Attributes:
        version: version of the buffer after the push; any later change makes the undo invalid.
        pointer: the pointer before the push.
        filled: number of filled slots before the push.
        places: the local rows that were overwritten, in pieces.
        replaced: for each column, the old values of these pieces.
    """

    version: int
    pointer: int
    filled: int
    places: list[slice | Tensor]
    replaced: dict[str, list[Tensor]]


def block_of(world: World, size: int) -> tuple[int, int]:
    """Return the block first … last-1 of ``size`` rows that this rank owns: r·⌈N/W⌉ up to (r+1)·⌈N/W⌉."""
    share = -(-size // world.size)
    return min(size, world.rank * share), min(size, (world.rank + 1) * share)


def next_pieces(pointer: int, count: int, size: int, first: int, last: int) -> list[Piece]:
    """Return where ``count`` rows are stored that start at slot ``pointer`` and wrap around after slot ``size`` - 1."""
    straight = min(count, size - pointer)
    pieces: list[Piece] = []
    for slot, source, n in ((pointer, 0, straight), (0, straight, count - straight)):
        low, high = max(slot, first), min(slot + n, last)
        if low < high:
            pieces.append((slice(source + low - slot, source + high - slot), slice(low - first, high - first)))
    return pieces


def chosen_pieces(slots: Tensor, first: int, last: int) -> list[Piece]:
    """Return where the rows of a batch are stored that go to ``slots`` [W·b]; slots below 0 are stored nowhere.

    All rows are written, so that the host need not know how many belong to this rank: those that do not go to the spare
    row ``last - first`` (see ``allocate``).
    """
    here = (slots >= first) & (slots < last)
    return [(slice(None), torch.where(here, slots - first, last - first))]


def allocate(spec: ColumnSpec, rows: int, device: torch.device) -> Tensor:
    """Return a tensor for a number of rows of a column and one spare row: zeros for vectors, -1 for integers.

    The spare row is written by ``chosen_pieces`` and never read.
    """
    rows += 1
    if spec.dim is None:
        return torch.full((rows,), -1, dtype=spec.dtype, device=device)
    return torch.zeros(rows, spec.dim, dtype=spec.dtype, device=device)


def fill_randomly(rows: Tensor, key: int, first: int, last: int) -> None:
    """Fill ``rows`` [last - first, D] with unit vectors of random direction.

    They are drawn on the CPU in blocks of slots, so that they are the same for any world and placement.
    """
    for start in range(first // _BLOCK * _BLOCK, last, _BLOCK):
        normal = torch.randn(_BLOCK, rows.shape[1], generator=rng.generator(rng.key(key, start)))
        low, high = max(first, start), min(last, start + _BLOCK)
        unit = F.normalize(normal[low - start : high - start].double(), dim=1)
        rows[low - first : high - first] = unit.to(rows.dtype)
