"""Batches of images for training: threads fill a ring of preallocated memory ahead of the consumer.

Threads rather than processes: decoding and resizing release the GIL, which Python then holds for some tens of
microseconds per image, and nothing is pickled or copied. The content of a batch depends on (seed, epoch, step) alone
and not on the number of threads, because every row is drawn from its own random key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from hpcssl.data.batch import CONSUMER_BATCHES, RING_SIZE, Batch, BatchSlot
from hpcssl.data.native.selection import select_library
from hpcssl.data.order import BatchOrder
from hpcssl.data.reader import Reader
from hpcssl.data.workers import LoaderWorkers
from hpcssl.errors import ConfigError
from hpcssl.views.augment import ViewSpec


class Loader:
    """Iterates over the batches of one rank.

    Args:
        reader: Where images come from.
        order: Which samples stand in which batch.
        views: The views to cut from each image. A view's position in this list is part of its random key.
        seed: Seed of the augmentation parameters.
        rank: This process's rank.
        size: Number of processes.
        threads: Number of threads of this process, 1 or more.
        ring: Batches of memory to allocate. All but ``CONSUMER_BATCHES`` of them are filled ahead.
        pin: Whether to use page-locked memory, which copies to a GPU asynchronously.
        decoder: One of ``native.selection.SETTINGS``. The content of the batches does not depend on it.
        progress: Called as ``progress(step, opened)`` when a step is taken. The threads have begun with all steps
            before ``opened``.

    Raises:
        ConfigError: If ``threads``, ``ring`` or the number of views is too small, or if ``decoder`` is ``native`` and
            the native decoder cannot be used.
        WorldError: If ``size`` does not divide the global batch.
    """

    def __init__(
        self,
        reader: Reader,
        order: BatchOrder,
        views: Sequence[ViewSpec],
        *,
        seed: int,
        rank: int = 0,
        size: int = 1,
        threads: int = 1,
        ring: int = RING_SIZE,
        pin: bool = False,
        decoder: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ):
        limits = (("data.threads", threads, 1), ("data.ring", ring, CONSUMER_BATCHES + 1), ("views", len(views), 1))
        for name, got, least in limits:
            if got < least:
                raise ConfigError(name, got=got, expected=f"at least {least}", fix=f"set {name} to {least} or more")
        self.reader, self.order, self.views = reader, order, list(views)
        self.seed, self.rank, self.size, self.threads, self.progress = seed, rank, size, threads, progress
        self.pin, self._library = pin, select_library(decoder, views)
        self._slot_arguments = order.rows_per_rank(size), self.views, pin
        self._slots = [BatchSlot(*self._slot_arguments) for _ in range(ring)]
        self._workers: LoaderWorkers | None = None

    @property
    def damaged(self) -> list[tuple[int, str, str]]:
        """All damaged samples met so far as (index, key, reason), in the order of the index."""
        return [(x.index, x.key, x.reason) for _, x in sorted(self.reader.damaged.items())]

    def iterate(self, start: int, stop: int, give_up: Callable[[], bool] | None = None) -> Iterator[Batch]:
        """Iterate over the batches of global steps ``start`` .. ``stop`` - 1.

        Threads start here. They end with the iterator, with ``close``, or when the consumer raises. Only one iterator
        can be active; a new one closes the last. An error in a thread is raised at the step that it concerns.

        Args:
            start: First step.
            stop: One past the last step.
            give_up: Called repeatedly while a batch is late (see ``workers.LATE_BATCH_S``). Once it returns True, a
                blank batch with ``complete=False`` is returned in place of the late one.

        Yields:
            One batch per step, valid until the batch after the next one is requested (see ``Batch`` on copies to a
            GPU).
        """
        self.close()
        workers = self._workers = LoaderWorkers(
            self.reader,
            self.order,
            self.views,
            self._slots,
            seed=self.seed,
            rank=self.rank,
            size=self.size,
            threads=self.threads,
            start=start,
            stop=stop,
            pin=self.pin,
            library=self._library,
        )
        try:
            workers.start()
            for step in range(start, stop):
                if self.progress is not None:
                    self.progress(step, workers.opened)
                yield workers.take(step, give_up)
        finally:
            workers.stop()

    def close(self) -> None:
        """Stop the threads of the current iterator and wait for them.

        Threads that are stuck are left behind together with the memory that they may still write to.
        """
        if self._workers is not None and not self._workers.stop():
            self._slots = [BatchSlot(*self._slot_arguments) for _ in self._slots]
        self._workers = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
