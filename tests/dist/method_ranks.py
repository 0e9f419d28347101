"""One rank of several that take some float64 steps of many recipes, started by test_methods.py.

Run as ``python method_ranks.py FOLDER`` with torchrun's variables. FOLDER/cases.json holds the folder of the shards and
{case: [recipe, overrides]}. The results of this rank go to FOLDER/RANK.pt, where the test compares them with those of
one process, ``train_cases(World.single_process(), …)``.
"""

import json
import sys
from pathlib import Path

import torch

from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.train import recipe, replicas
from hpcssl.train.step import train_step
from hpcssl.train.support_set import build_support_loader
from hpcssl.train.train_state import TrainState

STEPS, BATCH = 2, 8
BASE = [
    "views.size=8",
    f"optim.batch={BATCH}",
    f"schedule.steps={STEPS}",
    "bank.size=19",
    "model.norm=sync",
    "optim.precision=fp64",
    "machine.devices=cpu",
]


def train_case(world, shards, name, overrides):
    """Losses, gradients of the last step and final state: the part of this rank of each."""
    values = recipe.compose(name, [f"data.train={shards.root}", *BASE, *overrides])
    order = Order(
        [s.samples for s in shards.shards],
        seed=values.seed,
        global_batch=values.optim.batch,
        window="all",
        micro_batches=values.machine.accumulation_steps,
    )
    reader, steps_per_epoch = Reader(shards), order.steps_per_epoch
    support = build_support_loader(values, world, reader, steps_per_epoch=steps_per_epoch)
    training = TrainState(
        values, world, steps_per_epoch=steps_per_epoch, labels=shards.labels, data_digest=shards.digest, support=support
    )
    gradients = {}

    def copy_gradients(optimizer, *_):
        gradients.update({n: p.grad.clone() for n, p in training.pair.online.named_parameters() if p.grad is not None})

    training.optimizer.register_step_pre_hook(copy_gradients)
    loader = Loader(reader, order, training.view_specs, seed=values.seed, rank=world.rank, size=world.size)
    try:
        losses = [
            world.all_reduce_mean(train_step(training, batch).scalars["loss"]) for batch in loader.iterate(0, STEPS)
        ]
    finally:
        loader.close()
    replicas.check(training, training.state())
    state = {n: (rows.tensor.clone(), rows.total_rows) for n, rows in training.state().tensors.items()}
    return {"loss": torch.stack(losses), "grad": gradients, "state": state}


def train_cases(world, folder):
    cases = json.loads(Path(folder, "cases.json").read_text())
    shards = ShardSet.open(Path(cases["shards"]))
    return {case: train_case(world, shards, *options) for case, options in cases["cases"].items()}


def main(folder):
    torch.set_num_threads(1)
    world = World.start("cpu", timeout_s=120)
    results = train_cases(world, folder)
    torch.save(results, f"{folder}/{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
