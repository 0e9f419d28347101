"""What the main thread of a rank does: written by the main thread, read by the threads of its heartbeat."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpcssl.distributed.liveness import stacks
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.distributed.liveness.record import HeartbeatRecord, node_name
from hpcssl.distributed.straggler import StepClock
from hpcssl.timing.phase_clock import PhaseClock


class Activity:
    """Phase, step, collectives and time of last progress of this rank's main thread.

    Only this rank's own activity counts as progress: entering a phase, calling a collective, or an explicit report.
    A rank that others wait for may therefore work for any time, as long as it reports progress.

    Args:
        rank: Index of this process.
        interval_s: Seconds between two records.
        limits: Receives how long each phase is without progress.
        event: Makes a timing event on the current CUDA stream; None on a CPU.
        phases: Adds up the time in each phase; by default a new clock.

    Attributes:
        record: The last record made.
        last_progress: Time of the last progress, seconds of the monotonic clock.
        patient: Whether the current phase is one long call that counts as progress while the process is alive.
        computing: Whether it is one long call that counts as progress while a processor is used.
        clock: Times of this rank per step.
    """

    def __init__(
        self,
        rank: int,
        interval_s: float,
        limits: PhaseLimits,
        event: Callable[[], Any] | None = None,
        phases: PhaseClock | None = None,
    ):
        self.interval_s, self.limits, self.phases = interval_s, limits, phases or PhaseClock()
        self.record = HeartbeatRecord(rank=rank, host=node_name(), pid=os.getpid())
        self.clock = StepClock(event)
        self.patient = self.computing = False
        self.last_progress = time.monotonic()
        self._main = threading.main_thread().ident
        self._phase = "start"
        self._step: int | None = None
        self._count = 0
        self._last: tuple[str, object, Sequence[int]] | None = None
        self._inside = False

    # -- called by the main thread --------------------------------------------------------------------------

    def set_phase(self, phase: str, step: int | None = None, *, patient: bool = False, computing: bool = False) -> None:
        """The main thread now does ``phase`` of ``step``."""
        self._progress()
        self.limits.enter(phase)
        self.phases.enter(phase)
        self._phase, self._inside, self.patient, self.computing = phase, False, patient, computing
        if step is not None:
            self._step = step
        if phase == "data":
            self.clock.wait_for_data()
        elif phase == "step":
            self.clock.begin_step()
        elif phase == "backward":
            self.clock.begin_last_backward()

    def report_progress(self, phase: str) -> None:
        """There was progress in what the main thread waits for in ``phase``. From any thread."""
        if self._phase == phase:
            self._progress()

    def _progress(self) -> None:
        now = time.monotonic()
        self.limits.observe(self._phase, now - self.last_progress)
        self.last_progress = now

    def enter_collective(self, kind: str, dtype: object, shape: Sequence[int]) -> None:
        """The main thread calls a collective."""
        self._count += 1
        self._last, self._inside, self.patient, self.computing = (kind, dtype, shape), True, False, False
        self._progress()
        self.clock.enter_collective()

    def leave_collective(self) -> None:
        """The collective has returned; it is over, or launched."""
        self.clock.leave_collective()
        self.set_waiting(False)

    def set_waiting(self, waiting: bool) -> None:
        """Whether the main thread waits for a collective that was launched before."""
        self._inside = waiting
        self._progress()

    # -- called by any thread -------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """What the main thread does."""
        return self._phase

    @property
    def completed_steps(self) -> int | None:
        """Number of completed steps; None before the first step was begun."""
        return None if self._step is None else self._step - 1

    @property
    def position(self) -> str:
        """Current step and phase in words."""
        return dataclasses.replace(self.record, phase=self._phase, step=self._step).position

    @property
    def in_debugger(self) -> bool:
        """Whether the main thread stands in a debugger."""
        return stacks.in_debugger(self._main)

    def next_record(self) -> str:
        """Update ``record`` and return it as JSON."""
        idle = time.monotonic() - self.last_progress
        others = "" if self._inside or idle < 2 * self.interval_s else stacks.other_stacks(self._main)
        self.record = dataclasses.replace(
            self.record,
            phase=self._phase,
            step=self._step,
            idle=0.0 if self.patient else round(idle, 1),
            count=self._count,
            last=_words(self._last),
            inside=self._inside,
            others=others,
            number=self.record.number + 1,
            stack=stacks.main_stack(self._main),
        )
        return json.dumps(dataclasses.asdict(self.record))


def _words(collective: tuple[str, object, Sequence[int]] | None) -> str:
    if collective is None:
        return "no collective"
    kind, dtype, shape = collective
    return f"{kind} of {str(dtype).removeprefix('torch.')} {list(shape)}"
