"""Heartbeat of a rank: it publishes what the rank does, and ends an attempt in which no rank makes progress.

Each rank writes a record about once a second to a store that all ranks can read, from one thread
(``RecordExchange``). A second thread (``HangMonitor``) watches the main thread. If that has made no progress for too
long (``PhaseLimits``), the records of all ranks show which rank is to blame (``hang_report``), and the attempt ends.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.distributed.liveness import hang_report
from hpcssl.distributed.liveness.activity import Activity
from hpcssl.distributed.liveness.exchange import RecordExchange
from hpcssl.distributed.liveness.hang_monitor import HangMonitor
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.distributed.liveness.record import HeartbeatRecord
from hpcssl.distributed.straggler import StepClock
from hpcssl.timing.phase_clock import PhaseClock

INTERVAL_S = 1.0
"""Seconds between two records of a rank."""
SILENT_INTERVALS, SILENT_S = 4, 20.0
"""A rank is silent after this many intervals, and after a tenth of ``hang_s`` or this many seconds, whichever is less.
"""
MIN_OBSERVATION_S = 2.0
"""Minimum time in seconds for which records are read after a collective has failed: a node may be busy."""

READER_PATIENCE, MAX_TAKEOVERS = 4, 2
"""After so many times the observation, another rank reads the records; and how often that may happen."""


class Heartbeat:
    """Heartbeat of one rank, with two threads.

    Args:
        store: The store that all ranks share; None for one process, where only the own main thread is watched.
        rank: Index of this process.
        size: Number of processes.
        limits: Seconds without progress after which the attempt ends.
        leave: Called at most once per rank, from another thread, with the cause and a sentence. The cause is ``hang``,
            ``killed`` if another rank is gone, or ``error`` if another rank has failed, and the own main thread did
            not notice. It must end the process.
        interval_s: Seconds between two records.
        event: Makes a timing event on the current CUDA stream; None on a CPU.
        phases: See ``Activity``.
    """

    def __init__(
        self,
        store: KeyValueStore | None,
        rank: int = 0,
        size: int = 1,
        *,
        limits: PhaseLimits,
        leave: Callable[[str, str], None],
        interval_s: float = INTERVAL_S,
        event: Callable[[], Any] | None = None,
        phases: PhaseClock | None = None,
    ):
        hang_s = limits.hang_s
        interval_s = min(interval_s, hang_s / 8) if hang_s else interval_s
        silent_s = max(SILENT_INTERVALS * interval_s, min(SILENT_S, hang_s / 10))
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self.activity = Activity(rank, interval_s, limits, event, phases)
        self._exchange = RecordExchange(store, self.activity, size, self._closed) if store is not None else None
        self._monitor = HangMonitor(
            self.activity, self._exchange, limits=limits, silent_s=silent_s, leave=leave, closed=self._closed
        )

    def start(self) -> Heartbeat:
        """Start the threads."""
        work: dict[str, Callable[[], None]] = {"heartbeat": self._monitor.run}
        if self._exchange is not None:
            work["heartbeat-store"] = self._exchange.run
        for name, run in work.items():
            self._threads.append(threading.Thread(target=run, name=name, daemon=True))
            self._threads[-1].start()
        return self

    def close(self) -> None:
        """Stop the threads, except for one that waits for a suspended rank 0.

        Python before 3.14 aborts if it ends while a thread returns from torch's store, so they are joined for a while.
        """
        self._closed.set()
        if self._exchange is not None:
            self._exchange.wake()
        for thread in self._threads:
            thread.join(self.activity.interval_s)

    # -- called by the main thread --------------------------------------------------------------------------

    def set_phase(self, phase: str, step: int | None = None, *, patient: bool = False, computing: bool = False) -> None:
        """Report what the main thread does now.

        Args:
            phase: Name of the phase, for a person.
            step: The step that is being taken, from 1; None leaves it as it was.
            patient: The phase is one long call that cannot report progress; it counts as progress as long as the
                process is alive.
            computing: The same, as long as the process or one of its children uses the processor.
        """
        self.activity.set_phase(phase, step, patient=patient, computing=computing)

    def report_progress(self, phase: str) -> None:
        """Report, from any thread, progress in what the main thread waits for in ``phase``."""
        self.activity.report_progress(phase)

    def enter_collective(self, kind: str, dtype: object, shape: Sequence[int]) -> None:
        """Report that the main thread calls a collective on a tensor of this dtype and shape."""
        self.activity.enter_collective(kind, dtype, shape)

    def leave_collective(self) -> None:
        """Report that the collective has returned: it is over, or launched."""
        self.activity.leave_collective()

    def set_waiting(self, waiting: bool) -> None:
        """Report whether the main thread waits for a collective that was launched before."""
        self.activity.set_waiting(waiting)

    # -- read by others -------------------------------------------------------------------------------------

    @property
    def clock(self) -> StepClock:
        """Times of this rank per step."""
        return self.activity.clock

    @property
    def record(self) -> HeartbeatRecord:
        """This rank's last record."""
        return self.activity.record

    @property
    def completed_steps(self) -> int | None:
        """Number of completed steps; None before the first step was begun."""
        return self.activity.completed_steps

    @property
    def position(self) -> str:
        """Current step and phase in words."""
        return self.activity.position

    # -- failures -------------------------------------------------------------------------------------------

    def report_failure(self, sentence: str, cause: str = "error") -> None:
        """Report to the other ranks, which may wait for this one, why it fails. Returns within a few intervals."""
        if self._exchange is not None and not self._exchange.lost:
            self._exchange.post_end(cause, sentence)

    def explain_collective_error(self) -> tuple[str, str]:
        """Find out which rank is to blame after a collective has failed on this rank.

        One rank reads the records of all; the others wait for what it reports with ``report_failure``. If it is gone as
        well, another one reads.

        Returns:
            The cause (``error``, ``hang`` or ``killed``) and a sentence that names the rank: it has reported its own
            failure, or is silent, or has called another collective. Both are empty for one process; the sentence is
            empty if nothing was found.
        """
        exchange = self._exchange
        if exchange is None:
            return "", ""
        enough_s = max(2.5 * self.activity.interval_s, MIN_OBSERVATION_S)
        exchange.failed = True
        for takeovers in range(MAX_TAKEOVERS + 1):
            exchange.takeovers = takeovers
            if self._wait_for_reader(exchange, enough_s):
                break
        if exchange.end:
            end = json.loads(exchange.end)
            return end["cause"], end["why"]
        silent, records = exchange.silent_ranks(time.monotonic(), 0.8 * enough_s), exchange.records()
        if not exchange.is_reader:  # of the others, only the record of rank 0 is new
            silent = {rank: age for rank, age in silent.items() if rank == 0}
            return ("killed", hang_report.describe_silent_ranks(silent, records)) if silent else ("error", "")
        if silent:
            return "killed", hang_report.describe_silent_ranks(silent, records)
        return "error", hang_report.describe_mismatch(records)

    def _wait_for_reader(self, exchange: RecordExchange, enough_s: float) -> bool:
        """Wait until all records were read for ``enough_s``, by this rank, or by another one that has reported.

        Returns:
            False if the rank that was to read has not reported.
        """
        began = time.monotonic()
        exchange.wake()
        while (elapsed := time.monotonic() - began) < READER_PATIENCE * enough_s:
            if exchange.lost or exchange.end or (exchange.is_reader and exchange.last_answer >= began + enough_s):
                return True
            if elapsed >= 2 * enough_s and time.monotonic() - exchange.last_answer > 0.8 * enough_s:
                return True  # the store does not answer
            time.sleep(self.activity.interval_s / 4)
        return exchange.is_reader
