"""Which samples stand in which batch. Pure arithmetic on addresses: no torch, no state, nothing to resume.

The global batch at step t is a function of (seed, epoch, t) alone. A rank takes its contiguous slice of it, so every
world size that divides the global batch sees the same batches, and starting at step t costs what step 0 costs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from hpcssl import rng
from hpcssl.errors import ConfigError, DataError, WorldError

_KEPT_EPOCHS = 2  # a loader runs ahead over the border of two epochs


class Order:
    """Shuffled training order. Steps count on through the epochs; the last, incomplete batch of an epoch is dropped.

    ``samples_per_shard``: number of samples of each shard, in the order of the global index.
    ``window``: shards are permuted, then samples within windows of this many shards, so that one step touches at most
    ``window`` + 1 shards or so; ``"all"`` is a full permutation of the samples.
    ``micro_batches``: the global batch is cut into so many runs, and a rank takes its slice of each.
    Raises ``DataError`` for an empty set or one smaller than a batch, ``ConfigError`` for a bad window or batch.
    """

    def __init__(self, samples_per_shard: Sequence[int], *, seed: int, global_batch: int, window: int | str,
                 micro_batches: int = 1):
        counts = np.asarray(samples_per_shard, dtype=np.int64).reshape(-1)
        if window != "all" and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ConfigError("data.window", got=repr(window), expected="a number of shards from 1, or all",
                              mend="data.window=all shuffles everything; 16 suits a disk that likes sequential reads")
        self.samples = int(counts.sum())
        self.seed, self.global_batch, self.window = int(seed), _batch(global_batch, self.samples), window
        self.micro_batches = micro_batches
        if self.global_batch > self.samples:
            raise DataError("the global batch", got=f"{self.global_batch} samples a step from a set of {self.samples}",
                            expected=f"at most {self.samples}",
                            mend="take a smaller optim.batch (the batch of the whole world) or a larger data set")
        self.steps_per_epoch = self.samples // self.global_batch
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that global step ``step`` belongs to."""
        return step // self.steps_per_epoch

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of all samples in this epoch, int64 [samples]; read-only."""
        with self._lock:
            if epoch not in self._kept:
                while len(self._kept) >= _KEPT_EPOCHS:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[epoch] = self._draw(epoch)
                self._kept[epoch].flags.writeable = False
            return self._kept[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        if self.window == "all":
            return rng.permutation(rng.key(self.seed, "order", epoch), self.samples)
        parts = []
        for number, shards in enumerate(self._windows(epoch)):
            near = np.concatenate([np.arange(self._starts[s], self._ends[s]) for s in shards])
            key = rng.key(self.seed, "order", epoch, "window", number * self.window)
            parts.append(near[rng.permutation(key, len(near))])
        return np.concatenate(parts)

    def _windows(self, epoch: int) -> list[np.ndarray]:
        if self.window == "all":
            return [np.arange(len(self._starts))]
        shards = rng.permutation(rng.key(self.seed, "order", epoch, "shards"), len(self._starts))
        return [shards[first:first + self.window] for first in range(0, len(shards), self.window)]

    def ahead(self, step: int, stop: int) -> Iterator[np.ndarray]:
        """The windows that steps ``step`` .. ``stop`` - 1 read, each as the numbers of its shards, one after the
        other through the epochs; the first is the one that ``step`` begins in."""
        epoch, place = divmod(step, self.steps_per_epoch)
        left = place * self.global_batch  # samples of the epoch that came before
        while epoch * self.steps_per_epoch < stop:
            for shards in self._windows(epoch):
                left -= int((self._ends - self._starts)[shards].sum())
                if left < 0:
                    yield shards
            epoch, left = epoch + 1, 0

    def held(self, steps: int) -> int:
        """The most shards that so many steps in a row may read."""
        counts = np.sort(self._ends - self._starts)
        if self.window == "all":
            return len(counts)
        samples = steps * self.global_batch + self.global_batch  # and what the end of an epoch drops
        full = max(1, int(counts[:self.window].sum()))  # of the smallest whole window
        # one begun before, and the short one at the end of an epoch
        return min(len(counts), self.window * (-(-samples // full) + 2))

    def batch(self, step: int) -> np.ndarray:
        """Global indices of the whole world's batch at ``step``, int64 [global_batch]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.permutation(epoch)[place * self.global_batch:(place + 1) * self.global_batch]

    def rows(self, size: int) -> int:
        """Samples per rank and step in a world of ``size``. Raises ``WorldError`` where it does not divide."""
        if self.global_batch % size:
            works = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            near = sorted(sorted(works, key=lambda n: abs(n - size))[:6])
            raise WorldError(f"a global batch of {self.global_batch}", got=f"{size} processes",
                             expected="a number of processes that divides it, such as " + ", ".join(map(str, near)),
                             mend="start another number of processes, or change optim.batch")
        return self.global_batch // size

    def part(self, step: int, rank: int, size: int) -> np.ndarray:
        """Rank ``rank``'s slice of ``batch(step)`` (of each of its micro-batches), int64 [global_batch / size]."""
        self.rows(size)
        return _dealt(self.batch(step), rank, size, self.micro_batches)


