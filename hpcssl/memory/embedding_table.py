"""The embedding table: the last embedding of every image of the data set, long after the bank has dropped it.

    N images of the data set, W ranks, b rows per rank and step, D entries per embedding

It is a ring buffer whose slots are the image numbers: replicated or sharded, read, saved and loaded in the same way.
Methods are collectives unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.world import World
from hpcssl.memory.checkpointed import RowReader
from hpcssl.memory.columns import ColumnSpec
from hpcssl.memory.ring_buffer import RingBuffer


class EmbeddingTable:
    """One row [D] for each image; no row is known until it is written.

    Args:
        images: number of images, N. The table takes N·D numbers of ``dtype``, on every rank or over all of them.
        width: entries per embedding, D.
        world: the ranks that write together.
        layout: how written rows are split over micro-batches and ranks; None means one micro-batch.
        placement: ``replicated`` or ``sharded``.
        dtype: dtype of the embeddings.
    """

    def __init__(
        self,
        images: int,
        width: int,
        world: World,
        *,
        layout: BatchLayout | None = None,
        placement: str,
        dtype: torch.dtype,
    ):
        self.world, self.layout = world, layout
        self._buffer = RingBuffer(
            images,
            {"z": ColumnSpec(width), "known": ColumnSpec()},
            world,
            layout=layout,
            placement=placement,
            init="empty",
            key=0,
            dtype=dtype,
        )
        self._buffer.filled = images  # every slot can be read; `known` says which were written

    def write(self, index_B: Tensor, z_BD: Tensor, taken: Tensor | None = None) -> None:
        """Replace the embeddings of every rank's images.

        An image may stand twice in the global batch, where it replaces a damaged one. Then the later row is kept.

        Args:
            index_B: [b] int64, image numbers; below 0: not written.
            z_BD: [b, D], embeddings.
            taken: bool [], equal on all ranks; where it is false, nothing is written. None means True.
        """
        index_N = self.world.all_gather_rows(index_B, self.layout)
        repeated_later = (index_N[:, None] == index_N).triu(1).any(1)
        left_out = repeated_later if taken is None else repeated_later | ~taken
        self._buffer.push(index_N.masked_fill(left_out, -1), z=z_BD, known=torch.ones_like(index_B))

    def read(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (embeddings [b, D], whether they are known [b] bool) of this rank's images; zeros where not known."""
        return self._buffer.get("z", index_B), self._buffer.get("known", index_B) > 0

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """Return (embeddings [N, D], known [N] bool) of all images on every rank, valid until the next write."""
        return self._buffer.all_rows("z"), self._buffer.all_rows("known") > 0

    def state(self) -> tuple[dict[str, TensorShard], dict[str, int]]:
        """See ``CheckpointedMemory.state``."""
        return self._buffer.state()

    def replicas(self) -> dict[str, Tensor]:
        """See ``CheckpointedMemory.replicas``."""
        return self._buffer.replicas()

    def load(self, numbers: Mapping[str, int], read: RowReader) -> None:
        """See ``CheckpointedMemory.load``."""
        self._buffer.load(numbers, read)
