"""Batches of one view of a set of images in any order, for evaluations.

Training replaces a damaged image by another one. An evaluation must not: its score would then be of other images than
its row says. Here a damaged image is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from hpcssl.data.batch import Batch
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError, EvalError
from hpcssl.views.augment import ViewSpec

Indices = npt.NDArray[np.int64]
"""Global indices of samples: rows of the shard set's index."""


class IndexBatches:
    """A loader order whose batches a function gives; this process takes each batch whole.

    Args:
        steps: The steps, in the numbering of ``batch_of`` and ``epoch_of``, that the loader counts as 0, 1, 2, …
        batch_of: Step -> global indices of its batch, int64 [b].
        epoch_of: Step -> epoch, which is part of the address of each random crop.
        max_batch: Size of the largest batch.
    """

    def __init__(
        self, steps: Sequence[int], batch_of: Callable[[int], Indices], epoch_of: Callable[[int], int], max_batch: int
    ) -> None:
        self.steps, self.global_batch = steps, max_batch
        self._batch_of, self._epoch_of = batch_of, epoch_of

    def epoch_of(self, step: int) -> int:
        """The epoch of the loader's step ``step``."""
        return self._epoch_of(self.steps[step])

    def batch(self, step: int) -> Indices:
        """Global indices of the loader's step ``step``."""
        return self._batch_of(self.steps[step])

    def rows_per_rank(self, size: int) -> int:
        """Size of the largest batch, whatever the number of ranks."""
        return self.global_batch

    def local_batch(self, step: int, rank: int, size: int) -> Indices:
        """Global indices of the loader's step ``step``, the same on every rank."""
        return self.batch(step)


class SubsetOrder:
    """An order over a subset: positions that ``order`` draws are looked up in ``index``.

    Args:
        order: An order over ``len(index)`` samples.
        index: Global indices of the subset, int64 [n].
    """

    def __init__(self, order: Order, index: Indices) -> None:
        self.order, self.index = order, index

    def epoch_of(self, step: int) -> int:
        """The epoch of a step."""
        return self.order.epoch_of(step)

    def rows_per_rank(self, size: int) -> int:
        """Samples per rank and step in a world of ``size`` ranks."""
        return self.order.rows_per_rank(size)

    def local_batch(self, step: int, rank: int, size: int) -> Indices:
        """Global indices of this rank's part of a step."""
        return self.index[self.order.local_batch(step, rank, size)]


class ImageStream:
    """Iterator over the batches of an order. A context manager that stops the loader's threads.

    Args:
        data: The images.
        view: How they are cropped.
        order: Which images are in which step.
        steps: Consecutive steps of ``order`` to read.
        seed: Seed of the random crops.
        rank: This process, where the order deals its batches out.
        size: Number of processes.
        threads: Loader threads of this process.
        pin: Whether batches are in page-locked memory, for copies to a GPU.

    Raises:
        EvalError: On iteration, at a damaged image.
    """

    def __init__(
        self,
        data: ShardSet,
        view: ViewSpec,
        order: IndexBatches | SubsetOrder,
        steps: range,
        *,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        threads: int = 1,
        pin: bool = False,
    ) -> None:
        self.first, self.reader = steps.start, Reader(data, limit=0)
        self.loader = Loader(self.reader, order, [view], seed=seed, rank=rank, size=size, threads=threads, pin=pin)
        self.batches = self.loader.iterate(steps.start, steps.stop)

    def __iter__(self) -> ImageStream:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self.batches)
        except DataError as error:
            if not self.reader.damaged:
                raise
            raise EvalError(
                error.what,
                got=error.got,
                expected="undamaged images, since an evaluation replaces none",
                fix="list the damaged images with `hpcssl-shard verify`, then write the shards again",
            ) from error

    def __enter__(self) -> ImageStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the loader's threads and close the shards."""
        self.loader.close()
        self.reader.close()
