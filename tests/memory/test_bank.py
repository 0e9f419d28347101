"""The bank against a list, and 2 and 4 ranks against one process."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, ResumeError, WorldError
from hpcssl.memory.bank import Bank
from hpcssl.memory.checkpointed import row_reader
from hpcssl.memory.columns import ColumnSpec
from tests.tolerances import rounding

HERE = Path(__file__).parent


def _script(name):
    spec = importlib.util.spec_from_file_location(f"memory_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranks = _script("ranks")
CASES = [
    (size, placement, dtype)
    for size in ranks.RINGS
    for placement in ranks.PLACEMENTS
    for dtype in (torch.float32, torch.float64)
]
ROUNDOFF = torch.finfo(torch.float32).eps / 2  # largest error of a number of at most 1 that is rounded to float32


def bank_of(size, rank=0, world=1, **options):
    """The bank of one rank without the other ranks, for operations that do not communicate."""
    place = World(rank, world, rank, torch.device("cpu"))
    return Bank(size, ranks.COLUMNS, place, key=ranks.KEY, **options)


# -- one process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ranks.RINGS)
def test_the_bank_is_a_list_that_overwrites_its_oldest_rows(size):
    bank, ring = bank_of(size, init="empty"), [None] * size
    for step in range(ranks.STEPS):
        rows = ranks.batch(step)
        bank.push(**rows)
        for i in range(ranks.BATCH):
            ring[(step * ranks.BATCH + i) % size] = {name: x[i] for name, x in rows.items()}
        full = [s for s in range(size) if ring[s] is not None]
        assert (bank.filled, bank.pointer) == (len(full), (step + 1) * ranks.BATCH % size)
        for name in rows:
            rows_of_bank = bank.get(name, torch.arange(size))
            assert all(torch.equal(rows_of_bank[s], ring[s][name]) for s in full)
        query, value = ranks.make_queries(step)
        for i, slots in enumerate(bank.nearest(query, ranks.K, among=("label", value)).slot.tolist()):
            near = sorted(
                (s for s in full if ring[s]["label"] == value[i] and value[i] >= 0),
                key=lambda s, q=query[i]: (-(q.double() @ ring[s]["key"].double()).item(), s),
            )
            assert [s for s in slots if s >= 0] == near[: ranks.K]


def test_neighbors_are_rows_of_the_bank_with_their_inner_products():
    bank = bank_of(64)
    bank.push(**ranks.batch(0))
    query, value = ranks.make_queries(0)
    neighbors = bank.nearest(query, 3)
    assert neighbors.valid.all() and neighbors.slot[0].tolist()[:2] == [0, 1]  # its own row, then the equal one
    assert torch.equal(neighbors.rows, bank.get("key", neighbors.slot))
    # products of float32 are exact in float64, so that only the rounding of their sum to float32 is left
    product = (query[:, None].double() * neighbors.rows.double()).sum(-1)
    torch.testing.assert_close(neighbors.similarity.double(), product, rtol=0, atol=ROUNDOFF)
    # two neighbors are ordered by their scores on the grid, each of which errs by up to sqrt(D) 2^-24 (exact.py)
    assert (neighbors.similarity.double().diff(dim=1) <= 2 * (ranks.D**0.5 * 2.0**-24 + ROUNDOFF)).all()
    few = bank.nearest(query, 3, among=("label", value))
    labels = bank.get("label", few.slot)
    assert torch.equal(labels[few.valid], value[:, None].expand(-1, 3)[few.valid])
    assert (labels[~few.valid] == -1).all() and (few.similarity[~few.valid] == 0).all()
    assert (few.rows[~few.valid] == 0).all() and 0 < few.valid.sum() < few.valid.numel()


def test_queries_of_another_precision_and_without_gradient():
    bank = bank_of(64)
    query = ranks.make_queries(0)[0].requires_grad_()
    assert not bank.nearest(query, 2).rows.requires_grad
    half = bank.nearest(query.detach().bfloat16(), 2)
    assert half.similarity.dtype == torch.bfloat16 and half.rows.dtype == torch.float32


def test_initial_rows_depend_on_the_key_and_the_slot_only():
    whole = bank_of(5000)
    rows = whole.get("key", torch.arange(5000))
    # drawn in float64: of the norm of a row, only the rounding of its entries to float32 is left
    ones = torch.ones(5000, dtype=torch.float64)
    torch.testing.assert_close(rows.double().norm(dim=1), ones, rtol=0, atol=ROUNDOFF)
    assert not torch.equal(rows, whole.get("other", torch.arange(5000)))
    assert not torch.equal(rows[:50], Bank(50, ranks.COLUMNS, World.single_process(), key=1).state()[0]["key"].tensor)
    assert torch.equal(rows[:50], bank_of(50).state()[0]["key"].tensor)
    for world in (2, 3, 7):
        parts = [bank_of(5000, r, world, placement="sharded").state()[0]["key"].tensor for r in range(world)]
        assert torch.equal(torch.cat(parts), rows)
    assert torch.equal(bank_of(5000, dtype=torch.float64).state()[0]["key"].tensor.float(), rows)
    assert (whole.get("label", torch.arange(9)) == -1).all()


def test_initial_rows_can_be_drawn_later_and_never_over_loaded_ones():
    later = bank_of(5000, fill=False)
    assert not later.get("key", torch.arange(5000)).any()
    later.fill()
    whole = {name: shard.tensor.clone() for name, shard in bank_of(5000).state()[0].items()}
    assert all(torch.equal(shard.tensor, whole[name]) for name, shard in later.state()[0].items())
    later.push(**{name: rows[:8] for name, rows in whole.items()})
    shards, numbers = later.state()
    loaded = bank_of(5000, fill=False)
    loaded.load(numbers, row_reader({name: [shard] for name, shard in shards.items()}))
    for bank in (later, loaded):
        bank.fill()
        assert all(torch.equal(shard.tensor, shards[name].tensor) for name, shard in bank.state()[0].items())
        assert torch.equal(bank.get("key", torch.arange(8)), whole["key"][:8])
    empty = bank_of(64, fill=False, init="empty")
    empty.fill()
    assert not empty.state()[0]["key"].tensor.any()


def test_initial_rows_point_in_all_directions():
    """No direction is preferred: the mean of the outer products is the identity over D, within 6 sigma.

    An entry of the sphere has a variance of 1/D, its square one of 2 (D - 1) / (D^2 (D + 2)), and the product of two
    entries a smaller one. Over 136 means, 6 sigma are exceeded with a probability of 3e-7; 4 sigma of the one mean
    product of adjacent rows, of variance 1/D, with 6e-5. The rows are drawn by key: the CPU decides on their last bits
    only.
    """
    n, d = 20_000, ranks.D
    rows = bank_of(n).state()[0]["key"].tensor.double()
    sigma = (2 * (d - 1) / (d**2 * (d + 2)) / n) ** 0.5
    assert (rows.T @ rows / n - torch.eye(d) / d).abs().max() < 6 * sigma
    assert (rows[:-1] * rows[1:]).sum(1).mean().abs() < 4 * (1 / d / n) ** 0.5  # of adjacent slots


def test_an_empty_bank_has_no_neighbors_and_a_random_one_has():
    query = ranks.make_queries(0)[0]
    assert not bank_of(64, init="empty").nearest(query, 3).valid.any()
    assert bank_of(64).nearest(query, 3).valid.all()


def test_only_the_last_push_can_be_undone_and_only_once():
    bank = bank_of(50)
    first, second = bank.push(**ranks.batch(0)), bank.push(**ranks.batch(1))
    with pytest.raises(ValueError, match=rf"^push {first.version}\b"):
        bank.undo(first)
    bank.undo(second)
    with pytest.raises(ValueError, match=rf"^push {second.version}\b"):
        bank.undo(second)
    assert (bank.pointer, bank.filled) == (ranks.BATCH, 50)


def test_an_undone_push_of_nans_changes_nothing():
    bank = bank_of(50)
    bank.push(**ranks.batch(0))
    bad = ranks.batch(1)
    bad["key"] = bad["key"] * torch.nan
    before = ranks.all_columns(bank)
    undo = bank.push(**bad)
    assert bank.nearest(bad["key"], 3).valid.sum() == 0  # the search of a bad step still ends
    bank.undo(undo)
    assert all(torch.equal(x, y) for x, y in zip(before, ranks.all_columns(bank), strict=True))


def test_invalid_arguments_are_refused_and_change_nothing():
    rows, query = ranks.batch(0), ranks.make_queries(0)[0]
    bank = bank_of(50)
    bank.push(**rows)
    before = ranks.all_columns(bank)
    repeated = {name: x[[0] * 25] for name, x in rows.items()}
    integers = {"key": ColumnSpec(3, torch.int64)}
    push, one_process = "a push into the bank", World.single_process()
    for error, what, got, help_text, wrong in (
        (WorldError, push, "24 rows from 1 ranks", "20 slots", lambda: bank_of(20).push(**rows)),
        (WorldError, push, "100 rows from 4 ranks", "50 slots", lambda: bank_of(50, 0, 4).push(**repeated)),
        (ConfigError, push, "{'key': (24, 16)}", "'other': (24, 16)", lambda: bank.push(key=rows["key"])),
        (ConfigError, push, "(5, 16)", "(24, 16)", lambda: bank.push(**{**rows, "other": rows["other"][:5]})),
        (ConfigError, "the bank", "'indx'", "'index'", lambda: bank.nearest(query, 3, column="indx")),
        (ConfigError, "the bank", "'lable'", "'label'", lambda: bank.nearest(query, 3, among=("lable", rows["label"]))),
        (ConfigError, "column 'label'", "(24, 16)", "[b, D]", lambda: bank.nearest(query, 3, column="label")),
        (ConfigError, "the 0 nearest", "(24, 16)", "k of 1", lambda: bank.nearest(query, 0)),
        (ConfigError, "column 'key'", "(24, 4)", "[b, 16]", lambda: bank.nearest(query[:, :4], 3)),
        (ConfigError, "bank.placement", "'shard'", "'sharded'", lambda: bank_of(50, placement="shard")),
        (ConfigError, "bank.init", "'emty'", "'empty'", lambda: bank_of(50, init="emty")),
        (ConfigError, "bank.prefilter", "'bf61'", "'bf16'", lambda: bank_of(50, prefilter="bf61")),
        (ConfigError, "the bank", "0 slots", "bank.size", lambda: bank_of(0)),
        (ConfigError, "column 'key'", "torch.int64", "float64", lambda: Bank(9, integers, one_process, key=1)),
    ):
        with pytest.raises(error) as caught:
            wrong()
        assert what in caught.value.what and got in str(caught.value.got)
        assert help_text in f"{caught.value.expected} {caught.value.fix}"
    assert all(torch.equal(x, y) for x, y in zip(before, ranks.all_columns(bank), strict=True))


def test_a_saved_bank_of_another_size_or_precision_is_refused():
    bank = bank_of(50)
    parts, numbers = bank.state()
    read = row_reader({name: [part] for name, part in parts.items()})
    other = bank_of(50, dtype=torch.float64)
    gap = row_reader({name: [TensorShard(part.tensor[:20], 0, 50)] for name, part in parts.items()})
    for wrong in (
        lambda: bank_of(40).load({"pointer": 45, "filled": 50}, read),
        lambda: bank_of(60).load(numbers, read),
        lambda: other.load(numbers, read),
        lambda: bank.load({}, read),
        lambda: bank.load(numbers, gap),
    ):
        with pytest.raises(ResumeError):
            wrong()
    undo = bank.push(**ranks.batch(0))
    bank.load(numbers, read)
    with pytest.raises(ValueError, match=rf"^push {undo.version}\b"):
        bank.undo(undo)


# -- several ranks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_process():
    return {case: ranks.push_and_search(World.single_process(), *case) for case in CASES}


@pytest.fixture(scope="module", params=[2, 4])
def world(request, tmp_path_factory):
    """The results of every rank with gloo, for all sizes and placements, from one start."""
    return run_ranks(request.param, tmp_path_factory.mktemp(f"world{request.param}"))


def run_ranks(size, folder, device="cpu"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(HERE.parents[1])
    children = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(folder), device],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": str(size),
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONPATH": root,
            },
        )
        for r in range(size)
    ]
    try:
        errors = [child.communicate(timeout=240)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(errors)
    return [torch.load(folder / f"{r}.pt", weights_only=False, map_location="cpu") for r in range(size)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_world_size_and_placement_finds_the_same(world, single_process, case):
    results, bank = single_process[case]
    for i, whole in enumerate(results):
        assert torch.equal(torch.cat([rank[case][0][i] for rank in world]), whole)
    for rank in world:
        for column, whole in zip(rank[case][1], ranks.all_columns(bank), strict=True):
            assert torch.equal(column, whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_saved_bank_loads_on_other_world_sizes_in_either_placement(world, single_process, case):
    size, _, dtype = case
    numbers = world[-1][case][2][1]
    read = row_reader({name: [rank[case][2][0][name] for rank in world] for name in ranks.COLUMNS})
    whole = ranks.all_columns(single_process[case][1])
    query, value = ranks.make_queries(99, dtype)
    for placement in ranks.PLACEMENTS:
        for others in (1, 3, 5):
            banks = [bank_of(size, r, others, placement=placement, dtype=dtype) for r in range(others)]
            for bank in banks:
                bank.load(numbers, read)
            again = row_reader({name: [bank.state()[0][name] for bank in banks] for name in ranks.COLUMNS})
            for name, rows in zip(ranks.COLUMNS, whole, strict=True):
                assert torch.equal(again(name, 0, size), rows)
        resumed = bank_of(size, placement=placement, dtype=dtype)
        resumed.load(numbers, read)
        uninterrupted = single_process[case][1]
        assert (resumed.pointer, resumed.filled) == (uninterrupted.pointer, uninterrupted.filled)
        actual, expected = (b.nearest(query, 5, among=("label", value)) for b in (resumed, uninterrupted))
        assert torch.equal(actual.slot, expected.slot) and torch.equal(actual.similarity, expected.similarity)


# -- a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_two_ranks_on_one_gpu_find_the_same(single_process, tmp_path):
    """NCCL refuses two processes on one GPU; gloo takes the tensors of a GPU as well."""
    by_rank = run_ranks(2, tmp_path, "cuda:0")
    for case in CASES:
        results, bank = single_process[case]
        for i, whole in enumerate(results):
            found = torch.cat([rank[case][0][i] for rank in by_rank])
            # products of D entries, whose sum a GPU adds in another order
            atol = rounding(whole.dtype, ranks.D) if whole.is_floating_point() else 0
            torch.testing.assert_close(found, whole, rtol=0, atol=atol)
        for rank in by_rank:
            for column, whole in zip(rank[case][1], ranks.all_columns(bank), strict=True):
                assert torch.equal(column, whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_agrees_with_the_cpu(single_process, case):
    size, placement, dtype = case
    cpu, gpu = (
        Bank(size, ranks.COLUMNS, World.single_process(d), placement=placement, key=ranks.KEY, dtype=dtype)
        for d in ("cpu", "cuda")
    )
    for step in range(4):
        rows = ranks.batch(step, dtype)
        cpu.push(**rows)
        undo = gpu.push(**{name: x.cuda() for name, x in rows.items()})
        gpu.undo(undo)
        gpu.push(**{name: x.cuda() for name, x in rows.items()})
        query, value = ranks.make_queries(step, dtype)
        expected = cpu.nearest(query, 5, among=("label", value))
        actual = gpu.nearest(query.cuda(), 5, among=("label", value.cuda()))
        assert torch.equal(actual.slot.cpu(), expected.slot) and torch.equal(actual.rows.cpu(), expected.rows)
        # from equal rows in float64, then rounded to their type
        tolerance = rounding(torch.float64, ranks.D) + torch.finfo(dtype).eps
        torch.testing.assert_close(actual.similarity.cpu(), expected.similarity, rtol=0, atol=tolerance)


# -- rerank and mean ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ranks.PLACEMENTS)
def test_rerank_gives_the_nearest_of_some_slots(placement):
    bank = bank_of(50, init="empty", placement=placement)
    for step in range(2):
        bank.push(**ranks.batch(step))
    query, _ = ranks.make_queries(1)
    slots = torch.arange(ranks.BATCH)[:, None] + torch.tensor([7, 0, 1, 12, -ranks.BATCH])  # the last is no slot
    neighbors = bank.rerank(query, slots, 4)
    rows = bank.get("key", torch.arange(50)).double()
    for i, slot in enumerate(neighbors.slot.tolist()):
        allowed = [s for s in slots[i].tolist() if s >= 0]
        assert slot == sorted(allowed, key=lambda s, q=query[i]: (-float(q.double() @ rows[s]), s))[:4]
    assert neighbors.valid.all() and torch.equal(neighbors.rows, bank.get("key", neighbors.slot))
    assert bank.rerank(query, torch.full((ranks.BATCH, 4), -1), 4).valid.sum() == 0


def test_mean_of_the_allowed_rows_does_not_depend_on_their_order():
    bank = bank_of(64)
    for step in range(4):
        bank.push(**ranks.batch(step))
    _, value = ranks.make_queries(0)
    mean, count = bank.mean(("label", value))
    key, label = bank.get("key", torch.arange(64)).double(), bank.get("label", torch.arange(64))
    for i, v in enumerate(value.tolist()):
        rows = key[label == v] if v >= 0 else key[:0]
        assert int(count[i]) == len(rows)
        torch.testing.assert_close(
            mean[i].double(), rows.mean(0) if len(rows) else torch.zeros(ranks.D).double(), rtol=0, atol=ROUNDOFF
        )
    reversed_bank = bank_of(64)
    for name, column in reversed_bank._rows.items():
        column.copy_(bank.get(name, torch.arange(64)).flip(0))
    assert torch.equal(reversed_bank.mean(("label", value))[0], mean) and count.max() > 0 and count.min() == 0
