"""The only maker of randomness. It is addressed, never consumed.

A random number is a pure function of an address such as ``(seed, "view", epoch, sample, view)``. No generator
outlives the expression that made it, so there is no generator state to save, and nothing depends on which rank
or thread asked, or on what was asked before.

Only raw Philox output is used: NumPy promises its stream for ever, and not that of ``Generator``'s methods.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_UNIT = 2.0**-53
_WORD = 2**64 - 1


def key(seed: int, *path: int | str) -> int:
    """128-bit key of an address. Parts are ints or strings; ``("a", 1)`` and ``("a1",)`` differ."""
    text = repr((int(seed), *(p if isinstance(p, str) else int(p) for p in path)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


class _Philox(threading.local):
    """One bit generator per thread, set to each address in turn: building one costs four times the numbers drawn."""

    def __init__(self):
        self.bits = np.random.Philox(key=0)
        self.start = self.bits.state


_philox = _Philox()


def raw(key: int, n: int) -> np.ndarray:
    """n uint64 words of the counter-based stream of ``key``: those of ``np.random.Philox(key=key).random_raw(n)``."""
    _philox.start["state"]["key"][:] = key & _WORD, key >> 64
    _philox.bits.state = _philox.start
    return _philox.bits.random_raw(n)


def uniform(key: int, n: int) -> np.ndarray:
    """n float64 numbers in [0, 1)."""
    return (raw(key, n) >> np.uint64(11)) * _UNIT


def permutation(key: int, n: int) -> np.ndarray:
    """A permutation of ``range(n)``, int64: the order of n random words (ties, one in 2^64, by position)."""
    return np.argsort(raw(key, n), kind="stable")


def generator(key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator at this address, for tensors too large to draw in NumPy (initial weights, bank rows)."""
    import torch  # a second or two that the command lines without tensors should not wait for

    made = torch.Generator(device=device)
    made.manual_seed(key & (2**63 - 1))
    return made
