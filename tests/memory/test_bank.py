"""The ring against a list, and worlds of 2 and 4 ranks against one process."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcssl.errors import ConfigError, ResumeError, WorldError
from hpcssl.memory.bank import Bank, ColumnSpec, Part, rows_of
from hpcssl.world import World

HERE = Path(__file__).parent


def _script(name):
    spec = importlib.util.spec_from_file_location(f"memory_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranks = _script("ranks")
CASES = [(size, placement, dtype) for size in ranks.RINGS for placement in ranks.PLACEMENTS
         for dtype in (torch.float32, torch.float64)]


def bank_of(size, rank=0, world=1, **options):
    """A bank of one rank of a world that is not there: enough for what needs no other rank."""
    place = World(rank, world, rank, torch.device("cpu"))
    return Bank(size, ranks.COLUMNS, place, key=ranks.KEY, **options)


# -- one process ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", ranks.RINGS)
def test_the_ring_is_a_list_that_forgets(size):
    bank, ring = bank_of(size, start="empty"), [None] * size
    for step in range(ranks.STEPS):
        rows = ranks.batch(step)
        bank.push(**rows)
        for i in range(ranks.BATCH):
            ring[(step * ranks.BATCH + i) % size] = {name: x[i] for name, x in rows.items()}
        full = [s for s in range(size) if ring[s] is not None]
        assert (bank.filled, bank.pointer) == (len(full), (step + 1) * ranks.BATCH % size)
        for name in rows:
            held = bank.get(name, torch.arange(size))
            assert all(torch.equal(held[s], ring[s][name]) for s in full)
        query, value = ranks.question(step)
        for i, hits in enumerate(bank.nearest(query, ranks.K, among=("label", value)).slot.tolist()):
            near = sorted((s for s in full if ring[s]["label"] == value[i] and value[i] >= 0),
                          key=lambda s, q=query[i]: (-(q.double() @ ring[s]["key"].double()).item(), s))
            assert [s for s in hits if s >= 0] == near[:ranks.K]


def test_hits_are_rows_of_the_bank_with_their_inner_products():
    bank = bank_of(64)
    bank.push(**ranks.batch(0))
    query, value = ranks.question(0)
    hits = bank.nearest(query, 3)
    assert hits.valid.all() and hits.slot[0].tolist()[:2] == [0, 1]  # its own row, and the equal one behind it
    assert torch.equal(hits.rows, bank.get("key", hits.slot))
    assert torch.allclose(hits.similarity, (query[:, None] * hits.rows).sum(-1), atol=1e-6)
    assert (hits.similarity.diff(dim=1) <= 1e-7).all()
    few = bank.nearest(query, 3, among=("label", value))
    labels = bank.get("label", few.slot)
    assert torch.equal(labels[few.valid], value[:, None].expand(-1, 3)[few.valid])
    assert (labels[~few.valid] == -1).all() and (few.similarity[~few.valid] == 0).all()
    assert (few.rows[~few.valid] == 0).all() and 0 < few.valid.sum() < few.valid.numel()


def test_queries_of_another_precision_and_no_gradient():
    bank = bank_of(64)
    query = ranks.question(0)[0].requires_grad_()
    assert not bank.nearest(query, 2).rows.requires_grad
    half = bank.nearest(query.detach().bfloat16(), 2)
    assert half.similarity.dtype == torch.bfloat16 and half.rows.dtype == torch.float32


def test_the_first_rows_depend_on_the_key_and_the_slot_alone():
    whole = bank_of(5000)
    rows = whole.get("key", torch.arange(5000))
    assert torch.allclose(rows.norm(dim=1), torch.ones(5000), atol=1e-6)
    assert not torch.equal(rows, whole.get("twin", torch.arange(5000)))
    assert not torch.equal(rows[:50], Bank(50, ranks.COLUMNS, World.alone(), key=1).state()[0]["key"].tensor)
    assert torch.equal(rows[:50], bank_of(50).state()[0]["key"].tensor)
    for world in (2, 3, 7):
        parts = [bank_of(5000, r, world, placement="sharded").state()[0]["key"].tensor for r in range(world)]
        assert torch.equal(torch.cat(parts), rows)
    assert torch.equal(bank_of(5000, dtype=torch.float64).state()[0]["key"].tensor.float(), rows)
    assert (whole.get("label", torch.arange(9)) == -1).all()


def test_random_rows_point_in_all_directions():
    """No direction is preferred: the mean of the outer products is the identity over D."""
    rows = bank_of(20_000).state()[0]["key"].tensor.double()
    assert (rows.T @ rows / 20_000 - torch.eye(ranks.D) / ranks.D).abs().max() < 4e-3
    assert (rows[:-1] * rows[1:]).sum(1).mean().abs() < 6e-3


def test_an_empty_bank_has_no_neighbours_and_a_random_one_has():
    query = ranks.question(0)[0]
    assert not bank_of(64, start="empty").nearest(query, 3).valid.any()
    assert bank_of(64).nearest(query, 3).valid.all()


def test_only_the_last_push_can_be_taken_back_and_only_once():
    bank = bank_of(50)
    first, second = bank.push(**ranks.batch(0)), bank.push(**ranks.batch(1))
    with pytest.raises(ValueError, match="only the last push"):
        bank.take_back(first)
    bank.take_back(second)
    with pytest.raises(ValueError, match="only once"):
        bank.take_back(second)
    assert (bank.pointer, bank.filled) == (ranks.BATCH, 50)


def test_a_taken_back_row_of_nans_leaves_no_trace():
    bank = bank_of(50)
    bank.push(**ranks.batch(0))
    bad = ranks.batch(1)
    bad["key"] = bad["key"] * torch.nan
    before = ranks.everything(bank)
    ticket = bank.push(**bad)
    assert bank.nearest(bad["key"], 3).valid.sum() == 0  # a step that went wrong still ends
    bank.take_back(ticket)
    assert all(torch.equal(x, y) for x, y in zip(before, ranks.everything(bank), strict=True))


def test_what_cannot_be_meant_is_refused():
    rows, query = ranks.batch(0), ranks.question(0)[0]
    bank = bank_of(50)
    bank.push(**rows)
    before = ranks.everything(bank)
    for error, words, wrong in (
        (WorldError, "at most its 20 slots", lambda: bank_of(20).push(**rows)),
        (WorldError, "100 rows from 4 ranks", lambda: bank_of(50, 0, 4).push(
            **{n: x[[0] * 25] for n, x in rows.items()})),
        (ConfigError, "every declared column", lambda: bank.push(key=rows["key"])),
        (ConfigError, "one row per image", lambda: bank.push(**{**rows, "twin": rows["twin"][:5]})),
        (ConfigError, "'index'", lambda: bank.nearest(query, 3, column="indx")),
        (ConfigError, "column 'lable'", lambda: bank.nearest(query, 3, among=("lable", rows["label"]))),
        (ConfigError, "a column of vectors", lambda: bank.nearest(query, 3, column="label")),
        (ConfigError, "k of 1 or more", lambda: bank.nearest(query, 0)),
        (ConfigError, "width of the queries", lambda: bank.nearest(query[:, :4], 3)),
        (ConfigError, "'sharded'", lambda: bank_of(50, placement="shard")),
        (ConfigError, "'empty'", lambda: bank_of(50, start="emty")),
        (ConfigError, "'bf16'", lambda: bank_of(50, prefilter="bf61")),
        (ConfigError, "bank.size", lambda: bank_of(0)),
        (ConfigError, "float32 or float64", lambda: Bank(
            9, {"key": ColumnSpec(3, torch.int64)}, World.alone(), key=1)),
    ):
        with pytest.raises(error) as caught:
            wrong()
        assert words in str(caught.value)
    assert all(torch.equal(x, y) for x, y in zip(before, ranks.everything(bank), strict=True))


def test_a_saved_bank_that_does_not_fit_is_refused():
    bank = bank_of(50)
    parts, numbers = bank.state()
    read = rows_of({name: [part] for name, part in parts.items()})
    other = bank_of(50, dtype=torch.float64)
    gap = rows_of({name: [Part(part.tensor[:20], 0, 50)] for name, part in parts.items()})
    for wrong in (lambda: bank_of(40).load({"pointer": 45, "filled": 50}, read),
                  lambda: bank_of(60).load(numbers, read), lambda: other.load(numbers, read),
                  lambda: bank.load({}, read), lambda: bank.load(numbers, gap)):
        with pytest.raises(ResumeError):
            wrong()
    ticket = bank.push(**ranks.batch(0))
    bank.load(numbers, read)
    with pytest.raises(ValueError, match="only the last"):
        bank.take_back(ticket)


# -- several ranks ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def alone():
    return {case: ranks.play(World.alone(), *case) for case in CASES}


@pytest.fixture(scope="module", params=[2, 4])
def world(request, tmp_path_factory):
    """What each rank of a real gloo world saw: all rings and placements in one start."""
    size, folder = request.param, tmp_path_factory.mktemp(f"world{request.param}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(HERE.parents[1])
    children = [subprocess.Popen(
        [sys.executable, str(HERE / "ranks.py"), str(folder)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": root}) for r in range(size)]
    try:
        ends = [child.communicate(timeout=240)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(ends)
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(size)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_world_and_placement_finds_the_same(world, alone, case):
    answers, bank = alone[case]
    for i, whole in enumerate(answers):
        assert torch.equal(torch.cat([seen[case][0][i] for seen in world]), whole)
    for seen in world:
        for held, whole in zip(seen[case][1], ranks.everything(bank), strict=True):
            assert torch.equal(held, whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_saved_bank_loads_on_other_worlds_in_either_placement(world, alone, case):
    size, _, dtype = case
    numbers = world[-1][case][2][1]
    read = rows_of({name: [seen[case][2][0][name] for seen in world] for name in ranks.COLUMNS})
    whole = ranks.everything(alone[case][1])
    query, value = ranks.question(99, dtype)
    for placement in ranks.PLACEMENTS:
        for others in (1, 3, 5):
            banks = [bank_of(size, r, others, placement=placement, dtype=dtype) for r in range(others)]
            for bank in banks:
                bank.load(numbers, read)
            again = rows_of({name: [bank.state()[0][name] for bank in banks] for name in ranks.COLUMNS})
            for name, rows in zip(ranks.COLUMNS, whole, strict=True):
                assert torch.equal(again(name, 0, size), rows)
        resumed = bank_of(size, placement=placement, dtype=dtype)
        resumed.load(numbers, read)
        went_on = alone[case][1]
        assert (resumed.pointer, resumed.filled) == (went_on.pointer, went_on.filled)
        mine, theirs = (b.nearest(query, 5, among=("label", value)) for b in (resumed, went_on))
        assert torch.equal(mine.slot, theirs.slot) and torch.equal(mine.similarity, theirs.similarity)


# -- a GPU ------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_agrees_with_the_cpu(alone, case):
    size, placement, dtype = case
    here, there = (Bank(size, ranks.COLUMNS, World.alone(d), placement=placement, key=ranks.KEY, dtype=dtype)
                   for d in ("cpu", "cuda"))
    for step in range(4):
        rows = ranks.batch(step, dtype)
        here.push(**rows)
        ticket = there.push(**{name: x.cuda() for name, x in rows.items()})
        there.take_back(ticket)
        there.push(**{name: x.cuda() for name, x in rows.items()})
        query, value = ranks.question(step, dtype)
        ours = here.nearest(query, 5, among=("label", value))
        theirs = there.nearest(query.cuda(), 5, among=("label", value.cuda()))
        assert torch.equal(ours.slot, theirs.slot.cpu()) and torch.equal(ours.rows, theirs.rows.cpu())
        assert torch.allclose(ours.similarity, theirs.similarity.cpu(), atol=1e-7)


# -- best and mean ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("placement", ranks.PLACEMENTS)
def test_best_is_the_nearest_among_some_slots(placement):
    bank = bank_of(50, start="empty", placement=placement)
    for step in range(2):
        bank.push(**ranks.batch(step))
    query, _ = ranks.question(1)
    slots = torch.arange(ranks.BATCH)[:, None] + torch.tensor([7, 0, 1, 12, -ranks.BATCH])  # the last is no slot
    hits = bank.best(query, slots, 4)
    rows = bank.get("key", torch.arange(50)).double()
    for i, found in enumerate(hits.slot.tolist()):
        allowed = [s for s in slots[i].tolist() if s >= 0]
        assert found == sorted(allowed, key=lambda s, q=query[i]: (-float(q.double() @ rows[s]), s))[:4]
    assert hits.valid.all() and torch.equal(hits.rows, bank.get("key", hits.slot))
    assert bank.best(query, torch.full((ranks.BATCH, 4), -1), 4).valid.sum() == 0


def test_mean_is_the_mean_of_the_allowed_rows_whatever_their_order():
    bank = bank_of(64)
    for step in range(4):
        bank.push(**ranks.batch(step))
    _, value = ranks.question(0)
    mean, count = bank.mean(("label", value))
    key, label = bank.get("key", torch.arange(64)).double(), bank.get("label", torch.arange(64))
    for i, v in enumerate(value.tolist()):
        rows = key[label == v] if v >= 0 else key[:0]
        assert int(count[i]) == len(rows)
        torch.testing.assert_close(mean[i].double(), rows.mean(0) if len(rows) else torch.zeros(ranks.D).double(),
                                   rtol=0, atol=1e-7)
    turned = bank_of(64)
    for name, held in turned._rows.items():
        held.copy_(bank.get(name, torch.arange(64)).flip(0))
    assert torch.equal(turned.mean(("label", value))[0], mean) and count.max() > 0 and count.min() == 0
