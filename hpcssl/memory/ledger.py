"""The ledger: the last embedding of every image of the data set, which the bank has forgotten long ago.

    N images of the data set, W ranks, b rows per rank and step, D entries per embedding

It is a bank whose slots are the images' numbers: replicated or sharded, read, saved and loaded in the same way.
Methods are collectives unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hpcssl.memory.bank import Bank
from hpcssl.memory.rows import ColumnSpec, Part
from hpcssl.world import World


class Ledger:
    """One row [D] for each of ``images``, none of which is known until it is written. N·D numbers of ``dtype``."""

    def __init__(self, images: int, width: int, world: World, *, placement: str, dtype: torch.dtype):
        self.world = world
        self._rows = Bank(images, {"z": ColumnSpec(width), "known": ColumnSpec()}, world, placement=placement,
                          start="empty", key=0, dtype=dtype)
        self._rows.filled = images  # any slot may be asked for; `known` says which were written

    def write(self, index_B: Tensor, z_BD: Tensor) -> None:
        """Every rank's embeddings [b, D] of the images ``index_B`` [b], over those before. Of an image that stands
        twice in the global batch (it replaces a damaged one) the later row is kept."""
        every = self.world.whole_batch(index_B)
        later = (every[:, None] == every).triu(1).any(1)
        self._rows.push(every.masked_fill(later, -1), z=z_BD, known=torch.ones_like(index_B))

    def read(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings [b, D], whether they are known [b] bool) of this rank's images; zeros where not."""
        return self._rows.get("z", index_B), self._rows.get("known", index_B) > 0

    def everything(self) -> tuple[Tensor, Tensor]:
        """(embeddings [N, D], known [N] bool) of all images on every rank; only to be read, before the next write."""
        return self._rows.everything("z"), self._rows.everything("known") > 0

    def state(self) -> tuple[dict[str, Part], dict[str, int]]:
        return self._rows.state()

    def replicas(self) -> dict[str, Tensor]:
        return self._rows.replicas()

    def load(self, numbers: Mapping[str, int], read: Callable[[str, int, int], Tensor]) -> None:
        self._rows.load(numbers, read)
