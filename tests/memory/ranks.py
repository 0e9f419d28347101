"""One rank of several that share banks: ``python ranks.py FOLDER [DEVICE]`` with torchrun's variables.

test_bank.py and tests/dist/test_gpu.py start it. DEVICE is ``cpu`` or a GPU that all ranks share.

Rows are pushed into each bank until it overwrites its oldest ones, and searched. The results of this rank go to
FOLDER/RANK.pt, where the test compares them with those of one process, ``push_and_search(World.single_process(), …)``.
"""

import sys

import torch
from torch.nn import functional as F

from hpcssl import rng
from hpcssl.distributed.world import World
from hpcssl.memory import search
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec

D, BATCH, STEPS, K = 16, 24, 9, 5
COLUMNS = {"key": ColumnSpec(D), "other": ColumnSpec(D), "index": ColumnSpec(), "label": ColumnSpec()}
RINGS = (50, 64, 101)
PLACEMENTS = ("replicated", "sharded")
KEY = rng.key(3, "bank")


def batch(step, dtype=torch.float32):
    """The global batch of a step, drawn by key. Two rows are equal, so that equal scores occur."""
    rows = torch.randn(2, BATCH, D, generator=rng.generator(rng.key(0, "push", step))).to(dtype)
    rows[:, 1] = rows[:, 0]
    index = torch.arange(step * BATCH, (step + 1) * BATCH)
    return {
        "key": F.normalize(rows[0], dim=1),
        "other": F.normalize(rows[1], dim=1),
        "index": index,
        "label": index % 20,
    }


def make_queries(step, dtype=torch.float32):
    query = F.normalize(torch.randn(BATCH, D, generator=rng.generator(rng.key(0, "ask", step))), dim=1).to(dtype)
    query[0] = batch(step, dtype)["key"][0]
    return query, torch.arange(BATCH) - 1


def push_and_search(world, size, placement, dtype=torch.float32):
    """Push and search for STEPS steps.

    Returns:
        The results (the part of this rank) and the bank.
    """
    bank = Bank(
        size, COLUMNS, world, placement=placement, key=KEY, dtype=dtype, init="empty" if size == 101 else "random"
    )
    results = []
    for step in range(STEPS):
        rows = {name: world.local_rows(x).to(world.device) for name, x in batch(step, dtype).items()}
        bank.push(**rows)
        if step % 3 == 1:  # as if a step turned out to be bad: its push is undone and repeated
            before = all_columns(bank)
            undo = bank.push(**{name: x * 0 + 7 for name, x in rows.items()})
            bank.undo(undo)
            assert all(torch.equal(x, y) for x, y in zip(before, all_columns(bank), strict=True))
        query, value = (world.local_rows(x).to(world.device) for x in make_queries(step, dtype))
        for neighbors in (
            bank.nearest(query, K),
            bank.nearest(query, K, column="other"),
            bank.nearest(query, K, among=("label", value)),
        ):
            results += [
                neighbors.slot,
                neighbors.similarity,
                neighbors.valid,
                neighbors.rows,
                bank.get("label", neighbors.slot),
            ]
        results += [
            *bank.mean(("label", value)),
            bank.rerank(query, bank.nearest(query, K, column="other").slot, 3).slot,
        ]
    return results, bank


def all_columns(bank):
    slots = torch.arange(bank.size, device=bank.world.device)
    return [bank.get(name, slots) for name in bank.columns]


def main(folder, device="cpu"):
    torch.set_num_threads(1)
    if device == "cpu":  # a GPU does not certify its proposals, so that few of them may miss a neighbor
        search.SMALL, search.SPARE["fp32"] = 0, 2  # otherwise banks this small are searched exactly at once
    world = World.start("cpu", timeout_s=60)
    world.device = torch.device(device)
    by_case = {}
    for size in RINGS:
        for placement in PLACEMENTS:
            for dtype in (torch.float32, torch.float64):
                results, bank = push_and_search(world, size, placement, dtype)
                by_case[size, placement, dtype] = (results, all_columns(bank), bank.state())
    torch.save(by_case, f"{folder}/{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
