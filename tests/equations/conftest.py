"""A small training run without a run folder, for tests that compare single steps."""

import pytest
import torch

from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.distributed.world import World
from hpcssl.train import recipe
from hpcssl.train.step import train_step
from hpcssl.train.support_set import build_support_loader
from hpcssl.train.train_state import TrainState


class SmallTraining:
    """A run of one process without a run folder, which gives its batches by step and takes single steps."""

    def __init__(self, name, overrides, shards):
        torch.set_num_threads(1)
        base = [
            f"data.train={shards.root}",
            "views.size=16",
            "optim.batch=16",
            "schedule.steps=60",
            "bank.size=48",
            "model.norm=sync",
            "optim.precision=fp64",
        ]
        self.recipe = recipe.compose(name, [*base, *overrides])
        order = Order([s.samples for s in shards.shards], seed=0, global_batch=16, window="all")
        world, reader, steps_per_epoch = World.single_process(), Reader(shards), order.steps_per_epoch
        self.support = build_support_loader(self.recipe, world, reader, steps_per_epoch=steps_per_epoch)
        self.training = TrainState(
            self.recipe,
            world,
            steps_per_epoch=steps_per_epoch,
            labels=shards.labels,
            data_digest=shards.digest,
            support=self.support,
        )
        self.loader = Loader(reader, order, self.training.view_specs, seed=0)

    def batch(self, step):
        return next(iter(self.loader.iterate(step, step + 1)))

    def step(self, batch):
        return train_step(self.training, batch)

    def snapshot(self):
        return {name: rows.tensor.clone() for name, rows in self.training.state().tensors.items()}


@pytest.fixture
def small_training(shards):
    """``small_training(recipe name, overrides)`` gives a SmallTraining in float64 with batches of 16."""
    runs = []

    def make(name, overrides):
        runs.append(SmallTraining(name, overrides, shards))
        return runs[-1]

    yield make
    for run in runs:
        run.loader.close()
        if run.support is not None:
            run.support.close()
