"""Comparison of what all ranks must hold alike: replicas, so that a flipped bit is never saved, and plain values.

Gradients are averaged, so equal replicas stay equal. A replica that was changed by bad memory or a bug stays changed,
and would reach the other ranks through the next checkpoint, which takes each tensor from one rank.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from hpcssl import config
from hpcssl.checkpoint.manager import CheckpointState
from hpcssl.distributed.liveness.record import node_name
from hpcssl.distributed.world import World
from hpcssl.errors import WorldError
from hpcssl.train.train_state import TrainState

_BLOCK_WORDS = 1 << 22  # words that are multiplied at a time: 32 MiB of products


def check(t: TrainState, state: CheckpointState) -> None:
    """Compare networks, optimizer and replicated memories of all ranks. A collective.

    Args:
        t: The state to compare.
        state: What ``t.state()`` returned at this step.

    Raises:
        WorldError: On every rank, naming the ranks that differ from the majority, and the tensors.
    """
    world = t.world
    if world.size == 1:
        return
    replicas = dict(sorted(t.replicas(state).items()))
    own_T = torch.stack([checksum(tensor) for tensor in replicas.values()])
    sums_RT = world.all_gather(own_T[None]).cpu()
    rows = [tuple(row) for row in sums_RT.tolist()]
    if len(set(rows)) == 1:
        return
    hosts = world.all_gather_text(node_name())
    counts = Counter(rows).most_common()
    has_majority = counts[0][1] > counts[1][1]
    ranks = [rank for rank, row in enumerate(rows) if row != counts[0][0]] if has_majority else list(range(world.size))
    names = [name for name, column in zip(replicas, sums_RT.T, strict=True) if len(column.unique()) > 1]
    differing_ranks = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:4]) + ", …" * (len(ranks) > 4)
    kind = "with other bits than the rest" if has_majority else "with different bits"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise WorldError(
        f"the replicas at step {t.step}",
        got=f"{differing_ranks} {kind} in {', '.join(names[:3])}{more}",
        expected="the same bits on every rank",
        fix="check whether the memory of that node reports errors, and exclude the node if it happens again; the next "
        "attempt resumes from the last checkpoint, whose replicas were equal",
    )


def checksum(x: Tensor) -> Tensor:
    """Return a checksum of a tensor's bits, int64 []: the sum of its 8-byte words, each times another odd number.

    Any single changed bit changes the sum, and so do nearly all larger changes. Sums are modulo 2^64, so that the
    order of summation does not matter.
    """
    raw = x.detach().contiguous().reshape(-1).view(torch.uint8)
    tail = len(raw) % 8
    if tail or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(-tail % 8)])
    words = raw.view(torch.int64)
    total = words.new_zeros(())
    for first in range(0, len(words), _BLOCK_WORDS):
        block = words[first : first + _BLOCK_WORDS]
        total += (block * torch.arange(2 * first + 1, 2 * (first + len(block)), 2, device=x.device)).sum()
    return total


def check_equal_on_all_ranks(world: World, what: str, values: dict[str, Any]) -> None:
    """Check that all ranks have the same values as rank 0. A collective.

    Ranks differ where a command was typed twice, or a node reads an old file. Gradients are averaged over whatever
    the ranks learn, so that nothing else would reveal it.

    Args:
        world: The processes.
        what: Name of the values, for the error message.
        values: Nested plain values.

    Raises:
        WorldError: On all ranks, naming the first rank that differs, and the keys.
    """
    fingerprints = world.all_gather_text(config.fingerprint(values))
    if len(set(fingerprints)) == 1:
        return
    every = [json.loads(text) for text in world.all_gather_text(json.dumps(values))]
    rank = next(r for r, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0])
    raise WorldError(
        f"rank {rank}'s {what}",
        got=f"other values than those of rank 0: {', '.join(config.differing(every[rank], every[0]))}",
        expected="the same values on all ranks",
        fix="start all ranks with one command, on nodes that see the same files",
    )
