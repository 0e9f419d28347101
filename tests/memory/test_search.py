"""The search against the same definition in integers, for every path, kind of rows, split and thread count."""

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
    if kind == "duplicates":  # each row about 150 times: far more than any spare proposals
        return unit(40, D)[torch.from_numpy(rng.permutation(rng.key(1), N)) % 40].contiguous()
    if kind == "collapsed":
        return F.normalize(unit(1, D) + 1e-5 * unit(N, D), dim=1)
    return unit(N, D)


def literal(query, rows, k, allowed=None):
    """Integers on the grid, and Python's sort. No floating point after the rounding."""
    whole = (np.rint(query.double().numpy() * 2**24).astype(np.int64)
             @ np.rint(rows.double().numpy() * 2**24).astype(np.int64).T)
    slots = []
    for i, scores in enumerate(whole.tolist()):
        open_to = [s for s in range(len(rows)) if allowed is None or allowed[i][s]]
        found = sorted(open_to, key=lambda s: (-scores[s], s))[:k]
        slots.append(found + [-1] * (k - len(found)))
    return torch.tensor(slots)


def by(path, monkeypatch, *arguments, **options):
    """The search forced along one path."""
    if path == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(search, "faiss", None)
    monkeypatch.setattr(search, "SMALL", N if path == "exhaustive" else 0)
    return search.nearest(*arguments, prefilter="bf16" if path == "bf16" else "fp32", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_finds_the_literal_neighbours(path, kind, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind(kind)
    query[3], query[4] = rows[17], -rows[17]
    score, slot = by(path, monkeypatch, query, rows, K)
    assert torch.equal(slot, literal(query, rows, K))
    near = (query.double().unsqueeze(1) * rows[slot].double()).sum(-1)
    assert (score - near).abs().max() < D**0.5 * 2.0**-24


@pytest.mark.parametrize("path", PATHS)
def test_among_takes_allowed_rows_only_and_says_where_there_are_too_few(path, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind("duplicates")
    column = torch.arange(N) % 2500  # two or three rows each: fewer than k
    column[::2] = 9
    value = torch.arange(B) - 2  # -2 and -1: unknown
    allowed = (column[None] == value[:, None]) & (value[:, None] >= 0)
    score, slot = by(path, monkeypatch, query, rows, K, among=(column, value))
    assert torch.equal(slot, literal(query, rows, K, allowed.tolist()))
    assert torch.equal(torch.isneginf(score), slot < 0)
    assert (slot[:2] < 0).all() and (slot[11] >= 0).all()  # value 9 has rows in plenty
    assert 0 < (slot[3] >= 0).sum() < K


@pytest.mark.parametrize("path", PATHS)
def test_batch_threads_and_split_change_no_bit(path, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind("collapsed")
    whole = by(path, monkeypatch, query, rows, K)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [by(path, monkeypatch, q[None], rows, K) for q in query[:5]]
        again = by(path, monkeypatch, query, rows, K)
    finally:
        torch.set_num_threads(threads)
    halves = [by(path, monkeypatch, query, half, K) for half in (rows[:2500], rows[2500:])]
    merged = search.merge(torch.cat([s for s, _ in halves], 1),
                          torch.cat([halves[0][1], halves[1][1] + 2500], 1), K)
    for name, other in {"threads": again, "split": merged}.items():
        assert torch.equal(whole[0], other[0]) and torch.equal(whole[1], other[1]), name
    for i, (score, slot) in enumerate(alone):
        assert torch.equal(whole[0][i], score[0]) and torch.equal(whole[1][i], slot[0])


@pytest.mark.parametrize("path", PATHS)
def test_rows_and_queries_that_are_not_finite_have_no_neighbours(path, monkeypatch):
    query, rows = unit(B, D, at="query"), rows_of_kind("random")
    rows[10] = torch.nan
    rows[11, 3] = torch.inf
    query[0], query[1] = torch.nan, rows[12]
    slot = by(path, monkeypatch, query, rows, K)[1]
    assert (slot[0] == -1).all() and slot[1, 0] == 12
    assert (slot[1:] >= 0).all() and not torch.isin(slot, torch.tensor([10, 11])).any()


def test_proposals_alone_rarely_miss(monkeypatch):
    query, rows = unit(400, D, at="query"), rows_of_kind("random")
    for path in ("faiss", "chunks", "bf16"):
        loose, sure = (by(path, monkeypatch, query, rows, K, exact=e)[1] for e in (False, True))
        hit = (loose.unsqueeze(2) == sure.unsqueeze(1)).any(2).float().mean()
        assert hit >= 0.999, path


def test_the_certificate_fails_on_collapsed_rows_only(monkeypatch):
    """Otherwise every search would be the slow one, or none would be checked."""
    query, searched = unit(B, D, at="query"), []
    slow = search._exhaustive
    monkeypatch.setattr(search, "_exhaustive", lambda q, *rest: searched.append(len(q)) or slow(q, *rest))
    by("chunks", monkeypatch, query, rows_of_kind("random"), K)
    assert searched == []
    by("chunks", monkeypatch, query, rows_of_kind("collapsed"), K)
    assert searched == [B]


def test_what_bfloat16_cannot_tell_apart_float32_can(monkeypatch):
    query, rows, asked = unit(B, D, at="query"), unit(N, D), []
    rows = F.normalize(unit(1, D) + 0.02 * rows, dim=1)  # all within about 0.04 of each other
    propose = search._propose
    monkeypatch.setattr(search, "_propose", lambda q, *rest: asked.append((rest[-1], len(q))) or propose(q, *rest))
    monkeypatch.setattr(search, "_exhaustive", None)
    _, slot = by("bf16", monkeypatch, query, rows, K)
    assert asked[0] == ("bf16", B) and asked[1][0] == "fp32" and 0 < asked[1][1] <= B
    assert torch.equal(slot, literal(query, rows, K))


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
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        search.nearest(unit(1, D), unit(N, D), K, prefilter="bf15")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prefilter", search.PREFILTERS)
def test_a_gpu_finds_the_neighbours_of_the_cpu(prefilter):
    query, rows = unit(256, 128, at="query"), unit(70_000, 128)
    _, slot = search.nearest(query.double(), rows.double(), K)
    quick = search.nearest(query.cuda(), rows.cuda(), K, prefilter=prefilter)[1].cpu()
    assert (quick.unsqueeze(2) == slot.unsqueeze(1)).any(2).double().mean() >= 0.999
    torch.cuda.reset_peak_memory_stats()
    query_there, rows_there = query.cuda(), rows.cuda()
    before = torch.cuda.memory_allocated()
    sure = search.nearest(query_there, rows_there, K, prefilter=prefilter, exact=True)[1].cpu()
    assert torch.equal(sure, slot)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20
