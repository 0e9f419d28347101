"""Whether all ranks still hold the same bits where they must: a flipped weight is found, named, and never saved.

Gradients are averaged, so that equal replicas stay equal; one that was changed by a bad memory or a bug stays changed,
and would reach the others through the next checkpoint, which takes each tensor from one rank only.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from hpcssl import pulse
from hpcssl.errors import WorldError
from hpcssl.train.state import Training

_BLOCK = 1 << 22  # words at a time: 32 MiB of products


def check(t: Training) -> None:
    """Compare what all ranks hold alike: networks, optimiser, a replicated bank. A collective.

    Raises ``WorldError`` on every rank, naming the ranks that differ from the most, and the tensors.
    """
    world = t.world
    if world.size == 1:
        return
    held = dict(sorted(t.replicas().items()))
    mine = torch.stack([checksum(tensor) for tensor in held.values()])
    every_RT = world.gather(mine[None]).cpu()
    rows = [tuple(row) for row in every_RT.tolist()]
    if len(set(rows)) == 1:
        return
    hosts = world.gather_text(pulse.host())
    counts = Counter(rows).most_common()
    decided = counts[0][1] > counts[1][1]
    others = [rank for rank, row in enumerate(rows) if row != counts[0][0]] if decided else list(range(world.size))
    names = [name for name, column in zip(held, every_RT.T, strict=True) if len(column.unique()) > 1]
    who = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in others[:4]) + ", …" * (len(others) > 4)
    raise WorldError(f"the replicas at step {t.step}",
                     got=f"{who} {'with other bits than the rest' if decided else 'with different bits'} in "
                         f"{', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3),
                     expected="the same bits on every rank",
                     mend="see whether the memory of that node reports errors, and leave the node out if it happens "
                          "again; the next attempt goes on from the last checkpoint, whose replicas were equal")


def checksum(x: Tensor) -> Tensor:
    """int64 []: the sum of the tensor's 8-byte words, each times an odd number of its own, modulo 2^64.

    Any one changed bit gives another sum, and so do nearly all larger changes; the order of summation does not.
    """
    raw = x.detach().contiguous().reshape(-1).view(torch.uint8)
    tail = len(raw) % 8
    if tail or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(-tail % 8)])
    words = raw.view(torch.int64)
    total = words.new_zeros(())
    for first in range(0, len(words), _BLOCK):
        block = words[first:first + _BLOCK]
        total += (block * torch.arange(2 * first + 1, 2 * (first + len(block)), 2, device=x.device)).sum()
    return total
