"""The k nearest rows by inner product, with one answer whatever computes it.

    q_BD    queries, unit length        r_ND    rows, unit length
    near    the k slots with the largest <fix(q), fix(r)>, fix(x) = round(2^24 x) / 2^24; equal ones by lower slot

A floating-point product depends on how a library blocks its sums: another batch size, chunk, thread count or
split over ranks gives other last bits, and with them other neighbours wherever two rows are close. So neighbours
are decided by an inner product that has no rounding to depend on: on a grid of 2^-24 the entries of unit vectors
have products on a grid of 2^-48, and any partial sum of them is at most about 1, hence exact in float64 in any
order. Moving an entry to the grid costs at most 2^-25, about what float32 itself has lost.

Exact arithmetic is slow, so a fast product (faiss, or a matrix product in chunks) proposes some more than k.
Its worst-case error is known: where the exact k-th value clears the worst proposal by more, no row outside can
belong to the answer. The few queries where it does not (a collapsed network: all rows alike) are searched again:
after bfloat16 in float32, after float32 in exact arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hpcssl.errors import ConfigError
from hpcssl.errors import nearest as nearest_name

try:
    import faiss
except ImportError:  # an extra; without it the chunks below find the same, somewhat later
    faiss = None

PREFILTERS = ("fp32", "bf16")
SPARE = {"fp32": 3, "bf16": 59}
"""Proposals beyond k: the further out they reach, the more they certify; a coarse product needs more of them."""
SMALL = 4096
"""Up to this many rows the exact product is as quick as the detour."""
_GRID = 2.0**24
_CHUNK = 4096  # rows at a time on a CPU, whose product stays in the cache; 12 bits
_QUERIES = 256  # queries at a time, which bounds the memory
_COPY = 2**24  # bytes of allowed rows that a search copies out of all rows


def nearest(query: Tensor, rows: Tensor, k: int, *, among: tuple[Tensor, Tensor] | None = None,
            prefilter: str = "fp32", exact: bool | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest of ``rows`` [N, D] for each of ``query`` [B, D]; both of unit length, on one device.

    ``among=(column [N], value [B])`` (integers) allows query i the rows whose column equals its value; a value
    below 0 means "unknown" and allows none. ``prefilter``: propose in float32, or in bfloat16, which is quicker
    where tensor units exist. ``exact``: certify the proposals, and search again where that fails; a GPU has to
    wait for the host, so by default only a CPU does it. Non-finite rows and queries have no neighbours.

    Returns (score [B, k] float64, slot [B, k] int64), best first; -inf and -1 where fewer than k are allowed.
    Extra memory: below 40 MiB on a CPU, 64 MiB on a GPU, for up to 1,024 queries of 512 entries.
    """
    if prefilter not in PREFILTERS:
        raise ConfigError("the bank's prefilter", got=repr(prefilter), expected=" or ".join(PREFILTERS),
                          mend=nearest_name(str(prefilter), PREFILTERS))
    query = query.detach().to(rows.dtype)
    exact = rows.device.type == "cpu" if exact is None else exact
    if among is not None and rows.device.type == "cpu":  # a GPU would have to wait for the host
        narrowed = _narrowed(query, rows, k, among, prefilter, exact)
        if narrowed is not None:
            return narrowed
    # under autocast the products below would become bfloat16 in silence
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if len(rows) <= max(SMALL, k + SPARE[prefilter]) or rows.dtype == torch.float64:
            score, slot = _exhaustive(query, rows, k, among)
        else:
            finer = {"bf16": ("bf16", "fp32"), "fp32": ("fp32",)}[prefilter]
            score, slot = _certified(query, rows, k, among, finer, exact)
        return score, slot.masked_fill(torch.isneginf(score), -1)


def _narrowed(query, rows, k, among, prefilter, exact) -> tuple[Tensor, Tensor] | None:
    """The search over the rows that anybody may have, where they are few or all; None where they are neither."""
    column, value = among
    asked = value[value >= 0].unique()
    if len(asked) == 1 and bool((column == asked).all()):
        score, slot = nearest(query, rows, k, prefilter=prefilter, exact=exact)
        nobody = (value < 0).unsqueeze(1)
        return score.masked_fill(nobody, -torch.inf), slot.masked_fill(nobody, -1)
    some = torch.isin(column, asked).nonzero().squeeze(1)
    if len(some) == len(rows) or len(some) * rows.shape[1] * rows.element_size() > _COPY:
        return None
    score, slot = nearest(query, rows[some], k, among=(column[some], value), prefilter=prefilter, exact=exact)
    return score, torch.cat((some, some.new_full((1,), -1)))[slot]


