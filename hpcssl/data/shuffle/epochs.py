"""The shuffled order of an epoch, of which any part can be computed without the rest.

Shards are permuted and cut into windows, and samples are permuted within each window. What is kept in memory is one
number per sample of the last few windows, and nothing per sample for windows of more than ``rng.MAX_SORTED`` samples.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hpcssl import rng

Indices = npt.NDArray[np.int64]
_CACHED = 3  # epochs, and windows: a loader reads ahead across a border
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class ShuffledEpochs:
    """The orders of all epochs: pure functions of (seed, epoch). Safe for any number of threads.

    Args:
        samples_per_shard: Number of samples of each shard, int64 [S], in the order of the global index.
        seed: Seed of the shuffle.
        shards_per_window: Number of shards to shuffle together; None shuffles all samples together.

    Attributes:
        samples: Number of samples.
    """

    def __init__(self, samples_per_shard: Indices, seed: int, shards_per_window: int | None):
        self.samples, self.seed, self._width = int(samples_per_shard.sum()), seed, shards_per_window
        self._counts = samples_per_shard
        self._starts = np.cumsum(samples_per_shard) - samples_per_shard
        self._cached_windows: dict[int, tuple[list[Indices], Indices]] = {}  # by epoch
        self._cached_orders: dict[tuple[int, int], Indices] = {}  # by epoch and window
        self._lock = threading.Lock()

    def entries(self, epoch: int, start: int, stop: int) -> Indices:
        """The samples at the positions ``start`` .. ``stop`` - 1 of an epoch, int64 [stop - start]."""
        windows, ends = self._layout(epoch)
        number, parts = int(np.searchsorted(ends, start, side="right")), []
        while start < stop:
            begin = int(ends[number - 1]) if number else 0
            end = min(stop, int(ends[number]))
            parts.append(self._entries_of_window(epoch, number, windows[number], start - begin, end - begin))
            start, number = end, number + 1
        return np.concatenate(parts)

    def windows(self, epoch: int, place: int = 0) -> list[Indices]:
        """The shard numbers of each window of an epoch, in the order in which they are read.

        Args:
            epoch: The epoch.
            place: A position in the epoch; windows that end before it are left out.
        """
        windows, ends = self._layout(epoch)
        return windows[int(np.searchsorted(ends, place, side="right")) :]

    def _layout(self, epoch: int) -> tuple[list[Indices], Indices]:
        """The windows of an epoch, and the position in the epoch at which each window ends."""
        with self._lock:
            if epoch not in self._cached_windows:
                shards = np.arange(len(self._counts))
                if self._width is not None:
                    shards = rng.permutation(rng.key(self.seed, "order", epoch, "shards"), len(shards))
                width = self._width or len(shards)
                windows = [shards[first : first + width] for first in range(0, len(shards), width)]
                ends = np.cumsum([self._counts[window].sum() for window in windows])
                _store(self._cached_windows, epoch, (windows, ends))
            return self._cached_windows[epoch]

    def _entries_of_window(self, epoch: int, number: int, shards: Indices, start: int, stop: int) -> Indices:
        path: tuple[int | str, ...] = () if self._width is None else ("window", number * self._width)
        key = rng.key(self.seed, "order", epoch, *path)
        samples = int(self._counts[shards].sum())
        if samples > rng.MAX_SORTED:
            return self._indices(shards, rng.permutation_slice(key, samples, start, stop))
        with self._lock:
            if (epoch, number) not in self._cached_orders:
                order = self._indices(shards, rng.permutation(key, samples))
                _store(self._cached_orders, (epoch, number), order)
            return self._cached_orders[epoch, number][start:stop]

    def _indices(self, shards: Indices, places: Indices) -> Indices:
        """The global indices of the samples at these places of a window, whose shards follow each other."""
        if self._width is None:
            return places
        ends = np.cumsum(self._counts[shards])
        shard = np.searchsorted(ends, places, side="right")
        return (self._starts[shards] + self._counts[shards] - ends)[shard] + places


def _store(cache: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    while len(cache) >= _CACHED:
        cache.pop(next(iter(cache)))
    cache[key] = value
