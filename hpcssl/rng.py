"""Stateless, counter-based random numbers: every draw is a pure function of its key.

A key is the hash of a path such as ``(seed, "view", epoch, sample, view)``. No generator outlives the expression that
made it. So there is no generator state to save, and a number depends neither on which rank or thread asked for it nor
on what was drawn before.

Only the raw output of Philox is used: NumPy guarantees its stream forever, but not that of ``Generator``'s methods.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

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


def permutation(key: int, n: int, count: int | None = None) -> npt.NDArray[np.int64]:
    """A random permutation of ``range(n)``, int64 [n], or its first ``count`` entries.

    It is the order of n random words; ties, one in 2^64, are broken by position. Few of many entries are found without
    sorting all words.
    """
    words = raw(key, n)
    if count is None or count >= n:
        return np.argsort(words, kind="stable")[:count]
    if count == 0:
        return np.empty(0, np.int64)
    smallest = np.flatnonzero(words <= np.partition(words, count - 1)[count - 1])
    return smallest[np.argsort(words[smallest], kind="stable")[:count]]


def generator(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded with ``key``, for tensors too large to draw in NumPy (initial weights, bank rows)."""
    import torch  # importing it takes seconds, and some commands need no tensors

    seeded = torch.Generator(device=device)
    seeded.manual_seed(key & (2**63 - 1))
    return seeded
