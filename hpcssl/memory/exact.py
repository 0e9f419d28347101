"""Inner products without rounding: the arithmetic that decides which rows of the bank are the nearest.

    q_BD    queries, unit length        r_ND    rows, unit length
    score   <grid(q), grid(r)>,  grid(x) = round(2^24 x) / 2^24

A floating-point inner product depends on the order in which a library adds: another batch size, chunk size, thread
count or split over ranks gives other last bits, and other neighbors wherever two rows are about equally near. Entries
of unit vectors on a grid of 2^-24 have products on a grid of 2^-48, and every partial sum of them is at most about 1.
Such sums are exact in float64 in any order. Moving an entry to the grid costs at most 2^-25, about the rounding error
of float32 itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Among = tuple[Tensor, Tensor]
"""A restriction of the search: (column [N] int64 of the rows, value [B] int64 of the queries).

Query i may only have rows whose column equals value[i]. A value below 0 means "unknown" and allows no row.
"""

CHUNK = 4096
"""Rows per matrix product on a CPU, which then stays in the cache. Must be 2^12: see ``_exhaustive_chunked``."""
_GRID = 2.0**24
# These bound the memory. A GPU gets larger pieces: each takes some ten launches, however small it is.
_QUERIES = {"cpu": 2**8, "cuda": 2**12}  # of an exhaustive search at a time
_GRID_ENTRIES = {"cpu": 2**19, "cuda": 2**25}  # of candidates in float64 at a time: 4 and 256 MiB


def merge(score: Tensor, slot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of each query's candidates, best first; of equal scores the lower slot comes first.

    Args:
        score: exact scores [B, m] float64.
        slot: slots [B, m] int64 of the candidates.
        k: number of candidates to keep. If m < k, the result is padded with scores of -inf.

    Returns:
        (score [B, k], slot [B, k]).
    """
    missing = max(0, k - score.shape[1])
    score, slot = F.pad(score, (0, missing), value=-torch.inf), F.pad(slot, (0, missing))
    slot, order = slot.sort(dim=1)
    score, best = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    return score[:, :k], slot.gather(1, best)[:, :k]


def scores(query: Tensor, rows: Tensor) -> Tensor:
    """Return the exact scores of each query with its own rows.

    Args:
        query: [B, D], unit length.
        rows: [B, m, D], unit length.

    Returns:
        [B, m] float64; -inf where the score is not finite.
    """
    score = torch.bmm(to_grid(rows), to_grid(query).unsqueeze(2)).squeeze(2)
    return score.masked_fill_(_is_bad(score), -torch.inf)


def sums(rows: Tensor, among: Among, *, max_rows: int) -> tuple[Tensor, Tensor]:
    """Add the rows that ``among`` allows each query.

    Args:
        rows: [N, D], unit length.
        among: which rows each of B queries may have.
        max_rows: upper bound on the number of rows that are added over all ranks. On a grid of 2^-g with
            g = 51 - log2(max_rows) their sum fits into the 53 bits of a float64, so that no order of adding rounds.

    Returns:
        (sum [B, D] float64, number of rows added [B] int64).
    """
    grid, value = 2.0 ** (51 - max(1, max_rows - 1).bit_length()), among[1]
    total = rows.new_zeros(len(value), rows.shape[1], dtype=torch.float64)
    count = torch.zeros_like(value)
    if rows.device.type == "cpu":  # most rows are allowed to no query
        allowed_rows = torch.isin(among[0], value[value >= 0]).nonzero().squeeze(1)
    else:  # the host would have to wait for their number
        allowed_rows = torch.arange(len(rows), device=rows.device)
    for chunk in torch.split(allowed_rows, CHUNK):
        part = rows[chunk].to(torch.float64, copy=True).mul_(grid).round_().div_(grid)
        allowed = ~forbidden((among[0][chunk], value), 0, len(chunk))
        total += allowed.double() @ part
        count += allowed.sum(1)
    return total, count


def to_grid(x: Tensor) -> Tensor:
    """Return a float64 copy of x, rounded to multiples of 2^-24."""
    return _grid_units(x).div_(_GRID)


def _grid_units(x: Tensor) -> Tensor:
    """``to_grid`` in units of 2^-24: whole numbers, whose products and sums are exact just the same."""
    return x.to(torch.float64, copy=True).mul_(_GRID).round_()


