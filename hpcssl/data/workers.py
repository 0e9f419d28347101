"""The threads of a loader: they decode images, cut every view into its place, and draw its augmentation parameters."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hpcssl import rng
from hpcssl.data.batch import CONSUMER_BATCHES, Batch, BatchSlot, record_copies
from hpcssl.data.crop import crop_view
from hpcssl.data.decode import ScratchBuffer, peek_size
from hpcssl.data.native.library import ViewDecoder
from hpcssl.data.order import BatchOrder
from hpcssl.data.reader import Reader
from hpcssl.views.augment import PARAMS, ViewSpec, draw_params

LATE_BATCH_S = 2.0
"""Seconds to wait for a batch before ``give_up`` is called, and between two such calls."""
JOIN_TIMEOUT_S = 3.0
"""Seconds to wait for the threads to end. A thread may be stuck in a read."""
_CHUNK = 8  # rows that a thread takes at a time

Scratch3 = tuple[ScratchBuffer, ScratchBuffer, ScratchBuffer]
"""A thread's buffers: for the decoded image, for its second modality, and for the crop."""


class LoaderWorkers:
    """The threads of one pass over steps ``start`` .. ``stop`` - 1, and the state they share.

    ``_condition`` guards all of the shared state.

    Args:
        reader: Where images come from.
        order: Which samples stand in which batch.
        views: The views to cut. A view's position in this list is part of its random key.
        slots: The ring of batches to fill. The batch of step t lies in slot t modulo the ring's size.
        seed: Seed of the augmentation parameters.
        rank: This process's rank.
        size: Number of processes.
        threads: Number of threads.
        start: First step.
        stop: One past the last step.
        pin: Whether the slots are pinned memory, from which a GPU may still copy after a batch was released.
        library: The native decoder (``native.selection.select_library``); None for the plain one.

    Attributes:
        opened: The next step whose rows will be handed out to threads.
        wanted_step: The step that the consumer waits for or holds.
    """

    def __init__(
        self,
        reader: Reader,
        order: BatchOrder,
        views: Sequence[ViewSpec],
        slots: Sequence[BatchSlot],
        *,
        seed: int,
        rank: int,
        size: int,
        threads: int,
        start: int,
        stop: int,
        pin: bool = False,
        library: ctypes.CDLL | None = None,
    ):
        self.reader, self.order, self.views, self.slots = reader, order, views, slots
        self.seed, self.rank, self.size = seed, rank, size
        self.start_step, self.stop_step, self.pin = start, stop, pin
        self.reads_first = any(not view.second for view in views)
        self.reads_second = any(view.second for view in views)
        # small batches are shared out among the threads, large ones are taken in chunks
        self.chunk = max(1, min(_CHUNK, order.rows_per_rank(size) // threads))
        self.opened = start
        self.wanted_step = start
        copied = record_copies() if pin else None
        for slot in slots:
            slot.step = -1  # a batch of an earlier pass does not belong to this one
            slot.copied = copied  # but the GPU may not have copied it yet
        self._current: BatchSlot | None = None  # the slot whose rows are handed out
        self._row = 0  # its next row
        self._is_opening = False  # whether a thread waits for copies from the next slot
        self._stopped = False
        self._condition = threading.Condition()
        decoders = [ViewDecoder(library) if library is not None else None for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(decoder,), name=f"loader-{i}", daemon=True)
            for i, decoder in enumerate(decoders)
        ]
        self._ready = threading.Barrier(threads + 1)

    def start(self) -> None:
        """Start the threads and wait until each has set its number of torch threads."""
        before = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._ready.wait()
        # set_num_threads(1) in a worker also sets the default of later threads: restore the trainer's number
        torch.set_num_threads(before)

    def stop(self) -> bool:
        """End the threads.

        Returns:
            False where some thread is stuck and was left behind.
        """
        with self._condition:
            limit = time.monotonic() + (0.0 if self._stopped else JOIN_TIMEOUT_S)  # wait for them only once
            self._stopped = True
            self._condition.notify_all()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, limit - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def take(self, step: int, give_up: Callable[[], bool] | None) -> Batch:
        """Wait for the batch of ``step``; errors of the threads are raised here.

        Args:
            step: The step to return. Steps must be taken in order.
            give_up: Called while the batch is late. Once it returns True, a blank batch is returned.
        """
        slot = self._slot_of(step)
        with self._condition:
            if self.pin and step - CONSUMER_BATCHES >= self.start_step:
                # from here on the consumer queues no more copies of that batch
                self._slot_of(step - CONSUMER_BATCHES).copied = record_copies()
            self.wanted_step = step
            self._condition.notify_all()
            while not self._condition.wait_for(
                lambda: self._stopped or (slot.step == step and slot.remaining == 0),
                LATE_BATCH_S if give_up else None,
            ):
                if give_up is not None and give_up():
                    return self._blank_batch(step)
            if self._stopped:
                raise RuntimeError("the loader was closed while a batch was waited for")
            if slot.error is not None:
                raise slot.error
            return slot.as_batch()

    def _blank_batch(self, step: int) -> Batch:
        """A batch of zeros in memory of its own, because a thread may still write to the slot."""
        rows, images = self.order.rows_per_rank(self.size), self.slots[0].images
        return Batch(
            step,
            self.order.epoch_of(step),
            np.zeros(rows, np.int64),
            np.full(rows, -1),
            [torch.zeros_like(image) for image in images],
            [np.zeros(rows, PARAMS) for _ in images],
            complete=False,
        )

    def _slot_of(self, step: int) -> BatchSlot:
        return self.slots[step % len(self.slots)]

    def _may_open(self) -> bool:
        """Whether the slot of the next step is free, so that it is none of the consumer's batches."""
        overwritten = self.opened - len(self.slots)  # the step whose slot it would take
        is_free = overwritten < self.start_step or overwritten <= self.wanted_step - CONSUMER_BATCHES
        return self.opened < self.stop_step and is_free and not self._is_opening

    def _next_task(self) -> tuple[BatchSlot, range] | None:
        """The next rows to fill; None when the pass is over."""
        with self._condition:
            while not self._stopped:
                if self._current is not None and self._row < len(self._current.requested):
                    rows = range(self._row, min(self._row + self.chunk, len(self._current.requested)))
                    self._row = rows.stop
                    return self._current, rows
                if self.opened >= self.stop_step:
                    return None
                if self._may_open():
                    self._open_next()
                else:
                    self._condition.wait()
            return None

    def _open_next(self) -> None:
        step, slot = self.opened, self._slot_of(self.opened)
        try:
            self._wait_for_copies(slot)
            slot.reset(step, self.order.epoch_of(step), self.order.local_batch(step, self.rank, self.size))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            slot.reset(step, -1, np.empty(0, np.int64))
            slot.error = error
        self._current, self._row, self.opened = slot, 0, step + 1
        self._condition.notify_all()

    def _wait_for_copies(self, slot: BatchSlot) -> None:
        """Wait until the GPU has copied the last batch of a slot. The other threads and the consumer go on meanwhile.

        A copy from pinned memory is only queued when a batch is copied: it may run steps later, and would then read
        what a thread has written since.
        """
        event, slot.copied = slot.copied, None
        if event is None:
            return
        self._is_opening = True
        self._condition.release()
        try:
            with torch.cuda.device(event.device):  # the current device is another one in each thread
                event.synchronize()
        finally:
            self._condition.acquire()
            self._is_opening = False

    def _work(self, decoder: ViewDecoder | None) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles signals
        torch.get_num_threads()  # makes this thread take its default now, and not after the next line
        torch.set_num_threads(1)
        self._ready.wait()
        scratch = (ScratchBuffer(), ScratchBuffer(), ScratchBuffer())
        while (task := self._next_task()) is not None:
            slot, rows = task
            error = None
            try:
                self._fill(slot, rows, scratch, decoder)
            except BaseException as caught:  # noqa: BLE001 - raised again in the consumer's thread
                error = caught
            with self._condition:
                slot.remaining -= len(rows)
                slot.error = slot.error or error
                if slot.remaining == 0:
                    self._condition.notify_all()

    def _fill(self, slot: BatchSlot, rows: range, scratch: Scratch3, decoder: ViewDecoder | None) -> None:
        """Read and draw for all rows first, then decode and cut one row after the other.

        A decode evicts the interpreter from the nearest caches: drawing between two decodes costs several times as
        much.
        """
        first, second = self.reads_first, self.reads_second
        pending = []
        for row in rows:
            body = self.reader.read(slot.requested[row]) if first else None
            size = (0, 0) if body is None or second else peek_size(body)
            drawn = [self._draw(slot, row, number, size) if size[0] else None for number in range(len(self.views))]
            pending.append((body, size, drawn))
        for row, (body, size, drawn) in zip(rows, pending, strict=True):
            requested = slot.requested[row]
            if decoder is not None and self._decode_natively(slot, row, body, size, drawn, decoder):
                continue
            index, image_a, image_b = self.reader.read_images(
                requested, slot.epoch, first=first, second=second, body=body, scratch=scratch[:2]
            )
            slot.index[row], slot.label[row] = index, self.reader.label(index)
            if index != requested:
                slot.damaged.append(self.reader.damaged[requested])
            for number, view in enumerate(self.views):
                image = image_b if view.second else image_a
                assert image is not None  # read_images decodes every modality that some view shows
                params = drawn[number]
                # the size was unknown or wrong: turned by EXIF, not a JPEG, a replacement, or two modalities
                if params is None or image.shape[:2] != size:
                    params = self._draw(slot, row, number, image.shape[:2])
                slot.params[number][row] = params
                crop_view(image, params["box"].tolist(), view, slot.places[number][row], scratch[2])

    def _decode_natively(
        self,
        slot: BatchSlot,
        row: int,
        body: bytes | None,
        size: tuple[int, int],
        drawn: Sequence[np.void | None],
        decoder: ViewDecoder,
    ) -> bool:
        """Fill a row with the native decoder. Returns False where it does not take the image."""
        views = []
        for view, place, params in zip(self.views, slot.places, drawn, strict=True):
            if params is None:
                return False
            views.append((params["box"].tolist(), view.size, view.augment.interpolation, place[row].data_ptr()))
        if body is None or not decoder.decode(body, size, views):
            return False
        requested = slot.requested[row]
        slot.index[row], slot.label[row] = requested, self.reader.label(requested)
        for stored, params in zip(slot.params, drawn, strict=True):
            stored[row] = params
        return True

    def _draw(self, slot: BatchSlot, row: int, number: int, size: tuple[int, ...]) -> np.void:
        """Parameters of view ``number`` in ``row``. The key is that of the requested sample, also for a replacement."""
        key = rng.key(self.seed, "view", slot.epoch, slot.requested[row], number)
        return draw_params(self.views[number].augment, key, *size)
