"""What the ranks of a sharded ring buffer send each other, so that each rank receives only what belongs to its rows.

    N slots, W ranks, n = b·k slots that a rank asks for

A rank owns one block of slots, and asks for rows in slots of any block. Requests are gathered by all ranks, because
8 bytes per slot are few beside the D entries of a row; the rows themselves go to the rank that asked for them only.
Everything is copied, nothing is added, so that every bit arrives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.devices import to_device
from hpcssl.distributed.world import World


def share_of(world: World, size: int) -> int:
    """Return the slots per rank, ⌈N/W⌉: slot s belongs to rank s // share. The last ranks may have fewer, or none."""
    return -(-size // world.size)


def fetch_rows(world: World, stored: Tensor, slots: Tensor, size: int) -> Tensor:
    """Fetch this rank's own choice of rows from their owners.

    On a CPU each rank receives only what it asked for. The numbers of rows are needed on the host for that, for which a
    GPU would have to be waited for. So there each pair of ranks exchanges as many rows as were asked for, and those of
    other owners are left aside: a rank receives W·n rows in place of n. That number is k rows per image of the global
    batch, however many ranks there are.

    Args:
        world: the ranks.
        stored: the rows that this rank owns, [⌈N/W⌉ or fewer] or [⌈N/W⌉ or fewer, D].
        slots: the slots [n] int64 that this rank asks for; n is the same on all ranks.
        size: number of slots of all ranks, N.

    Returns:
        The rows [n] or [n, D]; zeros for slots that do not exist.
    """
    fetch = _fetch_equal_parts if world.device.type == "cuda" else _fetch_asked_rows
    return fetch(world, stored, slots, size)


def _fetch_equal_parts(world: World, stored: Tensor, slots: Tensor, size: int) -> Tensor:
    """``fetch_rows`` without a number that the host must know."""
    share = share_of(world, size)
    if world.size == 1:
        answers = stored[slots.clamp(0, len(stored) - 1)]
    else:
        requests = world.all_gather(slots)
        shape = (len(requests), *stored.shape[1:])
        places = (requests - world.rank * share).clamp(0, max(0, len(stored) - 1))
        rows = stored[places] if len(stored) else stored.new_zeros(shape)  # the last ranks may hold none
        by_owner = world.all_to_all(rows).unflatten(0, (world.size, -1))  # type: ignore[no-untyped-call]
        owner = (slots // share).clamp(0, world.size - 1)
        answers = by_owner[owner, torch.arange(len(slots), device=slots.device)]
    missing = (slots < 0) | (slots >= size)
    return answers.masked_fill(missing if answers.dim() == 1 else missing.unsqueeze(-1), 0)


def _fetch_asked_rows(world: World, stored: Tensor, slots: Tensor, size: int) -> Tensor:
    """``fetch_rows`` with as few bytes as possible."""
    share = share_of(world, size)
    requests = world.all_gather(slots).unflatten(0, (world.size, -1))  # type: ignore[no-untyped-call]
    first = world.rank * share
    is_here = (requests >= first) & (requests < first + len(stored))
    exists = (slots >= 0) & (slots < size)
    owner = torch.where(exists, slots // share, world.size)
    owner, order = owner.sort(stable=True)
    limits = torch.searchsorted(owner, torch.arange(world.size + 1, device=slots.device))
    to_send, to_receive = torch.stack([is_here.sum(1), limits.diff()]).tolist()
    # the owner sends in the order of the requests, which the stable sort keeps among the slots of one owner
    received = world.all_to_all(stored[requests[is_here] - first], to_send, to_receive)
    rows = stored.new_zeros(len(slots), *stored.shape[1:])
    rows[order[: len(received)]] = received
    return rows


def exchange_candidates(world: World, score: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Give each rank the candidates that all ranks have found for its queries.

    Args:
        world: the ranks.
        score: scores [W·b, k] float64 of this rank's candidates for the queries of all ranks.
        slot: their slots [W·b, k] int64.

    Returns:
        (scores [b, W·k], slots [b, W·k]) for the b queries of this rank.
    """
    k = score.shape[1]
    both = torch.cat([score.view(torch.int64), slot], 1)
    by_rank = world.all_to_all(both).unflatten(0, (world.size, -1)).transpose(0, 1)  # type: ignore[no-untyped-call]
    score, slot = by_rank[..., :k].flatten(1), by_rank[..., k:].flatten(1)
    return score.view(torch.float64), slot


def sum_local_rows(world: World, x: Tensor) -> Tensor:
    """Return this rank's rows [b, …] of the sum over ranks of x [W·b, …], for sums that are exact in any order."""
    parts: Tensor = world.all_to_all(x).unflatten(0, (world.size, -1))  # type: ignore[no-untyped-call]
    return parts.sum(0)


class PushRoute:
    """Which rows of a push go to which rank, so that each row is sent to its owner only. Known without communication.

    The numbers of rows are needed on the host, and so are the slots.

    Args:
        world: the ranks.
        slots: the slot of each row of the global batch [W·b] int64, equal on all ranks; below 0: stored nowhere.
        size: number of slots, N.
        layout: how the global batch is split; None for one micro-batch.

    Attributes:
        place: the local rows [m] int64 of the m rows that this rank receives, in the order in which it receives them.
    """

    def __init__(self, world: World, slots: npt.NDArray[np.int64], size: int, layout: BatchLayout | None):
        self.world, share = world, share_of(world, size)
        parts = 1 if layout is None else layout.micro_batches
        # [W, b]: the slots of each rank's rows, in the order of the global batch
        by_rank = slots.reshape(parts, world.size, -1).swapaxes(0, 1).reshape(world.size, -1)
        owner = np.where(by_rank < 0, world.size, by_rank // share)
        own = owner[world.rank]
        order = np.argsort(own, kind="stable")
        self._order = to_device(order[own[order] < world.size], world.device)
        self._to_send: list[int] = np.bincount(own, minlength=world.size + 1)[: world.size].tolist()
        arriving = owner == world.rank
        self._to_receive: list[int] = arriving.sum(1).tolist()
        self.place = to_device(by_rank[arriving] - world.rank * share, world.device)

    def send(self, rows: Tensor) -> Tensor:
        """Send this rank's rows [b, …] to their owners, and return the rows [m, …] that this rank owns."""
        return self.world.all_to_all(rows[self._order], self._to_send, self._to_receive)