def _is_bad(score: Tensor) -> Tensor:
    """``~score.isfinite()``, in three launches instead of five."""
    return ~(score.abs() < math.inf)


def forbidden(among: Among, start: int, stop: int) -> Tensor:
    """Return which of the rows start … stop-1 each query must not have, bool [B, stop - start]."""
    column, value = among[0][start:stop], among[1].unsqueeze(1)
    return (column != value) | (value < 0)


def rerank(query: Tensor, rows: Tensor, slot: Tensor, k: int, among: Among | None) -> tuple[Tensor, Tensor]:
    """Return the k best of each query's candidates ``slot`` [B, m] by their exact scores.

    Returns:
        (score [B, k] float64, slot [B, k] int64), best first. The score of a candidate that is forbidden or not finite
        is -inf.
    """
    score = torch.empty(slot.shape, dtype=torch.float64, device=rows.device)
    step = max(1, _GRID_ENTRIES[rows.device.type] // (slot.shape[1] * rows.shape[1]))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        candidates = to_grid(rows[slot[part].clamp(min=0)])
        torch.bmm(candidates, to_grid(query[part]).unsqueeze(2), out=score[part].unsqueeze(2))
    bad = _is_bad(score) | (slot < 0)  # for a query of NaNs, faiss proposes slot -1
    if among is not None:
        value = among[1].unsqueeze(1)
        bad |= (among[0][slot] != value) | (value < 0)
    return merge(score.masked_fill_(bad, -torch.inf), slot, k)


def exhaustive_search(query: Tensor, rows: Tensor, k: int, among: Among | None) -> tuple[Tensor, Tensor]:
    """Return the k best of all rows by their exact scores, like ``rerank`` with every row as a candidate."""
    if len(query) == 0:
        return query.new_empty(0, k, dtype=torch.float64), query.new_empty(0, k, dtype=torch.int64)
    scores_, slots = [], []
    queries = _QUERIES[query.device.type]
    for first in range(0, len(query), queries):
        part = slice(first, first + queries)
        restriction = None if among is None else (among[0], among[1][part])
        score, slot = _exhaustive_chunked(_grid_units(query[part]), rows, k, restriction)
        scores_.append(score)
        slots.append(slot)
    return (torch.cat(scores_), torch.cat(slots)) if len(scores_) > 1 else (scores_[0], slots[0])


def _exhaustive_chunked(query: Tensor, rows: Tensor, k: int, among: Among | None) -> tuple[Tensor, Tensor]:
    """Search all rows chunk by chunk, for queries in units of the grid.

    Rows with equal scores are the reason for this search, and ``topk`` leaves the order of equal values open. So one
    integer holds both score and place: 2^48 · score, which is below 2^51 for a score below 8, and 12 bits for the
    place in the chunk. No two integers are equal.
    """
    nothing = torch.iinfo(torch.int64).min
    best = query.new_empty(len(query), 0, dtype=torch.float64)
    where = torch.empty_like(best, dtype=torch.int64)
    step = CHUNK if rows.device.type == "cuda" else max(256, min(CHUNK, 2**20 // rows.shape[1]))
    for start in range(0, len(rows), step):
        score = query @ _grid_units(rows[start : start + step]).T  # 2^48 times the score
        bad = _is_bad(score)
        if among is not None:
            bad |= forbidden(among, start, start + score.shape[1])
        place = torch.arange(score.shape[1], device=rows.device)
        code = score.masked_fill_(bad, 0).clamp_(-7 * _GRID * _GRID, 7 * _GRID * _GRID).long()
        code = code.mul_(CHUNK).add_(CHUNK - 1 - place).masked_fill_(bad, nothing)
        code = code.topk(min(k, code.shape[1]), dim=1).values
        score = (code // CHUNK).double().div_(_GRID * _GRID).masked_fill_(code == nothing, -torch.inf)
        slot = start + CHUNK - 1 - code % CHUNK
        if start == 0:  # ``topk`` has sorted them, by score and then by slot
            best, where = score, slot
        else:
            best, where = merge(torch.cat([best, score], 1), torch.cat([where, slot], 1), k)
    return (best, where) if best.shape[1] == k else merge(best, where, k)
