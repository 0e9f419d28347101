"""One rank of a world of banks, started by test_bank.py: ``python ranks.py FOLDER`` with torchrun's variables.

Every ring is filled past its end and asked; what this rank saw goes to FOLDER/RANK.pt, and the test compares.
Alone (``play(World.alone())``) it is the reference for larger worlds.
"""

import sys

import torch
from torch.nn import functional as F

from hpcssl import rng
from hpcssl.memory import search
from hpcssl.memory.bank import Bank, ColumnSpec
from hpcssl.world import World

D, BATCH, STEPS, K = 16, 24, 9, 5
COLUMNS = {"key": ColumnSpec(D), "twin": ColumnSpec(D), "index": ColumnSpec(), "label": ColumnSpec()}
RINGS = (50, 64, 101)
PLACEMENTS = ("replicated", "sharded")
KEY = rng.key(3, "bank")


def batch(step, dtype=torch.float32):
    """The global batch of a step, drawn by address. Some rows come twice, so that equal scores do occur."""
    made = torch.randn(2, BATCH, D, generator=rng.generator(rng.key(0, "push", step))).to(dtype)
    made[:, 1] = made[:, 0]
    index = torch.arange(step * BATCH, (step + 1) * BATCH)
    return {"key": F.normalize(made[0], dim=1), "twin": F.normalize(made[1], dim=1), "index": index,
            "label": index % 20}


def question(step, dtype=torch.float32):
    query = F.normalize(torch.randn(BATCH, D, generator=rng.generator(rng.key(0, "ask", step))), dim=1).to(dtype)
    query[0] = batch(step, dtype)["key"][0]
    return query, torch.arange(BATCH) - 1


def play(world, size, placement, dtype=torch.float32):
    """Push and ask for STEPS steps. Returns what was answered (this rank's part) and the bank."""
    bank = Bank(size, COLUMNS, world, placement=placement, key=KEY, dtype=dtype,
                start="empty" if size == 101 else "random")
    answers = []
    for step in range(STEPS):
        rows = {name: world.part(x) for name, x in batch(step, dtype).items()}
        bank.push(**rows)
        if step % 3 == 1:  # a step that is found to be bad is taken back, and tried again
            before = everything(bank)
            ticket = bank.push(**{name: x * 0 + 7 for name, x in rows.items()})
            bank.take_back(ticket)
            assert all(torch.equal(x, y) for x, y in zip(before, everything(bank), strict=True))
        query, value = (world.part(x) for x in question(step, dtype))
        for hits in (bank.nearest(query, K), bank.nearest(query, K, column="twin"),
                     bank.nearest(query, K, among=("label", value))):
            answers += [hits.slot, hits.similarity, hits.valid, hits.rows, bank.get("label", hits.slot)]
        answers += [*bank.mean(("label", value)), bank.best(query, bank.nearest(query, K, column="twin").slot, 3).slot]
    return answers, bank


def everything(bank):
    every = torch.arange(bank.size)
    return [bank.get(name, every) for name in bank.columns]


def main(folder):
    torch.set_num_threads(1)
    search.SMALL, search.SPARE["fp32"] = 0, 2  # rings this small would all be searched exactly at once
    world = World.start("cpu", timeout_s=60)
    seen = {}
    for size in RINGS:
        for placement in PLACEMENTS:
            for dtype in (torch.float32, torch.float64):
                answers, bank = play(world, size, placement, dtype)
                seen[size, placement, dtype] = (answers, everything(bank), bank.state())
    torch.save(seen, f"{folder}/{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