class Draws:
    """``per_step`` batches of random images for each training step, all different within the step: batch u belongs to
    step u // per_step, and has its own views (``epoch_of``). For support sets that are embedded anew.

    Raises ``ConfigError`` where the data set holds fewer images.
    """

    def __init__(self, samples: int, *, seed: int, global_batch: int, per_step: int, micro_batches: int = 1):
        self.samples, self.seed = int(samples), rng.key(seed, "draws")
        self.global_batch, self.per_step, self.micro_batches = global_batch, per_step, micro_batches
        if per_step * global_batch > samples:
            raise ConfigError("bank.size", got=f"{per_step * global_batch} images for every step, from {samples}",
                              expected=f"at most the {samples} images of the data set",
                              mend="take a smaller bank.size, a multiple of optim.batch")
        self._kept: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def epoch_of(self, number: int) -> int:
        """The training step that batch ``number`` is drawn for."""
        return number // self.per_step

    def batch(self, number: int) -> np.ndarray:
        """Global indices of the whole world's batch ``number``, int64 [global_batch]."""
        step, place = divmod(number, self.per_step)
        kept_step, drawn = self._kept
        if kept_step != step:
            drawn = rng.permutation(rng.key(self.seed, step), self.samples)[:self.per_step * self.global_batch]
            self._kept = step, drawn
        return drawn[place * self.global_batch:(place + 1) * self.global_batch]

    def rows(self, size: int) -> int:
        """Samples per rank and batch in a world of ``size``, which divides the batch: ``Order`` has refused others."""
        return self.global_batch // size

    def part(self, number: int, rank: int, size: int) -> np.ndarray:
        """Rank ``rank``'s slice of ``batch(number)``."""
        return _dealt(self.batch(number), rank, size, self.micro_batches)


def _dealt(whole: np.ndarray, rank: int, size: int, micro_batches: int) -> np.ndarray:
    return whole.reshape(micro_batches, size, -1)[:, rank].reshape(-1)


class Sequential:
    """Evaluation order: every sample exactly once, in index order; the last batch may be short.

    A rank's part may be one row shorter than another's, and empty when fewer rows than ranks are left.
    """

    def __init__(self, samples: int, batch: int):
        self.samples, self.global_batch = int(samples), _batch(batch, samples)
        self.steps = -(-self.samples // self.global_batch)

    def epoch_of(self, step: int) -> int:
        """0: there is one pass."""
        return 0

    def batch(self, step: int) -> np.ndarray:
        """Global indices of the whole world's batch at ``step``, int64 [<= batch]."""
        return np.arange(step * self.global_batch, min((step + 1) * self.global_batch, self.samples))

    def rows(self, size: int) -> int:
        """The most samples a rank gets in one step in a world of ``size``."""
        return -(-self.global_batch // size)

    def part(self, step: int, rank: int, size: int) -> np.ndarray:
        """Rank ``rank``'s contiguous slice of ``batch(step)``."""
        whole = self.batch(step)
        return whole[len(whole) * rank // size:len(whole) * (rank + 1) // size]


def _batch(batch: int, samples: int) -> int:
    if samples < 1:
        raise DataError("the data set", got="no samples", expected="at least one",
                        mend="check data.train and data.val, and what `hpcssl-shard show` says of them")
    if isinstance(batch, bool) or int(batch) != batch or batch < 1:
        raise ConfigError("the batch", got=repr(batch), expected="a whole number from 1",
                          mend="set optim.batch, the number of images of one step over all processes")
    return int(batch)
