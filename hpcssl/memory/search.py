"""The k nearest rows by inner product: the same answer whatever library, device or number of ranks computes it.

    q_BD    queries, unit length        r_ND    rows, unit length
    answer  the k slots with the largest exact score (``exact.py``); of equal scores the lower slot comes first

Exact arithmetic is slow, so a fast product (faiss, or a matrix product in chunks) proposes a few more than k
candidates. Its worst-case error is known: if the exact k-th score exceeds the worst proposal by more than that error,
no other row can belong to the answer. The few queries for which this does not hold (in a collapsed network all rows
are alike) are searched again: after bfloat16 in float32, after float32 in exact arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcssl.errors import require_choice
from hpcssl.memory.exact import CHUNK, Among, exhaustive_search, forbidden, merge, rerank, scores, sums

try:
    import faiss
except ImportError:  # an optional dependency; without it the matrix products below are somewhat slower
    faiss = None  # type: ignore[assignment]  # a module, where it is installed

__all__ = ["PREFILTERS", "SMALL", "SPARE", "merge", "nearest", "scores", "sums"]

PREFILTERS = ("fp32", "bf16")
SPARE = {"fp32": 3, "bf16": 59}
"""Proposals beyond k, by prefilter. More proposals certify more queries, and a coarser product needs more of them."""
SMALL = 4096
"""Up to this many rows, exact arithmetic on all of them is as fast as proposing candidates first."""
_PRODUCT_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of the scores of one chunk of rows
_MOST_ROWS = {"cpu": CHUNK, "cuda": 64 * CHUNK}  # in one chunk; more do not speed it up
_PENDING = 16  # chunks whose candidates are kept before the best are chosen
_COPY_BYTES = 2**24  # a search of few allowed rows copies at most this number of bytes of them


def nearest(
    query: Tensor,
    rows: Tensor,
    k: int,
    *,
    among: Among | None = None,
    prefilter: str = "fp32",
    exact: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of each query.

    Extra memory: below 40 MiB on a CPU, for up to 1,024 queries of 512 entries. On a GPU, where a piece that is too
    small costs as many launches as a large one: 256 MiB for the scores, and up to three times as much for candidates in
    float64.

    Args:
        query: [B, D], unit length, on the device of ``rows``.
        rows: [N, D] float32 or float64, unit length.
        k: number of neighbors, 1 or more.
        among: (column [N], value [B]), both int64: query i may only have rows whose column equals value[i]. A value
            below 0 means "unknown" and allows no row.
        prefilter: precision of the proposals, ``fp32`` or ``bf16``. bfloat16 is faster where there are tensor cores.
        exact: certify the proposals, and search again where that fails. A GPU has to wait for the host to do so;
            None means True on a CPU and False on a GPU.

    Returns:
        (score [B, k] float64, slot [B, k] int64), best first. Where fewer than k rows are allowed, the rest has score
        -inf and slot -1. Rows and queries that are not finite have no neighbors.

    Raises:
        ConfigError: if there is no such prefilter.
    """
    require_choice("the bank's prefilter", prefilter, PREFILTERS)
    query = query.detach().to(rows.dtype)
    exact = rows.device.type == "cpu" if exact is None else exact
    if among is not None and rows.device.type == "cpu":  # a GPU would have to wait for the host
        answer = _search_allowed_rows(query, rows, k, among, prefilter, exact)
        if answer is not None:
            return answer
    # autocast would silently compute the products below in bfloat16
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if len(rows) <= max(SMALL, k + SPARE[prefilter]) or rows.dtype == torch.float64:
            score, slot = exhaustive_search(query, rows, k, among)
        else:
            prefilters = {"bf16": ("bf16", "fp32"), "fp32": ("fp32",)}[prefilter]
            score, slot = _certified_search(query, rows, k, among, prefilters, exact)
        return score, slot.masked_fill(torch.isneginf(score), -1)


def _search_allowed_rows(
    query: Tensor, rows: Tensor, k: int, among: Among, prefilter: str, exact: bool
) -> tuple[Tensor, Tensor] | None:
    """Search only the rows that some query may have, if these are few or all. Returns None if they are neither."""
    column, value = among
    known: Tensor = torch.unique(value[value >= 0])
    if len(known) == 1 and bool((column == known).all()):
        score, slot = nearest(query, rows, k, prefilter=prefilter, exact=exact)
        unknown = (value < 0).unsqueeze(1)
        return score.masked_fill(unknown, -torch.inf), slot.masked_fill(unknown, -1)
    allowed = torch.isin(column, known).nonzero().squeeze(1)
    if len(allowed) == len(rows) or len(allowed) * rows.shape[1] * rows.element_size() > _COPY_BYTES:
        return None
    score, slot = nearest(query, rows[allowed], k, among=(column[allowed], value), prefilter=prefilter, exact=exact)
    return score, torch.cat((allowed, allowed.new_full((1,), -1)))[slot]


