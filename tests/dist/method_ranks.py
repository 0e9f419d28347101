"""One rank of a world that takes some float64 steps of many recipes: ``python method_ranks.py FOLDER`` with torchrun's
variables. FOLDER/cases.json holds the shards' folder and {case: [recipe, overrides]}.

What this rank holds in the end goes to FOLDER/RANK.pt; test_methods.py compares it with ``play(World.alone(), …)``.
"""

import json
import sys
from pathlib import Path

import torch

from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.train import recipe, replicas
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.train.support import attach
from hpcssl.world import World

STEPS, BATCH = 2, 8
BASE = ["views.size=8", f"optim.batch={BATCH}", f"schedule.steps={STEPS}", "bank.size=19", "model.norm=whole",
        "optim.precision=fp64", "machine.devices=cpu"]


def steps(world, shards, name, overrides):
    """Losses, the last step's gradients, and the state after the last: this rank's part of each."""
    made = recipe.compose(name, [f"data.train={shards.root}", *BASE, *overrides])
    order = Order([s.samples for s in shards.shards], seed=made.seed, global_batch=BATCH, window="all",
                  micro_batches=made.machine.accumulate)
    training = Training(made, world, steps_per_epoch=order.steps_per_epoch, labels=shards.labels,
                        data_digest=shards.digest)
    gradients = {}

    def keep(optimizer, *_):
        gradients.update({n: p.grad.clone() for n, p in training.pair.online.named_parameters() if p.grad is not None})

    training.optimizer.register_step_pre_hook(keep)
    reader = Reader(shards)
    attach(training, reader)
    loader = Loader(reader, order, training.view_specs, seed=made.seed, rank=world.rank, size=world.size)
    try:
        losses = [world.mean(train_step(training, batch).scalars["loss"]) for batch in loader.run(0, STEPS)]
    finally:
        loader.close()
    replicas.check(training)
    state = {n: (rows.local.clone(), rows.total) for n, rows in training.state().tensors.items()}
    return {"loss": torch.stack(losses), "grad": gradients, "state": state}


def play(world, folder):
    plan = json.loads(Path(folder, "cases.json").read_text())
    shards = ShardSet.open(Path(plan["shards"]))
    return {case: steps(world, shards, *made) for case, made in plan["cases"].items()}


def main(folder):
    torch.set_num_threads(1)
    world = World.start("cpu", timeout_s=120)
    seen = play(world, folder)
    torch.save(seen, f"{folder}/{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
