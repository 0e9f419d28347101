import pytest
import torch

from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.train import recipe
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.train.support import attach
from hpcssl.world import World


class Small:
    """A run of one process without a run folder: its batches by number, and its steps."""

    def __init__(self, name, overrides, shards):
        torch.set_num_threads(1)
        base = [f"data.train={shards.root}", "views.size=16", "optim.batch=16", "schedule.steps=60", "bank.size=48",
                "model.norm=whole", "optim.precision=fp64"]
        self.recipe = recipe.compose(name, [*base, *overrides])
        order = Order([s.samples for s in shards.shards], seed=0, global_batch=16, window="all")
        self.training = Training(self.recipe, World.alone(), steps_per_epoch=order.steps_per_epoch,
                                 labels=shards.labels, data_digest=shards.digest)
        reader = Reader(shards)
        self.loader = Loader(reader, order, self.training.view_specs, seed=0)
        self.support = attach(self.training, reader)

    def batch(self, step):
        return next(iter(self.loader.run(step, step + 1)))

    def step(self, batch):
        return train_step(self.training, batch)

    def snapshot(self):
        return {name: rows.local.clone() for name, rows in self.training.state().tensors.items()}


@pytest.fixture
def small_training(shards):
    made = []

    def make(name, overrides):
        made.append(Small(name, overrides, shards))
        return made[-1]

    yield make
    for small in made:
        small.loader.close()
        if small.support is not None:
            small.support.close()
