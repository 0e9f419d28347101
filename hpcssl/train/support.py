"""The random images that a support set is made of when it is embedded anew for every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hpcssl import rng
from hpcssl.data.loader import KEPT, Batch, Loader
from hpcssl.data.order import Draws
from hpcssl.data.reader import Reader
from hpcssl.train.state import Training


class Support:
    """Calls of ``batches`` for one step after the other read ahead; any other step may be asked for as well.

    ``loader``: over ``Draws``, whose batches of a step are ``per_step``; the run has ``last_step`` steps. ``mark``: for
    a device that lags behind its host, an event whose ``synchronize`` waits for all that was queued before it.
    """

    def __init__(self, loader: Loader, per_step: int, last_step: int, mark: Callable[[], Any] | None = None):
        self.loader, self.per_step, self.end, self.mark = loader, per_step, last_step * per_step, mark
        self._next, self._running = -1, iter(())

    def batches(self, step: int) -> Iterator[Batch]:
        """The ``per_step`` batches of a training step, each of which holds until the next is asked for."""
        first = step * self.per_step
        if self._next != first:
            self._running = self.loader.run(first, self.end)
        self._next = first + self.per_step
        marks = []
        for number in range(self.per_step):
            if self.mark and number >= KEPT:  # the loader is about to fill that batch's memory: was it copied yet?
                marks[number - KEPT].synchronize()
            yield next(self._running)
            if self.mark:
                marks.append(self.mark())

    def close(self) -> None:
        self.loader.close()


def attach(training: Training, reader: Reader, *, threads: int = 1, pin: bool = False) -> Support | None:
    """Give the training its ``support`` where its method fills the bank anew, from this reader. Raises ``ConfigError``
    where the data set is too small."""
    specs = training.support_specs
    if not specs:
        return None
    recipe, world = training.recipe, training.world
    batch, per_step = recipe.optim.batch, recipe.bank.size // recipe.optim.batch
    draws = Draws(len(reader), seed=recipe.seed, global_batch=batch, per_step=per_step,
                  micro_batches=recipe.machine.accumulate)
    loader = Loader(reader, draws, specs, seed=rng.key(recipe.seed, "support"), rank=world.rank, size=world.size,
                    threads=threads, pin=pin)
    made = Support(loader, per_step, training.last_step, _mark if world.device.type == "cuda" else None)
    training.support = made.batches
    return made


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