def _certified_search(
    query: Tensor, rows: Tensor, k: int, among: Among | None, prefilters: tuple[str, ...], exact: bool
) -> tuple[Tensor, Tensor]:
    """Propose and rank. Queries that cannot be certified go on to the next prefilter, and to exact arithmetic last."""
    if not prefilters:
        return exhaustive_search(query, rows, k, among)
    bound, slot, error = _propose(query, rows, k + SPARE[prefilters[0]], among, prefilters[0])
    score, slot = rerank(query, rows, slot, k, among)
    if exact:
        certain = (score[:, -1] > bound + error) | torch.isneginf(bound)
        again = (~certain).nonzero().squeeze(1)
        if len(again):
            restriction = None if among is None else (among[0], among[1][again])
            score[again], slot[again] = _certified_search(query[again], rows, k, restriction, prefilters[1:], exact)
    return score, slot


# -- proposals --------------------------------------------------------------------------------------------------


def _propose(query: Tensor, rows: Tensor, m: int, among: Among | None, prefilter: str) -> tuple[Tensor, Tensor, float]:
    """Propose m candidates per query.

    The inner product of unit vectors, summed in any order, errs by at most D · 2^-24 in float32; the grid adds less
    than that again. 2^-7 covers bfloat16, and the tensor-core formats that a user may have switched on.

    Returns:
        (upper bound [B] on the fast score of every other row, slots [B, m], error bound of a fast score).
    """
    plain = prefilter == "fp32"
    if faiss is not None and plain and rows.device.type == "cpu" and among is None:
        score, slot = _by_faiss(query, rows, m)
    else:
        score, slot = _by_chunks(query, rows, m, among, prefilter)
        plain = plain and _matmul_is_float32()
    return score.amin(1).double(), slot, 2 * (rows.shape[1] + 2) * 2.0**-24 if plain else 2.0**-7


def _by_faiss(query: Tensor, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    if faiss.omp_get_max_threads() != torch.get_num_threads():
        faiss.omp_set_num_threads(torch.get_num_threads())  # faiss keeps its own count; ranks share the cores
    faiss.cvar.distance_compute_blas_threshold = 1  # few queries by matrix product too: 64 ms instead of 270
    score, slot = faiss.knn(query.contiguous().numpy(), rows.numpy(), m, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(score), torch.from_numpy(slot)


def _by_chunks(query: Tensor, rows: Tensor, m: int, among: Among | None, prefilter: str) -> tuple[Tensor, Tensor]:
    query = query.bfloat16() if prefilter == "bf16" else query
    step = _rows_per_chunk(query)
    buffer = query.new_empty(len(query) * step)
    scores_: list[Tensor] = []
    slots: list[Tensor] = []
    for start in range(0, len(rows), step):
        part = rows[start : start + step].to(query.dtype)
        score = buffer[: len(query) * len(part)].view(len(query), len(part))
        torch.mm(query, part.T, out=score)
        if among is not None:
            score.masked_fill_(forbidden(among, start, start + len(part)), -torch.inf)
        score, slot = score.topk(min(m, len(part)), dim=1, sorted=False)
        scores_.append(score)
        slots.append(slot.add_(start) if start else slot)
        if len(scores_) == _PENDING:
            score, slot = _choose(scores_, slots, m)
            scores_, slots = [score], [slot]
    return _choose(scores_, slots, m)


def _choose(scores_: list[Tensor], slots: list[Tensor], m: int) -> tuple[Tensor, Tensor]:
    """The m best of the candidates of several chunks, in any order."""
    if len(scores_) == 1:
        return scores_[0], slots[0]
    score, slot = torch.cat(scores_, 1), torch.cat(slots, 1)
    if score.shape[1] > m:
        score, kept = score.topk(m, dim=1, sorted=False)
        slot = slot.gather(1, kept)
    return score, slot


def _matmul_is_float32() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through one of torch's newer switches: assume the coarsest format
        return False


def _rows_per_chunk(query: Tensor) -> int:
    """Rows per matrix product: a product of a bounded size, and no more rows than speed it up."""
    device = query.device.type
    return max(256, min(_MOST_ROWS[device], _PRODUCT_BYTES[device] // (query.element_size() * max(1, len(query)))))
