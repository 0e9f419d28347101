"""Stateless, counter-based random numbers: every draw is a pure function of its key.

A key is the hash of a path such as ``(seed, "view", epoch, sample, view)``. No generator outlives the expression that
made it. So there is no generator state to save, and a number depends neither on which rank or thread asked for it nor
on what was drawn before.

Only the raw output of Philox is used: NumPy guarantees its stream forever, but not that of ``Generator``'s methods.
"""

from __future__ import annotations

import hashlib
import math
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

MAX_SORTED = 2**22
"""Up to this many numbers, ``permutation`` sorts random words. Changing it changes the order of every larger run."""
_ROUNDS = 8  # of the Feistel network, twice the four that make it indistinguishable from random for few entries
_GAMMA, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_CHUNK = 2**16  # entries at a time, which stay in the cache
_UNIT = 2.0**-53
_WORD = 2**64 - 1


def key(seed: int, *path: int | str) -> int:
    """The 128-bit key of a path.

    Args:
        seed: Seed of the run.
        path: What is drawn, as integers and strings; ``("a", 1)`` and ``("a1",)`` give different keys.
    """
    text = repr((int(seed), *(p if isinstance(p, str) else int(p) for p in path)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


class _Philox(threading.local):
    """One bit generator per thread, set to each key in turn: to build one costs four times as much as to draw."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.start = self.bits.state


_philox = _Philox()


def raw(key: int, n: int) -> npt.NDArray[np.uint64]:
    """The first n words of the stream of ``key``, uint64 [n]: ``np.random.Philox(key=key).random_raw(n)``."""
    _philox.start["state"]["key"][:] = key & _WORD, key >> 64
    _philox.bits.state = _philox.start
    return _philox.bits.random_raw(n)


def uniform(key: int, n: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 [n]."""
    return (raw(key, n) >> np.uint64(11)) * _UNIT  # type: ignore[return-value]  # NumPy's stub loses the width


def permutation(key: int, n: int) -> npt.NDArray[np.int64]:
    """A random permutation of ``range(n)``, int64 [n].

    Up to ``MAX_SORTED`` numbers, it is the order of n random words; ties, one in 2^64, are broken by position. Beyond,
    it is a Feistel network, each of whose entries can be computed without the others (``permutation_slice``).
    """
    if n <= MAX_SORTED:
        return np.argsort(raw(key, n), kind="stable")
    order = np.empty(n, np.int64)
    for start in range(0, n, _CHUNK):
        order[start : start + _CHUNK] = permutation_slice(key, n, start, min(n, start + _CHUNK))
    return order


def permutation_slice(key: int, n: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """The entries ``start`` .. ``stop`` - 1 of ``permutation(key, n)``, int64 [stop - start].

    Beyond ``MAX_SORTED`` numbers, time and memory depend on ``stop`` - ``start`` only.
    """
    if n <= MAX_SORTED:
        words = raw(key, n)
        if 0 < stop < n:  # the entries up to ``stop`` are found without sorting all words
            smallest = np.flatnonzero(words <= np.partition(words, stop - 1)[stop - 1])
            return smallest[np.argsort(words[smallest], kind="stable")[start:stop]]
        return np.argsort(words, kind="stable")[start:stop]
    side = math.isqrt(n - 1) + 1
    sides = np.uint64(side), np.uint64(-(-n // side))
    keys = raw(key, _ROUNDS)
    entries = _feistel(np.arange(start, stop, dtype=np.uint64), keys, sides)
    while len(outside := np.flatnonzero(entries >= n)):  # cycle walking; at most one in sqrt(n) entries
        entries[outside] = _feistel(entries[outside], keys, sides)
    return entries.astype(np.int64)


def _feistel(
    x: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], sides: tuple[np.uint64, np.uint64]
) -> npt.NDArray[np.uint64]:
    """A keyed permutation of ``range(a * b)``: the generalized Feistel network of Black and Rogaway (2002), section 5.

    Each round adds to one half, modulo its side, a function of the other half: the output of SplitMix64 with the round
    key as the seed and the other half as the counter.
    """
    halves = [x % sides[0], x // sides[0]]
    for number, round_key in enumerate(keys):
        changed, other = number % 2, 1 - number % 2
        z = halves[other] * _GAMMA + round_key
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z ^= z >> np.uint64(31)
        # 63 bits, so that the sum does not overflow
        halves[changed] = (halves[changed] + (z >> np.uint64(1))) % sides[changed]
    return halves[0] + sides[0] * halves[1]


def generator(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded with ``key``, for tensors too large to draw in NumPy (initial weights, bank rows)."""
    import torch  # importing it takes seconds, and some commands need no tensors

    seeded = torch.Generator(device=device)
    seeded.manual_seed(key & (2**63 - 1))
    return seeded
