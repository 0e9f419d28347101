"""Threads that fill a ring of preallocated batches: decode once, cut every view into its place, draw its parameters.

Threads and not processes: the decoder and the resize release the GIL, which Python then holds for some tens of
microseconds per image, and nothing is pickled or copied. What a batch holds depends on (seed, epoch, step) alone, never
on the number of threads: each row is written by whoever is free, from its own address.

b: this rank's rows of a batch. S: pixels a side.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hpcssl import rng
from hpcssl.data.decode import Scratch, peek
from hpcssl.data.order import Order, Sequential
from hpcssl.data.reader import Loss, Reader
from hpcssl.errors import ConfigError
from hpcssl.views.augment import PARAMS, ViewSpec, draw
from hpcssl.views.crop import cut

PATIENCE_S = 2.0  # a batch that takes longer is waited for only as long as nobody gives up
LEAVE_S = 3.0  # for threads to end, which may be stuck in a read
_CHUNK = 8  # rows that a thread takes at a time
RING = 4  # batches of memory: those that threads fill ahead, and
KEPT = 2  # batches that are the consumer's: the one in hand, and the one before, whose copy to a GPU may be under way


@dataclass
class Batch:
    """One step's rows of this rank.

    ``index``: global indices int64 [b]; of the replacement where a sample was damaged. ``label``: int64 [b], -1
    without one. ``images``: uint8 [b, S, S, 3] per view, cropped and resized, nothing else. ``params``: ``PARAMS``
    [b] per view, for ``augment.apply``. ``lost``: the damaged samples that others stand in for. Images and params
    lie in the ring: they hold until the batch after the next one is asked for, and are not to be written.
    """

    step: int
    epoch: int
    index: np.ndarray
    label: np.ndarray
    images: list[torch.Tensor]
    params: list[np.ndarray]
    lost: list[Loss] = field(default_factory=list)
    whole: bool = True
    """False where the wait was given up: then these are blank rows, which nothing may be learnt from."""


class Loader:
    """Batches of global steps ``start`` .. ``stop`` - 1 for one rank.

    ``views``: what to cut; a view's number in this list is part of its address. ``threads``: 1 or more, of this
    process; ``ring``: batches of memory, of which all but two are filled ahead; ``pin``: page-locked memory, for
    copies to a GPU. ``progress(step, opened)`` is called as step ``step`` is taken, where the threads have begun with
    all steps before ``opened``. Raises ``WorldError`` where ``size`` does not divide the global batch.
    """

    def __init__(self, reader: Reader, order: Order | Sequential, views: Sequence[ViewSpec], *, seed: int,
                 rank: int = 0, size: int = 1, threads: int = 1, ring: int = RING, pin: bool = False,
                 progress: Callable[[int, int], None] | None = None):
        for name, got, least in (("data.threads", threads, 1), ("data.ring", ring, KEPT + 1), ("views", len(views), 1)):
            if got < least:
                raise ConfigError(name, got=got, expected=f"at least {least}", mend=f"set {name} to {least} or more")
        self.reader, self.order, self.views = reader, order, list(views)
        self.seed, self.rank, self.size, self.threads, self.progress = seed, rank, size, threads, progress
        self._made = order.rows(size), self.views, pin
        self._slots = [_Slot(*self._made) for _ in range(ring)]
        self._run: _Run | None = None

    @property
    def damaged(self) -> list[tuple[int, str, str]]:
        """(index, key, reason) of every damaged sample met so far, by index."""
        return [(x.index, x.key, x.reason) for _, x in sorted(self.reader.damaged.items())]

    def run(self, start: int, stop: int, give_up: Callable[[], bool] | None = None) -> Iterator[Batch]:
        """Iterate over the batches of global steps ``start`` .. ``stop`` - 1; one iterator at a time.

        Threads start here and end with the iterator, with ``close()``, or when the consumer raises. What went wrong
        in a thread is raised at the step it concerns. ``give_up`` is asked while a batch is late (``PATIENCE_S``):
        once it is true, a blank batch that is not ``whole`` comes in its place.
        """
        self.close()
        run = self._run = _Run(self, start, stop)
        try:
            run.start()
            for step in range(start, stop):
                yield run.take(step, give_up)
        finally:
            run.stop()

    def close(self) -> None:
        """Stop the threads of the current iterator and wait for them; those that are stuck are left behind, with the
        memory that they may yet write to."""
        if self._run is not None and not self._run.stop():
            self._slots = [_Slot(*self._made) for _ in self._slots]
        self._run = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class _Slot:
    """Memory of one batch, touched once so that no page fault is left for the threads."""

    def __init__(self, rows: int, views: list[ViewSpec], pin: bool):
        self.images = [torch.zeros(rows, v.size, v.size, 3, dtype=torch.uint8, pin_memory=pin) for v in views]
        self.places = [[image[r:r + 1].permute(0, 3, 1, 2) for r in range(rows)] for image in self.images]
        self.params = [np.zeros(rows, PARAMS) for _ in views]
        self.index = self.label = np.empty(0, np.int64)
        self.wanted: list[int] = []
        self.lost: list[Loss] = []
        self.step = self.epoch = -1
        self.left = 0
        self.error: BaseException | None = None

    def open(self, step: int, epoch: int, wanted: np.ndarray) -> None:
        self.step, self.epoch, self.wanted = step, epoch, wanted.tolist()
        self.index, self.label = wanted.copy(), np.empty(len(wanted), np.int64)
        self.lost, self.left, self.error = [], len(wanted), None

    def batch(self) -> Batch:
        rows = len(self.wanted)
        return Batch(self.step, self.epoch, self.index, self.label, [x[:rows] for x in self.images],
                     [p[:rows] for p in self.params], self.lost)


class _Run:
    """The threads of one iterator and what they share; ``_turn`` guards all of it."""

    def __init__(self, loader: Loader, start: int, stop: int):
        self.loader, self.begin, self.end = loader, start, stop
        self.first = any(not view.second for view in loader.views)
        self.second = any(view.second for view in loader.views)
        # small batches are shared out among the threads, large ones taken in chunks
        self.chunk = max(1, min(_CHUNK, loader.order.rows(loader.size) // loader.threads))
        self.opened = start  # the next step to open
        self.asked = start  # the step that the consumer waits for or holds
        for slot in loader._slots:
            slot.step = -1  # what an earlier iterator left there is not this one's
        self.current: _Slot | None = None
        self.row = 0
        self.over = False
        self._turn = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name=f"loader-{i}", daemon=True)
                         for i in range(loader.threads)]
        self._ready = threading.Barrier(loader.threads + 1)

    def start(self) -> None:
        before = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._ready.wait()
        # the workers' own set_num_threads(1) is also the default of threads still to come: put the trainer's back
        torch.set_num_threads(before)

    def stop(self) -> bool:
        """End the threads; False where some are stuck."""
        with self._turn:
            limit = time.monotonic() + (0.0 if self.over else LEAVE_S)  # they are waited for once
            self.over = True
            self._turn.notify_all()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, limit - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def take(self, step: int, give_up: Callable[[], bool] | None) -> Batch:
        slot = self._slot(step)
        if self.loader.progress is not None:
            self.loader.progress(step, self.opened)
        with self._turn:
            self.asked = step
            self._turn.notify_all()
            while not self._turn.wait_for(lambda: self.over or (slot.step == step and slot.left == 0),
                                          PATIENCE_S if give_up else None):
                if give_up():
                    return self._blank(step)
            if self.over:
                raise RuntimeError("the loader was closed while a batch was waited for")
            if slot.error is not None:
                raise slot.error
            return slot.batch()

    def _blank(self, step: int) -> Batch:
        """Memory of its own: a thread may yet write to the slot."""
        rows, like = self.loader.order.rows(self.loader.size), self.loader._slots[0].images
        return Batch(step, self.loader.order.epoch_of(step), np.zeros(rows, np.int64), np.full(rows, -1),
                     [torch.zeros_like(image) for image in like], [np.zeros(rows, PARAMS) for _ in like], whole=False)

    def _slot(self, step: int) -> _Slot:
        return self.loader._slots[step % len(self.loader._slots)]

    def _may_open(self) -> bool:
        """Whether the slot of the next step is free: neither in the consumer's hand nor the one before."""
        held = self.opened - len(self.loader._slots)  # the step whose slot it would take
        return self.opened < self.end and (held < self.begin or held <= self.asked - KEPT)

    def _next(self) -> tuple[_Slot, range] | None:
        """The next rows to fill; None when the run is over."""
        with self._turn:
            while not self.over:
                if self.current is not None and self.row < len(self.current.wanted):
                    rows = range(self.row, min(self.row + self.chunk, len(self.current.wanted)))
                    self.row = rows.stop
                    return self.current, rows
                if self.opened >= self.end:
                    return None
                if self._may_open():
                    self._open_next()
                else:
                    self._turn.wait()
            return None

    def _open_next(self) -> None:
        loader, step = self.loader, self.opened
        slot = self.current = self._slot(step)
        self.row, self.opened = 0, step + 1
        try:
            slot.open(step, loader.order.epoch_of(step), loader.order.part(step, loader.rank, loader.size))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            slot.open(step, -1, np.empty(0, np.int64))
            slot.error = error
        if slot.left == 0:
            self._turn.notify_all()

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are the main thread's business
        torch.get_num_threads()  # makes this thread take its default now, and not after the next line
        torch.set_num_threads(1)
        self._ready.wait()
        scratch = (Scratch(), Scratch(), Scratch())
        while (task := self._next()) is not None:
            slot, rows = task
            error = None
            try:
                self._fill(slot, rows, scratch)
            except BaseException as caught:  # noqa: BLE001 - raised again in the consumer's thread
                error = caught
            with self._turn:
                slot.left -= len(rows)
                slot.error = slot.error or error
                if slot.left == 0:
                    self._turn.notify_all()

    def _fill(self, slot: _Slot, rows: range, scratch: tuple[Scratch, Scratch, Scratch]) -> None:
        """Read and draw for all the rows, then decode and cut one after the other.

        A decode sweeps the interpreter out of the nearest caches: drawing in between costs several times as much.
        """
        reader, first, second = self.loader.reader, self.first, self.second
        ahead = []
        for row in rows:
            body = reader.read(slot.wanted[row]) if first else None
            ahead.append((body, *self._drawn(slot, row, peek(body) if first and not second else (0, 0))))
        for row, (body, size, drawn) in zip(rows, ahead, strict=True):
            index, one, two = reader.images(slot.wanted[row], slot.epoch, first=first, second=second, body=body,
                                            scratch=scratch[:2])
            slot.index[row], slot.label[row] = index, reader.labels[index]
            if index != slot.wanted[row]:
                slot.lost.append(reader.damaged[slot.wanted[row]])
            for number, view in enumerate(self.loader.views):
                image = two if view.second else one
                if image.shape[:2] != size:  # turned by EXIF, no JPEG, a replacement, or of two kinds
                    drawn[number] = self._draw(slot, row, number, image.shape[:2])
                slot.params[number][row] = drawn[number]
                cut(image, drawn[number]["box"].tolist(), view, slot.places[number][row], scratch[2])

    def _drawn(self, slot: _Slot, row: int, size: tuple[int, int]) -> tuple[tuple[int, int], list]:
        count = len(self.loader.views)
        return size, [self._draw(slot, row, n, size) for n in range(count)] if size[0] else [None] * count

    def _draw(self, slot: _Slot, row: int, number: int, size: tuple[int, int]) -> np.void:
        """View ``number`` of the sample that stands in ``row``, at its address: a replacement takes it over."""
        key = rng.key(self.loader.seed, "view", slot.epoch, slot.wanted[row], number)
        return draw(self.loader.views[number].augment, key, *size)
