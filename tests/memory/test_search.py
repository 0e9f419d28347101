"""The search against the same definition in integers, for every path, kind of rows, split and number of threads."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.memory import search

N, D, B, K = 6000, 24, 37, 5
PATHS = ("exhaustive", "faiss", "chunks", "bf16")
KINDS = ("random", "duplicates", "collapsed")


def unit(*shape, at="rows"):
    return F.normalize(torch.randn(*shape, generator=rng.generator(rng.key(0, at, *shape))), dim=-1)


def rows_of_kind(kind):
    if kind == "duplicates":  # each row about 150 times: far more than the spare proposals
        return unit(40, D)[torch.from_numpy(rng.permutation(rng.key(1), N)) % 40].contiguous()
    if kind == "collapsed":
        return F.normalize(unit(1, D) + 1e-5 * unit(N, D), dim=1)
    return unit(N, D)


def search_literally(query, rows, k, allowed=None):
    """Integers on the grid, and the sort of Python. No floating point after the rounding."""
    whole = (
        np.rint(query.double().numpy() * 2**24).astype(np.int64)
        @ np.rint(rows.double().numpy() * 2**24).astype(np.int64).T
    )
    slots = []
    for i, scores in enumerate(whole.tolist()):
        allowed_slots = [s for s in range(len(rows)) if allowed is None or allowed[i][s]]
        nearest = sorted(allowed_slots, key=lambda s: (-scores[s], s))[:k]
        slots.append(nearest + [-1] * (k - len(nearest)))
    return torch.tensor(slots)


def search_by(path, monkeypatch, *arguments, **options):
    """Search by one path of the implementation."""
    if path == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(search, "faiss", None)
    monkeypatch.setattr(search, "SMALL", N if path == "exhaustive" else 0)
    return search.nearest(*arguments, prefilter="bf16" if path == "bf16" else "fp32", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_finds_the_literal_neighbors(path, kind, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind(kind)
    query[3], query[4] = rows[17], -rows[17]
    score, slot = search_by(path, monkeypatch, query, rows, K)
    assert torch.equal(slot, search_literally(query, rows, K))
    near = (query.double().unsqueeze(1) * rows[slot].double()).sum(-1)
    assert (score - near).abs().max() < D**0.5 * 2.0**-24


@pytest.mark.parametrize("path", PATHS)
def test_among_finds_allowed_rows_only_and_marks_missing_ones(path, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind("duplicates")
    column = torch.arange(N) % 2500  # two or three rows each: fewer than k
    column[::2] = 9
    value = torch.arange(B) - 2  # -2 and -1: unknown
    allowed = (column[None] == value[:, None]) & (value[:, None] >= 0)
    score, slot = search_by(path, monkeypatch, query, rows, K, among=(column, value))
    assert torch.equal(slot, search_literally(query, rows, K, allowed.tolist()))
    assert torch.equal(torch.isneginf(score), slot < 0)
    assert (slot[:2] < 0).all() and (slot[11] >= 0).all()  # value 9 has more than k rows
    assert 0 < (slot[3] >= 0).sum() < K


@pytest.mark.parametrize("path", PATHS)
def test_batch_size_threads_and_split_change_no_bit(path, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind("collapsed")
    whole = search_by(path, monkeypatch, query, rows, K)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = [search_by(path, monkeypatch, q[None], rows, K) for q in query[:5]]
        one_thread = search_by(path, monkeypatch, query, rows, K)
    finally:
        torch.set_num_threads(threads)
    halves = [search_by(path, monkeypatch, query, half, K) for half in (rows[:2500], rows[2500:])]
    merged = search.merge(torch.cat([s for s, _ in halves], 1), torch.cat([halves[0][1], halves[1][1] + 2500], 1), K)
    for name, other in {"threads": one_thread, "split": merged}.items():
        assert torch.equal(whole[0], other[0]) and torch.equal(whole[1], other[1]), name
    for i, (score, slot) in enumerate(single):
        assert torch.equal(whole[0][i], score[0]) and torch.equal(whole[1][i], slot[0])


@pytest.mark.parametrize("path", PATHS)
def test_rows_and_queries_that_are_not_finite_have_no_neighbors(path, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind("random")
    rows[10] = torch.nan
    rows[11, 3] = torch.inf
    query[0], query[1] = torch.nan, rows[12]
    slot = search_by(path, monkeypatch, query, rows, K)[1]
    assert (slot[0] == -1).all() and slot[1, 0] == 12
    assert (slot[1:] >= 0).all() and not torch.isin(slot, torch.tensor([10, 11])).any()


def test_proposals_alone_rarely_miss(monkeypatch):
    """Never with rows as far apart as these: the spare proposals span more than a product in float32 or bf16 errs."""
    query, rows = unit(400, D, at="query"), rows_of_kind("random")
    for path in ("faiss", "chunks", "bf16"):
        proposed, exact = (search_by(path, monkeypatch, query, rows, K, exact=e)[1] for e in (False, True))
        share = (proposed.unsqueeze(2) == exact.unsqueeze(1)).any(2).float().mean()
        assert share == 1, path


def test_the_certificate_fails_on_collapsed_rows_only(monkeypatch):
    """If it always failed, every search would be exhaustive; if it never did, nothing would be checked."""
    query, searched = unit(B, D, at="query"), []
    slow = search.exhaustive_search
    monkeypatch.setattr(search, "exhaustive_search", lambda q, *rest: searched.append(len(q)) or slow(q, *rest))
    search_by("chunks", monkeypatch, query, rows_of_kind("random"), K)
    assert searched == []
    search_by("chunks", monkeypatch, query, rows_of_kind("collapsed"), K)
    assert searched == [B]


def test_rows_that_bfloat16_cannot_distinguish_are_searched_in_float32(monkeypatch):
    query, rows, proposals = unit(B, D, at="query"), unit(N, D), []
    rows = F.normalize(unit(1, D) + 0.02 * rows, dim=1)  # all within about 0.04 of each other
    propose = search._propose
    monkeypatch.setattr(search, "_propose", lambda q, *rest: proposals.append((rest[-1], len(q))) or propose(q, *rest))
    monkeypatch.setattr(search, "exhaustive_search", None)
    _, slot = search_by("bf16", monkeypatch, query, rows, K)
    assert proposals[0] == ("bf16", B) and proposals[1][0] == "fp32" and 0 < proposals[1][1] <= B
    assert torch.equal(slot, search_literally(query, rows, K))


def test_autocast_changes_nothing():
    query, rows = unit(B, D, at="query"), rows_of_kind("random")
    plain = search.nearest(query, rows, K)
    with torch.autocast("cpu", torch.bfloat16):
        cast = search.nearest(query, rows, K)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


def test_no_queries_and_no_rows():
    score, slot = search.nearest(unit(0, D), unit(N, D), K)
    assert score.shape == slot.shape == (0, K)
    score, slot = search.nearest(unit(3, D), unit(0, D), K)
    assert torch.isneginf(score).all() and (slot == -1).all() and slot.shape == (3, K)


def test_an_unknown_prefilter_is_refused():
    with pytest.raises(ConfigError) as caught:
        search.nearest(unit(1, D), unit(N, D), K, prefilter="bf15")
    assert caught.value.got == "'bf15'" and "'bf16'" in caught.value.fix


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prefilter", search.PREFILTERS)
def test_a_gpu_finds_the_neighbors_of_the_cpu(prefilter):
    query, rows = unit(256, 128, at="query"), unit(70_000, 128)
    _, slot = search.nearest(query.double(), rows.double(), K)
    proposed = search.nearest(query.cuda(), rows.cuda(), K, prefilter=prefilter)[1].cpu()
    assert (proposed.unsqueeze(2) == slot.unsqueeze(1)).any(2).double().mean() >= 0.999
    torch.cuda.reset_peak_memory_stats()
    gpu_query, gpu_rows = query.cuda(), rows.cuda()
    before = torch.cuda.memory_allocated()
    exact = search.nearest(gpu_query, gpu_rows, K, prefilter=prefilter, exact=True)[1].cpu()
    assert torch.equal(exact, slot)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20
