"""The batch that a loader hands out, and the preallocated memory that its threads fill.

Letters in shapes: b is the number of rows of this rank, S the side of a view in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from hpcssl.data.reader import DamagedSample
from hpcssl.views.augment import PARAMS, ViewSpec

RING_SIZE = 4
"""Batches of memory that a loader allocates: those that its threads fill ahead, and those of the consumer."""
CONSUMER_BATCHES = 2
"""Batches that belong to the consumer: the current one, and the one before, whose copy to a GPU may still run."""


@dataclass
class Batch:
    """The rows of this rank in one training step.

    Images and parameters lie in the loader's memory. They stay valid until the batch after the next one is requested,
    and must not be written to. Copies to a GPU that were queued until then, on the current stream of the thread that
    iterates, may run later: the loader waits for them before it writes to the memory again.

    Attributes:
        step: Global step, counted from 0 through all epochs.
        epoch: Epoch of the step, from 0.
        index: Global sample indices, int64 [b]. Where a sample was damaged, the index of its replacement.
        label: Class numbers, int64 [b]; -1 where a sample has no label.
        images: Per view, uint8 [b, S, S, 3]: cropped and resized, but not augmented otherwise.
        params: Per view, ``PARAMS`` [b], the augmentation parameters for ``augment.augment_batch``.
        damaged: The damaged samples that were replaced in this batch.
        complete: False where the wait for this batch was interrupted. Its rows are then blank, and the step must not be
            taken.
    """

    step: int
    epoch: int
    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    images: list[torch.Tensor]
    params: list[npt.NDArray[np.void]]
    damaged: list[DamagedSample] = field(default_factory=list)
    complete: bool = True


class BatchSlot:
    """Memory of one batch, which the threads of a loader fill row by row.

    The memory is written once when it is allocated, so that the threads do not pay for page faults.

    Args:
        rows: Largest number of rows of a batch.
        views: The views to allocate memory for.
        pin: Whether to use page-locked memory, which copies to a GPU asynchronously.

    Attributes:
        images: Per view, uint8 [rows, S, S, 3].
        places: Per view and row, the image as uint8 [1, 3, S, S] in channels_last memory, sharing the memory above.
        params: Per view, ``PARAMS`` [rows].
        requested: The sample indices of the rows, before damaged samples are replaced.
        remaining: Number of rows that are not filled yet.
        copied: In pinned memory: an event that comes after all copies of the slot's last batch to the GPU. The slot
            must not be written to before.
        error: What was raised while filling; the consumer raises it again.
    """

    def __init__(self, rows: int, views: Sequence[ViewSpec], pin: bool):
        self.images = [torch.zeros(rows, v.size, v.size, 3, dtype=torch.uint8, pin_memory=pin) for v in views]
        self.places = [[image[r : r + 1].permute(0, 3, 1, 2) for r in range(rows)] for image in self.images]
        self.params: list[npt.NDArray[np.void]] = [np.zeros(rows, PARAMS) for _ in views]
        self.index: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.label: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.requested: list[int] = []
        self.damaged: list[DamagedSample] = []
        self.step = self.epoch = -1
        self.remaining = 0
        self.copied: torch.cuda.Event | None = None
        self.error: BaseException | None = None

    def reset(self, step: int, epoch: int, requested: npt.NDArray[np.int64]) -> None:
        """Prepare the slot for the batch of ``step`` with these sample indices."""
        self.step, self.epoch, self.requested = step, epoch, requested.tolist()
        self.index, self.label = requested.copy(), np.empty(len(requested), np.int64)
        self.damaged, self.remaining, self.error = [], len(requested), None

    def as_batch(self) -> Batch:
        """The filled rows as a batch, which shares the slot's memory."""
        rows = len(self.requested)
        return Batch(
            self.step,
            self.epoch,
            self.index,
            self.label,
            [image[:rows] for image in self.images],
            [params[:rows] for params in self.params],
            self.damaged,
        )


def record_copies() -> torch.cuda.Event:
    """An event after everything that is queued on the current stream of this thread.

    A thread that waits for it sleeps; by default it would keep a core busy.
    """
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has no annotation
    event.record()
    return event
