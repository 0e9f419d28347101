"""The exchange of a sharded bank: equal results on many ranks, and the bytes that each of them moves."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from hpcssl import rng
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.collectives import Collectives
from hpcssl.distributed.world import World
from hpcssl.memory import shard_exchange
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec
from hpcssl.memory.embedding_table import EmbeddingTable
from tests.memory import ranks
from tests.memory.threads import run_ranks

MEGABYTE = 10**6


@pytest.mark.parametrize(
    ("world_size", "size"),
    [(3, 50), (24, 50)] + [pytest.param(w, n, marks=pytest.mark.full) for w in (3, 6, 8, 24) for n in ranks.RINGS[1:]],
)
@pytest.mark.parametrize("way", ["_fetch_asked_rows", "_fetch_equal_parts"])
def test_many_ranks_find_what_one_finds(world_size, size, way, monkeypatch):
    """24 ranks with 50 slots: three slots each, the last ranks none. Equal rows of different owners are among them.

    A GPU fetches equal parts from all ranks, so that the host need not know how many rows each of them has.
    """
    monkeypatch.setattr(shard_exchange, "_fetch_asked_rows", getattr(shard_exchange, way))
    expected, whole = ranks.push_and_search(World.single_process(), size, "sharded")
    results = run_ranks(world_size, lambda world: ranks.push_and_search(world, size, "sharded"))
    for i, value in enumerate(expected):
        assert torch.equal(torch.cat([by_rank[i] for by_rank, _ in results]), value)
    for name, column in whole.state()[0].items():
        assert torch.equal(torch.cat([bank.state()[0][name].tensor for _, bank in results]), column.tensor)
    assert {(bank.pointer, bank.filled) for _, bank in results} == {(whole.pointer, whole.filled)}


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_a_push_of_micro_batches_keeps_the_order_of_the_global_batch(micro_batches):
    layout = BatchLayout(ranks.BATCH, micro_batches)

    def push(world):
        bank = Bank(50, ranks.COLUMNS, world, layout=layout, placement="sharded", key=ranks.KEY)
        for step in range(3):
            rows = {name: world.local_batch_rows(x, layout) for name, x in ranks.batch(step).items()}
            bank.undo(bank.push(**rows))
            bank.push(**rows)
        return bank.state()[0]

    whole = push(World.single_process())
    for world_size in (2, 4):
        shards = run_ranks(world_size, push)
        for name in ranks.COLUMNS:
            assert torch.equal(torch.cat([shard[name].tensor for shard in shards]), whole[name].tensor)


@pytest.mark.parametrize("way", ["_fetch_asked_rows", "_fetch_equal_parts"])
def test_bits_arrive_unchanged_and_missing_slots_give_nothing(way, monkeypatch):
    """Not-a-numbers with payloads and negative zeros, which adding would change."""
    monkeypatch.setattr(shard_exchange, "_fetch_asked_rows", getattr(shard_exchange, way))
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800001, -1], dtype=torch.int32)

    def read(world):
        table = EmbeddingTable(7, 4, world, placement="sharded", dtype=torch.float32)
        index = torch.tensor([[6, -1], [3, 0], [1, -1], [-1, 5]])[world.rank]
        table.write(index, bits.view(torch.float32).expand(2, 4))
        asked = torch.tensor([world.rank - 1, 6 - world.rank])
        values, known = table.read(asked)
        return asked, values.view(torch.int32), known

    for asked, values, known in run_ranks(4, read):
        for slot, row, is_known in zip(asked.tolist(), values, known.tolist(), strict=True):
            assert is_known == (slot in {0, 1, 3, 5, 6})
            assert torch.equal(row, bits if is_known else torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_writes_to_chosen_slots_are_those_of_one_process(micro_batches):
    """A bank that replaces random rows, and a table of embeddings: repeated images, and images that are left out."""
    layout = BatchLayout(ranks.BATCH, micro_batches)
    draws = [rng.raw(rng.key(0, "images", step), ranks.BATCH) % 30 for step in range(4)]
    images = [torch.from_numpy(draw.astype("int64")) - 1 for draw in draws]  # repeated ones, and -1

    def write(world):
        table = EmbeddingTable(29, ranks.D, world, layout=layout, placement="sharded", dtype=torch.float32)
        bank = Bank(50, ranks.COLUMNS, world, layout=layout, placement="sharded", key=ranks.KEY)
        for step, index in enumerate(images):
            rows = {name: world.local_batch_rows(x, layout) for name, x in ranks.batch(step).items()}
            table.write(world.local_batch_rows(index, layout), rows["key"], torch.tensor(step != 2))
            push = bank.push(bank.draw_slots(step, ranks.BATCH), torch.tensor(step != 1), **rows)
            if step == 3:
                bank.undo(push)
        return table.state()[0], bank.state()[0]

    whole = write(World.single_process())
    assert whole[0]["known"].tensor.sum() > 20 and (whole[0]["known"].tensor <= 0).any()
    for world_size in (2, 4, 12):
        results = run_ranks(world_size, write)
        for memory, expected in enumerate(whole):
            for name, column in expected.items():
                assert torch.equal(torch.cat([r[memory][name].tensor for r in results]), column.tensor)


# -- bytes --------------------------------------------------------------------------------------------------------


class _Traffic:
    """Counts what the collectives of one rank move, and answers in the place of the other ranks.

    The process group is torch's fake one, which checks calls and moves nothing. A ring sends and receives the result of
    a gather once, and that of a reduction twice. Winning rows lie anywhere in the bank with equal probability.
    """

    def __init__(self, monkeypatch, slots):
        self.sent = self.received = 0
        self.slots, self._number = slots, 0
        self._call = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "all_to_all_single")}
        for name in self._call:
            monkeypatch.setattr(dist, name, getattr(self, name))

    def _draw_slots(self, out):
        self._number += 1
        words = rng.raw(rng.key(0, "slots", self._number), out.numel())
        out.copy_(torch.from_numpy((words % self.slots).astype("int64")).view(out.shape))

    def all_gather(self, parts, x, group=None):
        self._call["all_gather"](parts, x)
        for part in parts:
            if x.dtype == torch.int64:
                self._draw_slots(part)
            else:
                part.copy_(x)
        parts[0].copy_(x)  # this is rank 0
        self.sent += len(parts) * x.nbytes
        self.received += len(parts) * x.nbytes

    def all_reduce(self, x, *arguments, **options):
        self._call["all_reduce"](x, *arguments, **options)
        self.sent += 2 * x.nbytes
        self.received += 2 * x.nbytes

    def all_to_all_single(self, out, x, to_receive=None, to_send=None, group=None):
        self._call["all_to_all_single"](out, x, to_receive, to_send)
        if to_send is None:
            k = out.shape[1] // 2  # candidates: scores and slots
            out[:, :k].view(torch.float64).uniform_(-1, 1)
            self._draw_slots(out[:, k:])
        self.sent += x.nbytes
        self.received += out.nbytes


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_bytes_of_a_search_per_rank(world_size, monkeypatch):
    """10 neighbors for a batch of 4096 queries of 512 entries: at most 20 MB per rank, where it was 420 MB.

    Of these, 8.4 MB are the queries, which every rank needs to search its own rows.
    """
    batch, width, k, slots = 4096, 512, 10, 8192
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        traffic = _Traffic(monkeypatch, slots)
        world = Collectives(0, world_size, torch.device("cpu"))
        bank = Bank(slots, {"key": ColumnSpec(width)}, world, placement="sharded", key=0, init="empty")
        bank.filled = slots
        rows = F.normalize(torch.ones(batch // world_size, width), dim=1)
        bank.push(key=rows)
        pushed = traffic.sent + traffic.received
        traffic.sent = traffic.received = 0
        monkeypatch.setattr("hpcssl.memory.search.nearest", _some_candidates)
        neighbors = bank.nearest(rows, k)
        assert neighbors.rows.shape == (batch // world_size, k, width)
    finally:
        dist.destroy_process_group()
    assert pushed == rows.nbytes + slots // world_size * width * 4  # its own rows, and those of its slots: all new here
    winners = batch // world_size * k
    assert winners * width * 4 < traffic.received < 20 * MEGABYTE
    # a rank sends as many rows as it receives, up to six standard deviations of the number of winners in its block
    assert abs(traffic.sent - traffic.received) < 6 * math.sqrt(winners) * width * 4


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_bytes_of_a_write_per_rank(world_size, monkeypatch):
    """4,096 embeddings of 512 entries: each rank sends its own and receives those of its images, beside their numbers.

    Gathered by all ranks, as they were before, they are 8.4 MB.
    """
    batch, width, images = 4096, 512, 100_000
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        traffic = _Traffic(monkeypatch, images)
        world = Collectives(0, world_size, torch.device("cpu"))
        table = EmbeddingTable(images, width, world, placement="sharded", dtype=torch.float32)
        own = batch // world_size
        table.write(torch.arange(own) * (images // own), torch.ones(own, width))  # images of all owners
        table_bytes = traffic.sent, traffic.received
        traffic.sent = traffic.received = 0
        bank = Bank(images, {"key": ColumnSpec(width)}, world, placement="sharded", key=0, init="empty")
        bank.filled = images
        bank.push(bank.draw_slots(0, batch), key=torch.ones(own, width))
        refill = traffic.received
    finally:
        dist.destroy_process_group()
    sent, received = table_bytes
    numbers = batch * 8  # of the images, which all ranks gather
    # a row whose image stands in the batch of a later rank as well is left out
    assert 0.9 * own * width * 4 <= sent - numbers <= own * (width * 4 + 8)
    rows_of_a_rank = own + 6 * math.sqrt(own)  # they lie anywhere with equal probability: six standard deviations
    assert received - numbers <= rows_of_a_rank * (width * 4 + 8)
    assert refill <= rows_of_a_rank * width * 4
    if world_size == 512:
        assert max(sent, received, refill) < 0.2 * MEGABYTE


def _some_candidates(query, rows, k, **_):
    return torch.zeros(len(query), k, dtype=torch.float64), torch.zeros(len(query), k, dtype=torch.int64)
