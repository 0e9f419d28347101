"""Nearest neighbors under a constraint: those bank rows that a rule of CMSF allows each query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.memory.bank import Bank, Neighbors


@dataclass(frozen=True)
class ConstrainedNeighbors:
    """The neighbors in C that a rule allows each of b queries.

    Attributes:
        rows: [b, K, D], the neighbors; or [b, 1, D], the mean of all allowed rows.
        valid: [b, K] bool, which of them count.
        count: [b] int64, number of allowed rows.
        known: [b] bool, whether C is known for the query. Where it is not, the whole bank takes its place.
    """

    rows: Tensor
    valid: Tensor
    count: Tensor
    known: Tensor


def find_constrained(
    bank: Bank, query: Tensor, among: tuple[str, Tensor], k: int, *, all_allowed: bool, legacy_fill: bool
) -> ConstrainedNeighbors:
    """Find the neighbors that share a class or cluster with the query.

    Args:
        bank: the memory bank.
        query: [b, D], target embeddings.
        among: (column of the bank, the query's value in it [b]), as in ``Bank.nearest``.
        k: number of neighbors.
        all_allowed: take the mean of all allowed rows instead of the k nearest ("top-all").
        legacy_fill: as the official code, take forbidden rows where fewer than k are allowed.
    """
    known = among[1] >= 0
    if all_allowed:
        mean, count = bank.mean(among)
        return ConstrainedNeighbors(mean[:, None], (count > 0)[:, None], count, known)
    neighbors = bank.nearest(query, k, among=among)
    count = neighbors.valid.sum(1)
    if legacy_fill:
        neighbors = _fill_up(query, neighbors, bank, among)
    return ConstrainedNeighbors(neighbors.rows, neighbors.valid, count, known)


@torch.no_grad()
def _fill_up(query: Tensor, neighbors: Neighbors, bank: Bank, among: tuple[str, Tensor]) -> Neighbors:
    """Add forbidden rows to ``neighbors`` [b, k] of ``bank.nearest(query, k, among=among)`` where fewer are allowed.

    They come from the lowest slots. A query that lacks some has fewer than k allowed rows, so that there are enough
    forbidden ones among the first 2k slots.
    """
    b, k = neighbors.slot.shape
    slot = torch.arange(min(2 * k, bank.filled), device=neighbors.slot.device).expand(b, -1)
    allowed = bank.get(among[0], slot.contiguous()) == among[1][:, None]
    slot = slot.gather(1, allowed.long().sort(dim=1, stable=True).indices)  # forbidden ones first
    place = torch.arange(k, device=slot.device) - neighbors.valid.sum(1, keepdim=True)
    spare = slot.gather(1, place.clamp(min=0, max=slot.shape[1] - 1))
    return bank.rerank(query, torch.where(neighbors.valid, neighbors.slot, spare), k)
