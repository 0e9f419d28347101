"""Reads of a checkpoint by all ranks: what every rank needs is read by rank 0 and sent to the others.

A checkpoint has one part per rank that saved it. If each rank read all tensors itself, W ranks would open W parts each,
and a file system would serve the networks and a replicated bank W times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from hpcssl.checkpoint.reader import SavedCheckpoint
from hpcssl.distributed.world import World


def read_shared(world: World, saved: SavedCheckpoint, name: str, first: int = 0, count: int | None = None) -> Tensor:
    """Read rows of a tensor on rank 0, and send them to all ranks. A collective; bits are copied.

    Args:
        world: The processes, which ask for the same rows.
        saved: The checkpoint.
        name: Name of the tensor.
        first: Index of the first row.
        count: Number of rows; None for all to the end.

    Returns:
        What ``SavedCheckpoint.rows`` returns; with several ranks, on their devices.
    """
    if world.size == 1:
        return saved.rows(name, first, count)
    shape, dtype = saved.shape_of_rows(name, first, count)
    if world.is_main:
        body = saved.rows(name, first, count).contiguous().reshape(-1).view(torch.uint8).to(world.device)
    else:
        body = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=world.device)
    return world.broadcast(body, 0).view(dtype).reshape(shape)


def row_reader(
    world: World, saved: SavedCheckpoint, prefix: str, whole: Collection[str]
) -> Callable[[str, int, int], Tensor]:
    """Build ``read(name, start, stop)`` for the tensors whose names begin with ``prefix`` and a dot.

    Args:
        world: The processes.
        saved: The checkpoint.
        prefix: First part of the names.
        whole: Tensors of which every rank reads all rows, in the same calls; those are collectives.
    """

    def read(name: str, start: int, stop: int) -> Tensor:
        if name in whole:
            return read_shared(world, saved, f"{prefix}.{name}", start, stop - start)
        return saved.rows(f"{prefix}.{name}", start, stop - start)

    return read