def merge(score: Tensor, slot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of [B, m] exact scores, best first, equal ones by lower slot; padded with -inf if m < k."""
    short = max(0, k - score.shape[1])
    score, slot = F.pad(score, (0, short), value=-torch.inf), F.pad(slot, (0, short))
    slot, order = slot.sort(dim=1)
    score, best = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    return score[:, :k], slot.gather(1, best)[:, :k]


def scores(query: Tensor, rows: Tensor) -> Tensor:
    """Exact scores of each query's own rows: [B, D] and [B, m, D] to [B, m] float64; -inf for what is not finite."""
    score = torch.bmm(_fix(rows), _fix(query).unsqueeze(2)).squeeze(2)
    return score.masked_fill_(~score.isfinite(), -torch.inf)


def sums(rows: Tensor, among: tuple[Tensor, Tensor], *, most: int) -> tuple[Tensor, Tensor]:
    """(sum [B, D] float64 of the rows that ``among`` allows each query, their count [B] int64).

    ``most`` rows of unit length can be added without rounding, whatever the order: on a grid of 2^-g with
    g = 51 - log2(most) the sum fits the 53 bits of a float64.
    """
    grid, value = 2.0 ** (51 - max(1, most - 1).bit_length()), among[1]
    total = rows.new_zeros(len(value), rows.shape[1], dtype=torch.float64)
    count = torch.zeros_like(value)
    for some in torch.isin(among[0], value[value >= 0]).nonzero().squeeze(1).split(_CHUNK):  # most rows are nobody's
        part = rows[some].to(torch.float64, copy=True).mul_(grid).round_().div_(grid)
        allowed = ~_forbidden((among[0][some], value), 0, len(some))
        total += allowed.double() @ part
        count += allowed.sum(1)
    return total, count


def _fix(x: Tensor) -> Tensor:
    return x.to(torch.float64, copy=True).mul_(_GRID).round_().div_(_GRID)


def _forbidden(among: tuple[Tensor, Tensor], start: int, stop: int) -> Tensor:
    column, value = among[0][start:stop], among[1].unsqueeze(1)
    return (column != value) | (value < 0)


def _certified(query, rows, k, among, prefilters, exact) -> tuple[Tensor, Tensor]:
    """Propose and rank; what cannot be vouched for, once more by the next prefilter, and in the end exactly."""
    if not prefilters:
        return _exhaustive(query, rows, k, among)
    bar, slot, error = _propose(query, rows, k + SPARE[prefilters[0]], among, prefilters[0])
    score, slot = _rank(query, rows, slot, k, among)
    if exact:
        certain = (score[:, -1] > bar + error) | torch.isneginf(bar)
        again = (~certain).nonzero().squeeze(1)
        if len(again):
            rest = None if among is None else (among[0], among[1][again])
            score[again], slot[again] = _certified(query[again], rows, k, rest, prefilters[1:], exact)
    return score, slot


# -- proposals --------------------------------------------------------------------------------------------------

def _propose(query, rows, m, among, prefilter) -> tuple[Tensor, Tensor, float]:
    """m candidates per query: (a bar that no other row's score exceeds [B], slots [B, m], error of a score).

    The inner product of unit vectors, summed in any order, errs by at most D·2^-24 in float32; the grid adds
    less than that again. 2^-7 covers bfloat16, and the tensor-core formats that a user may have switched on.
    """
    plain = prefilter == "fp32"
    if faiss is not None and plain and rows.device.type == "cpu" and among is None:
        score, slot = _by_faiss(query, rows, m)
    else:
        score, slot = _by_chunks(query, rows, m, among, prefilter)
        plain = plain and _full_float32()
    return score.amin(1).double(), slot, 2 * (rows.shape[1] + 2) * 2.0**-24 if plain else 2.0**-7


def _by_faiss(query, rows, m):
    if faiss.omp_get_max_threads() != torch.get_num_threads():
        faiss.omp_set_num_threads(torch.get_num_threads())  # it counts for itself; ranks share the cores
    faiss.cvar.distance_compute_blas_threshold = 1  # few queries too by matrix product: 64 ms, not 270
    score, slot = faiss.knn(query.contiguous().numpy(), rows.numpy(), m, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(score), torch.from_numpy(slot)


def _by_chunks(query, rows, m, among, prefilter):
    query = query.bfloat16() if prefilter == "bf16" else query
    step = _step(query)
    room = query.new_empty(len(query) * step)
    best = query.new_empty(len(query), 0)
    where = torch.empty_like(best, dtype=torch.int64)
    for start in range(0, len(rows), step):
        part = rows[start:start + step].to(query.dtype)
        score = room[:len(query) * len(part)].view(len(query), len(part))
        torch.mm(query, part.T, out=score)
        if among is not None:
            score.masked_fill_(_forbidden(among, start, start + len(part)), -torch.inf)
        score, slot = score.topk(min(m, len(part)), dim=1, sorted=False)
        best, where = torch.cat([best, score], 1), torch.cat([where, slot + start], 1)
        if best.shape[1] > m:
            best, kept = best.topk(m, dim=1, sorted=False)
            where = where.gather(1, kept)
    return best, where


def _full_float32() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set through torch's newer switches, of which there are several: expect the worst
        return False


def _step(query: Tensor) -> int:
    """Rows at a time: a product of at most 16 MiB, and no more rows than pay."""
    most = _CHUNK if query.device.type == "cpu" else 8 * _CHUNK
    return max(256, min(most, 2**24 // (query.element_size() * max(1, len(query)))))


# -- exact arithmetic -------------------------------------------------------------------------------------------

def _rank(query, rows, slot, k, among) -> tuple[Tensor, Tensor]:
    """The best k of the proposals by their exact scores."""
    score = torch.empty(slot.shape, dtype=torch.float64, device=rows.device)
    step = max(1, 2**19 // (slot.shape[1] * rows.shape[1]))  # 4 MiB of float64
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        near = _fix(rows[slot[part].clamp(min=0)])
        torch.bmm(near, _fix(query[part]).unsqueeze(2), out=score[part].unsqueeze(2))
    bad = ~score.isfinite() | (slot < 0)  # faiss proposes slot -1 to a query of NaNs
    if among is not None:
        value = among[1].unsqueeze(1)
        bad |= (among[0][slot] != value) | (value < 0)
    return merge(score.masked_fill_(bad, -torch.inf), slot, k)


def _exhaustive(query, rows, k, among) -> tuple[Tensor, Tensor]:
    """The best k of all rows by their exact scores."""
    scores, slots = [query.new_empty(0, k, dtype=torch.float64)], [query.new_empty(0, k, dtype=torch.int64)]
    for first in range(0, len(query), _QUERIES):
        part = slice(first, first + _QUERIES)
        some = None if among is None else (among[0], among[1][part])
        score, slot = _exhaustive_part(_fix(query[part]), rows, k, some)
        scores.append(score)
        slots.append(slot)
    return torch.cat(scores), torch.cat(slots)


def _exhaustive_part(fixed, rows, k, among) -> tuple[Tensor, Tensor]:
    """Equal scores are what this search is for, and top-k leaves their order open. So one integer holds both:
    2^48·score, below 2^51 for a score below 8, and 12 bits for the place in the chunk. No two are equal."""
    nothing = torch.iinfo(torch.int64).min
    best = fixed.new_empty(len(fixed), 0)
    where = torch.empty_like(best, dtype=torch.int64)
    step = max(256, min(_CHUNK, 2**20 // rows.shape[1]))
    for start in range(0, len(rows), step):
        score = fixed @ _fix(rows[start:start + step]).T
        bad = ~score.isfinite()
        if among is not None:
            bad |= _forbidden(among, start, start + score.shape[1])
        place = torch.arange(score.shape[1], device=rows.device)
        code = score.masked_fill_(bad, 0).clamp_(-7.0, 7.0).mul_(_GRID * _GRID).long()
        code = code.mul_(_CHUNK).add_(_CHUNK - 1 - place).masked_fill_(bad, nothing)
        code = code.topk(min(k, code.shape[1]), dim=1).values
        score = (code // _CHUNK).double().div_(_GRID * _GRID).masked_fill_(code == nothing, -torch.inf)
        slot = start + _CHUNK - 1 - code % _CHUNK
        best, where = merge(torch.cat([best, score], 1), torch.cat([where, slot], 1), k)
    return merge(best, where, k)
