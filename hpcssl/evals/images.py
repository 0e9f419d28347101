"""Batches of one view of a data set's images, in any order, for evaluations: an image that cannot be read is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hpcssl.data.loader import Batch, Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError, EvalError
from hpcssl.views.augment import ViewSpec


class Batches:
    """An order for the loader: whole batches of global indices of which this process takes all.

    ``steps``: the steps, as ``batch_of`` (step -> int64 indices) and ``epoch_of`` number them, that the loader is
    to count 0, 1, 2, …; ``most``: the largest batch.
    """

    def __init__(self, steps: Sequence[int], batch_of: Callable[[int], np.ndarray],
                 epoch_of: Callable[[int], int], most: int):
        self.steps, self.global_batch = steps, most
        self._batch_of, self._epoch_of = batch_of, epoch_of

    def epoch_of(self, step: int) -> int:
        return self._epoch_of(self.steps[step])

    def batch(self, step: int) -> np.ndarray:
        return self._batch_of(self.steps[step])

    def rows(self, size: int) -> int:
        return self.global_batch

    def part(self, step: int, rank: int, size: int) -> np.ndarray:
        return self.batch(step)


class Among:
    """An order that counts positions in ``index``, over the samples that stand there."""

    def __init__(self, order: Order, index: np.ndarray):
        self.order, self.index, self.epoch_of, self.rows = order, index, order.epoch_of, order.rows

    def part(self, step: int, rank: int, size: int) -> np.ndarray:
        return self.index[self.order.part(step, rank, size)]


class Images:
    """An order's batches, one after another. Raises ``EvalError`` at a damaged image."""

    def __init__(self, data: ShardSet, view: ViewSpec, order: Batches | Among, steps: range, *, seed: int = 0,
                 rank: int = 0, size: int = 1, threads: int = 1, pin: bool = False):
        """Neighbouring ``steps`` of ``order``; this rank's part of each."""
        self.first, self.reader = steps.start, Reader(data, limit=0)
        self.loader = Loader(self.reader, order, [view], seed=seed, rank=rank, size=size, threads=threads, pin=pin)
        self.batches = self.loader.run(steps.start, steps.stop)

    def __iter__(self) -> Images:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self.batches)
        except DataError as error:
            if not self.reader.damaged:
                raise
            # training replaces a few damaged images; a score would then be of other images than its name says
            raise EvalError(error.what, got=error.got, expected="whole images, since the score is of each of them",
                            mend="`hpcssl-shard verify` lists the damaged; write the shards again") from error

    def __enter__(self) -> Images:
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()
        self.reader.close()
