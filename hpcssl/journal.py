"""Run logging: console, JSON lines, TensorBoard and progress bar.

Scalars may be tensors on the device. They are averaged and fetched together, so that a step never waits for its own
loss. A GPU copies them while the host goes on, and their lines are written with the next step; on a CPU at once. When a
run resumes, the journal is truncated to the step of the checkpoint, so that each step has one line.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.collectives import PendingReduction
from hpcssl.distributed.devices import stack_scalars, to_device
from hpcssl.distributed.liveness.record import node_name
from hpcssl.distributed.straggler import StragglerDetector
from hpcssl.distributed.world import World
from hpcssl.json_lines import JsonLinesWriter, read_scored_steps, truncate_after
from hpcssl.run_dir import RunDir
from hpcssl.storage.folders import check_pinned
from hpcssl.terminal.progress import LogHandler, ProgressBar, format_scalar, format_seconds, select_scalars
from hpcssl.timing.phase_clock import COLUMNS, read_totals

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG = logging.getLogger("hpcssl")


def set_up_logging(rank: int = 0) -> None:
    """Configure the logger of this process: rank 0 logs from INFO, other ranks from WARNING and with their number.

    Commands and jobs call it once.
    """
    LOG.handlers.clear()
    handler = LogHandler(sys.stderr)
    who = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(message)s", "%Y-%m-%d %H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    LOG.propagate = False
    threading.excepthook = _report_thread_error


def _report_thread_error(died: threading.ExceptHookArgs) -> None:
    # TensorBoard's writer thread dies of a full or missing disk, for which the journal has a message of its own
    if not isinstance(died.exc_value, OSError):
        threading.__excepthook__(died)


class Journal:
    """Scalars of a run, averaged over ranks.

    Every step is one line of ``journal.jsonl``; the newest line of each flush also goes to TensorBoard and the console.
    All ranks call ``write`` and ``flush``; rank 0 keeps the files. A full disk is reported once, and training goes on:
    lines wait in memory until there is space. What TensorBoard misses then is in ``journal.jsonl`` only.

    Args:
        run: The run folder.
        world: The processes that train together.
        first_step: Number of completed steps at the start; later lines of an earlier attempt are removed.
        last_step: Number of steps of the whole run.
        every: Steps between two flushes, at least 1.
        batch: Global batch, for the number of images per second.
    """

    def __init__(self, run: RunDir, world: World, *, first_step: int, last_step: int, every: int, batch: int):
        self.run, self.world, self.every, self.batch = run, world, every, batch
        self._last = last_step
        self._pending: list[tuple[int, dict[str, torch.Tensor | float]]] = []
        self._fetching: tuple[PendingReduction, list[int], list[list[str]], float] | None = None
        self._bar: ProgressBar | None = None
        self._file: JsonLinesWriter | None = None
        self._samples: JsonLinesWriter | None = None
        self._events: SummaryWriter | None = None
        self._reported: set[str] = set()  # files whose problem was logged
        self._clock, self._clock_step = time.monotonic(), first_step
        self._totals: dict[str, float] = {}
        self._scored: set[int] = set()  # on rank 0: steps since the start of this attempt that have scores
        self._stragglers = StragglerDetector(world.all_gather_text(node_name()))
        world.run_on_main(lambda: self._open(first_step))

    def _open(self, first_step: int) -> None:
        for path in (self.run.journal, self.run.samples):
            truncate_after(path, first_step)
        self._scored = read_scored_steps(self.run.journal, first_step)
        self._totals = read_totals(self.run.journal)
        self._file = JsonLinesWriter(self.run.journal)
        self._events = self._open_events(purge_step=first_step + 1)
        if sys.stderr.isatty():
            self._bar = ProgressBar(self._last, first=first_step)

    def _open_events(self, **options: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is used

        return SummaryWriter(str(self.run.events), **options)

    # -- scalars of steps -----------------------------------------------------------------------------------

    def write(self, step: int, **scalars: torch.Tensor | float) -> None:
        """Take this rank's scalars of a step, the same names on all ranks. Every ``every`` steps this is a collective.

        Args:
            step: Number of completed steps.
            scalars: Numbers, or tensors with one element on any device.
        """
        self._finish_flush()
        self._pending.append((step, scalars))
        if step % self.every == 0 or step == self._last:
            self._start_flush()
            if self.world.device.type == "cpu":
                self._finish_flush()

    def flush(self) -> None:
        """Average the pending scalars over ranks and write them. A collective."""
        self._finish_flush()
        self._start_flush()
        self._finish_flush()

    def _start_flush(self) -> None:
        """Average the pending scalars over ranks, and begin to copy the means to the host. A collective."""
        if not self._pending:
            return
        steps, rows = [step for step, _ in self._pending], [scalars for _, scalars in self._pending]
        self._pending = []
        now = time.monotonic()
        rate = (steps[-1] - self._clock_step) * self.batch / max(now - self._clock, 1e-9)
        self._clock, self._clock_step = now, steps[-1]
        means = self.world.all_reduce_mean(torch.cat([stack_scalars(rows, self.world.device), self._times()]))
        self._fetching = PendingReduction(means, None), steps, [list(row) for row in rows], rate

    def _finish_flush(self) -> None:
        """Write the means that were copied, if there are some. Not a collective."""
        if self._fetching is None:
            return
        (reduction, steps, names, rate), self._fetching = self._fetching, None
        values = iter(reduction.result().tolist())
        lines: list[dict[str, Any]] = [
            {"step": step, **{name: _finite(next(values)) for name in row}}
            for step, row in zip(steps, names, strict=True)
        ]
        lines[-1]["images_per_s"] = round(rate, 1)
        if self.world.is_main:
            lines[-1] |= self._rank_times(list(values))
            lines[-1] |= self._phase_totals()
            self._write(lines)

    def _times(self) -> torch.Tensor:
        """[2·W] float64: this rank's own seconds per step and its wait for data, at its index; 0 for other ranks."""
        world = self.world
        times = np.zeros((2, world.size if world.heartbeat is not None else 0))
        if world.heartbeat is not None:
            times[:, world.rank] = world.heartbeat.clock.take()
        return to_device(times.flatten(), world.device)

    def _phase_totals(self) -> dict[str, float]:
        """Seconds that rank 0 has spent in each category of phases, over all attempts."""
        if self.world.heartbeat is None:
            return {}
        for name, seconds in self.world.heartbeat.activity.phases.take().items():
            self._totals[name] += seconds
        return {column: round(self._totals[name], 3) for name, column in COLUMNS.items()}

    def _rank_times(self, means: list[float]) -> dict[str, float]:
        """Scalars about the ranks' seconds per step, from their means over ranks. Logs a warning about a straggler."""
        size = self.world.size
        if size == 1 or not means:
            return {"data_s": round(means[1], 5)} if means else {}
        own, data = ([size * seconds for seconds in means[at : at + size]] for at in (0, size))
        scalars, warning = self._stragglers.update(own, data)
        if warning:
            LOG.warning("%s", warning)
        return {name: round(value, 5) for name, value in scalars.items()}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        assert self._file is not None
        self._report(self.run.journal, self._file.add(*lines))
        newest = dict(lines[-1])
        step = newest.pop("step")
        self._write_events(newest, step)
        self._show(step, select_scalars(newest))

    def sync(self) -> None:
        """``flush``, and force everything to the disk. A collective.

        Called before a checkpoint: a run that resumes there does not write earlier lines again.
        """
        self.flush()
        for file in (self._file, self._samples):
            if file is not None:
                self._report(file.path, file.sync())
        if self._file is not None:
            self._write_events({}, 0, flush=True)

    # -- scores of evaluations ------------------------------------------------------------------------------

    def has_scores(self, step: int) -> bool:
        """Whether the results of an evaluation at ``step`` were written already. A collective.

        Args:
            step: Not before the first step of this attempt.
        """
        return self.world.any(self.world.is_main and step in self._scored)

    def write_scores(self, step: int, **scores: float) -> None:
        """Write the results of an evaluation during training; rank 0 writes them. Not a collective."""
        if self.world.is_main:
            assert self._file is not None
            self._report(self.run.journal, self._file.add({"step": step, "eval": True, **scores}))
            self._scored.add(step)
            self._write_events({f"eval/{name}": value for name, value in scores.items()}, step)
            LOG.info("step %d/%d  %s", step, self._last, _join({k: f"{v:.4g}" for k, v in scores.items()}))
        self._clock = time.monotonic()  # the rate counts training time only

    # -- sample ids -----------------------------------------------------------------------------------------

    def write_sample_ids(self, step: int, index: torch.Tensor, layout: BatchLayout) -> None:
        """Write the sample ids of the global batch of a step, in its order. A collective.

        Args:
            step: Number of completed steps.
            index: Sample ids of this rank, int64 [b].
            layout: How the global batch is split.
        """
        ids = self.world.all_gather_rows(index.to(self.world.device), layout).tolist()
        if self.world.is_main:
            self._samples = self._samples or JsonLinesWriter(self.run.samples)
            self._report(self.run.samples, self._samples.add({"step": step, "index": ids}))

    def close(self) -> None:
        """Write what is pending on rank 0 and close the files; ``os._exit`` loses nothing afterwards.

        Not a collective: scalars that were not flushed are dropped.
        """
        self._pending.clear()
        self._fetching = None  # a collective of a rank that has failed never ends
        for file in (self._file, self._samples):
            if file is not None:
                self._report(file.path, file.close())
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        self._file = self._samples = self._events = None
        if self._bar is not None:
            self._bar.close()

    # -- output ---------------------------------------------------------------------------------------------

    def _write_events(self, scalars: dict[str, Any], step: int, *, flush: bool = False) -> None:
        """Write scalars to TensorBoard. Its writer does not survive a full disk: the next ``sync`` opens a new one."""
        if self._events is None and not flush:
            return
        try:
            check_pinned(self.run.events)
            if self._events is None:
                self._events = self._open_events()
            for name, value in scalars.items():
                self._events.add_scalar(name, float(value), step)
            if flush:
                self._events.flush()
                self._report(self.run.events, None)
        except OSError as error:
            self._events = None
            self._report(self.run.events, error.strerror or str(error))

    def _report(self, path: Path, why: str | None) -> None:
        """Log once that a file could not be written; ``why`` None: it was written."""
        if why is None:
            self._reported.discard(str(path))
        elif str(path) not in self._reported:
            self._reported.add(str(path))
            LOG.warning("%s: %s; training continues, and lines are kept in memory until there is space", path, why)

    def _show(self, step: int, words: dict[str, str]) -> None:
        if self._bar is not None:
            self._bar.update(step, words)
            return
        left_s = (self._last - step) * self.batch / max(float(words["images/s"]), 1e-9)
        LOG.info("step %d/%d  %s  %s left", step, self._last, _join(words), format_seconds(left_s))


def _join(words: dict[str, str]) -> str:
    return "  ".join(format_scalar(name, value) for name, value in words.items())


def _finite(value: float) -> float | str:
    # JSON has no infinities, and readers in other languages must be able to read the journal of a diverged run
    return value if math.isfinite(value) else str(value)
