"""Which samples stand in which batch: pure functions of the step, without torch, state, or anything to resume.

The global batch at step t is a function of (seed, epoch, t) alone, and a rank takes its slice of it. So every number
of processes that divides the global batch sees the same batches, and starting at step t costs what step 0 costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hpcssl import rng
from hpcssl.data.shuffle.epochs import ShuffledEpochs
from hpcssl.errors import ConfigError, DataError, WorldError

Indices = npt.NDArray[np.int64]


class BatchOrder(Protocol):
    """What a loader needs to know of an order."""

    def epoch_of(self, step: int) -> int:
        """The epoch of ``step``, from 0; part of the random keys of the step's views."""
        ...

    def rows_per_rank(self, size: int) -> int:
        """The largest number of samples that a rank gets in one step among ``size`` processes."""
        ...

    def local_batch(self, step: int, rank: int, size: int) -> Indices:
        """Global indices of rank ``rank``'s samples at ``step``, int64 [<= rows_per_rank(size)]."""
        ...


class Order:
    """Shuffled training order. Steps are counted through all epochs; an epoch's last, incomplete batch is dropped.

    Args:
        samples_per_shard: Number of samples of each shard, in the order of the global index.
        seed: Seed of the shuffle.
        global_batch: Samples per step over all processes.
        window: Number of shards to shuffle together. Shards are permuted, then samples within windows of this many
            shards, so that one step reads from about ``window`` + 1 shards. ``"all"`` permutes all samples.
        micro_batches: Number of consecutive micro-batches of the global batch. A rank takes a slice of each.

    Attributes:
        samples: Number of samples of the set.
        steps_per_epoch: Number of full batches per epoch.

    Raises:
        DataError: If the set is empty or smaller than a batch.
        ConfigError: If ``window`` or ``global_batch`` is not a positive integer.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int] | Indices,
        *,
        seed: int,
        global_batch: int,
        window: int | str,
        micro_batches: int = 1,
    ):
        counts = np.asarray(samples_per_shard, dtype=np.int64).reshape(-1)
        self.samples = int(counts.sum())
        self.window = window
        self._shards_per_window = _check_window(window, len(counts))
        self.seed, self.global_batch = int(seed), _check_batch(global_batch, self.samples)
        self.micro_batches = micro_batches
        if self.global_batch > self.samples:
            raise DataError(
                "the global batch",
                got=f"{self.global_batch} samples per step from a set of {self.samples}",
                expected=f"at most {self.samples}",
                fix="use a smaller optim.batch (the batch over all processes) or a larger data set",
            )
        self.steps_per_epoch = self.samples // self.global_batch
        self._counts = counts
        self._epochs = ShuffledEpochs(counts, self.seed, None if window == "all" else self._shards_per_window)

    def epoch_of(self, step: int) -> int:
        """The epoch of global step ``step``, from 0."""
        return step // self.steps_per_epoch

    def permutation(self, epoch: int) -> Indices:
        """The order of all samples in an epoch, int64 [samples]. ``batch`` computes its part only."""
        return self._epochs.entries(epoch, 0, self.samples)

    def upcoming_windows(self, step: int, stop: int) -> Iterator[Indices]:
        """Yield the windows that steps ``step`` .. ``stop`` - 1 read, through all epochs.

        Yields:
            The shard numbers of a window, int64. The first window is the one that ``step`` begins in.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        while epoch * self.steps_per_epoch < stop:
            yield from self._epochs.windows(epoch, place * self.global_batch)
            epoch, place = epoch + 1, 0

    def max_shards_read(self, steps: int) -> int:
        """An upper bound of the number of shards that ``steps`` consecutive steps read."""
        counts = np.sort(self._counts)
        if self.window == "all":
            return len(counts)
        samples = steps * self.global_batch + self.global_batch  # and those that the end of an epoch drops
        smallest_window = max(1, int(counts[: self._shards_per_window].sum()))
        # two more: the window that the first step begins in, and the short one at the end of an epoch
        return min(len(counts), self._shards_per_window * (-(-samples // smallest_window) + 2))

    def batch(self, step: int) -> Indices:
        """Global indices of the batch of all processes at ``step``, int64 [global_batch]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epochs.entries(epoch, place * self.global_batch, (place + 1) * self.global_batch)

    def rows_per_rank(self, size: int) -> int:
        """Samples per rank and step among ``size`` processes.

        Raises:
            WorldError: If ``size`` does not divide the global batch.
        """
        if self.global_batch % size:
            divisors = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            nearest = sorted(sorted(divisors, key=lambda n: abs(n - size))[:6])
            raise WorldError(
                f"a global batch of {self.global_batch}",
                got=f"{size} processes",
                expected="a number of processes that divides it, such as " + ", ".join(map(str, nearest)),
                fix="start another number of processes, or change optim.batch",
            )
        return self.global_batch // size

    def local_batch(self, step: int, rank: int, size: int) -> Indices:
        """Rank ``rank``'s slice of each micro-batch of ``batch(step)``, int64 [global_batch / size].

        Raises:
            WorldError: If ``size`` does not divide the global batch.
        """
        self.rows_per_rank(size)
        return _local_rows(self.batch(step), rank, size, self.micro_batches)


class SupportOrder:
    """Random batches for the support set of each training step, without repeats within a step.

    Batch u belongs to training step u // ``per_step``. Methods that embed a new support set for every step read it.

    Args:
        samples: Number of samples of the data set.
        seed: Seed of the run.
        global_batch: Samples per batch over all processes.
        per_step: Batches per training step.
        micro_batches: Number of consecutive micro-batches of the global batch. A rank takes a slice of each.

    Raises:
        ConfigError: If the data set has fewer samples than a step's support set.
    """

    def __init__(self, samples: int, *, seed: int, global_batch: int, per_step: int, micro_batches: int = 1):
        self.samples, self.seed = int(samples), rng.key(seed, "draws")
        self.global_batch, self.per_step, self.micro_batches = global_batch, per_step, micro_batches
        if per_step * global_batch > samples:
            raise ConfigError(
                "bank.size",
                got=f"{per_step * global_batch} images for every step, from {samples}",
                expected=f"at most the {samples} images of the data set",
                fix="use a smaller bank.size that is a multiple of optim.batch",
            )
        self._cached: tuple[int, Indices] = (-1, np.empty(0, np.int64))  # a training step and its samples

    def epoch_of(self, step: int) -> int:
        """The training step that batch ``step`` is drawn for: each training step has views of its own."""
        return step // self.per_step

    def batch(self, step: int) -> Indices:
        """Global indices of batch ``step`` over all processes, int64 [global_batch]."""
        training_step, place = divmod(step, self.per_step)
        cached_step, samples = self._cached
        if cached_step != training_step:
            count = self.per_step * self.global_batch
            samples = rng.permutation_slice(rng.key(self.seed, training_step), self.samples, 0, count)
            self._cached = training_step, samples
        return samples[place * self.global_batch : (place + 1) * self.global_batch]

    def rows_per_rank(self, size: int) -> int:
        """Samples per rank and batch among ``size`` processes. ``Order`` has checked that they divide the batch."""
        return self.global_batch // size

    def local_batch(self, step: int, rank: int, size: int) -> Indices:
        """Rank ``rank``'s slice of each micro-batch of ``batch(step)``, int64 [global_batch / size]."""
        return _local_rows(self.batch(step), rank, size, self.micro_batches)


class SequentialOrder:
    """Evaluation order: every sample exactly once, in the order of the index; the last batch may be short.

    A rank may get one sample fewer than another, and none where fewer samples than ranks are left.

    Args:
        samples: Number of samples of the set.
        batch: Samples per step over all processes.

    Attributes:
        steps: Number of steps of the pass.

    Raises:
        DataError: If the set is empty.
        ConfigError: If ``batch`` is not a positive integer.
    """

    def __init__(self, samples: int, batch: int):
        self.samples, self.global_batch = int(samples), _check_batch(batch, samples)
        self.steps = -(-self.samples // self.global_batch)

    def epoch_of(self, step: int) -> int:
        """Always 0, because there is one pass."""
        return 0

    def batch(self, step: int) -> Indices:
        """Global indices of the batch of all processes at ``step``, int64 [<= batch]."""
        return np.arange(step * self.global_batch, min((step + 1) * self.global_batch, self.samples))

    def rows_per_rank(self, size: int) -> int:
        """The largest number of samples that a rank gets in one step among ``size`` processes."""
        return -(-self.global_batch // size)

    def local_batch(self, step: int, rank: int, size: int) -> Indices:
        """Rank ``rank``'s contiguous slice of ``batch(step)``, int64 [<= rows_per_rank(size)]."""
        indices = self.batch(step)
        return indices[len(indices) * rank // size : len(indices) * (rank + 1) // size]


def _local_rows(indices: Indices, rank: int, size: int, micro_batches: int) -> Indices:
    return indices.reshape(micro_batches, size, -1)[:, rank].reshape(-1)


def _check_window(window: int | str, shards: int) -> int:
    """The number of shards in a window. Raises ``ConfigError``."""
    if window == "all":
        return shards
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(
            "data.shuffle_window",
            got=repr(window),
            expected="a number of shards from 1, or all",
            fix="set data.shuffle_window=all to shuffle everything, or 16 for a disk that needs sequential reads",
        )
    return window


def _check_batch(batch: int, samples: int) -> int:
    if samples < 1:
        raise DataError(
            "the data set",
            got="no samples",
            expected="at least one",
            fix="check data.train and data.val with `hpcssl-shard show`",
        )
    if isinstance(batch, bool) or int(batch) != batch or batch < 1:
        raise ConfigError(
            "the batch",
            got=repr(batch),
            expected="an integer from 1",
            fix="set optim.batch to the number of images per step over all processes",
        )
    return int(batch)
