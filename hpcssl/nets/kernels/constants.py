"""Small tensors that every batch norm needs, made for many at once."""

from __future__ import annotations

import torch
from torch import Tensor


class ZeroPool:
    """Zeros and counts for all norms of a network: not every norm launches fills of its own.

    Args:
        block: Zeros that are filled at once.
    """

    def __init__(self, block: int = 2**17):
        self._size, self._used, self._block = block, 0, torch.empty(0)
        self._counts: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def __deepcopy__(self, _memo: object) -> ZeroPool:
        return self  # the norms of a copied network take from the same blocks

    def take(self, count: int, like: Tensor) -> Tensor:
        """Return [count] zeros of the type and device of ``like``, which nothing else uses."""
        block = self._block
        if self._used + count > len(block) or block.dtype != like.dtype or block.device != like.device:
            self._used, self._block = 0, torch.zeros(max(count, self._size), dtype=like.dtype, device=like.device)
        self._used += count
        return self._block[self._used - count : self._used]

    def counts(self, ranks: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor [ranks] of a count, which must not be changed."""
        key = ranks, count, dtype, device
        if key not in self._counts:
            self._counts[key] = torch.full((ranks,), count, dtype=dtype, device=device)
        return self._counts[key]
