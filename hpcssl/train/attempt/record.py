"""The record of one attempt in ``attempts.jsonl``: where it began, how it ended, and the lock of its run folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcssl import attempts, files
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.distributed.world import World
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, RankLost
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.storage import folders
from hpcssl.timing.phase_clock import PhaseClock
from hpcssl.train.attempt.run_lock import RunLock

LOG = logging.getLogger("hpcssl")
_MAX_REASON = 500  # characters of an error's message that are kept


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended that did not fail.

    Attributes:
        cause: ``done``, or why it was stopped (``stopped``, ``timeout``, ``preempted``, ...).
        signals: Names of the signals and other reasons that stopped it, over all ranks; empty where it is done.
        problem: A sentence about what went wrong at the stop, such as a checkpoint that could not be written or a
            further attempt that was refused; None if nothing did.
    """

    cause: str = "done"
    signals: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def exit_code(self) -> int:
        """0 for a finished run, 75 for one that can be resumed."""
        return EXIT_DONE if self.cause == "done" else EXIT_STOPPED


class AttemptRecord:
    """Writes two lines to ``attempts.jsonl``, at the start and at the end of an attempt, and holds the run's lock.

    Rank 0 writes them, except for a failure: the first rank that fails writes that. Use it as a context manager, so
    that an error is recorded and the lock is released.

    Args:
        run: The run folder.
        world: The processes. All ranks make a record.
        fields: Fields for both lines that the caller knows, such as ``attempt`` and ``job``. By default the attempt
            gets the next number, and the process id as its job.
        hang_s: See ``PhaseLimits``.
        hang_factor: See ``PhaseLimits``.
        hang_floor_s: See ``PhaseLimits``.

    Attributes:
        fields: The fields of both lines.
        lock: The run's lock, on rank 0; None on other ranks.
        limits: The time without progress per phase, which the line of the end has as ``longest_waits``.
        phases: The time in each phase. What the journal has not taken is ``unlogged_s`` in the line of the end.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        fields: dict[str, Any],
        *,
        hang_s: float = 0.0,
        hang_factor: float = 0.0,
        hang_floor_s: float = 0.0,
    ):
        self.run, self.world = run, world
        lines = self._read_lines()
        number = max((line["attempt"] for line in lines), default=0) + 1
        own_fields: dict[str, Any] = {"attempt": number, "job": f"process {os.getpid()}"}
        own_fields["began"] = round(process_start(), 1)
        self.fields = own_fields | fields
        self.lock = (
            RunLock(run, str(self.fields["job"]), attempt=self.fields["attempt"], requeued="job" in fields)
            if world.is_main
            else None
        )
        ends = [line for line in lines if line["event"] == "end"]
        # After a hang nothing is learned: were the limit too short, the next attempt would end at the same step.
        is_learned = not any(e.get("cause") == "hang" and e["attempt"] == ends[-1]["attempt"] for e in ends)
        history = read_longest_waits(ends, world)
        factor = hang_factor if is_learned else 0.0
        self.limits = PhaseLimits(hang_s, factor=factor, floor_s=hang_floor_s, history=history)
        self.phases = PhaseClock()
        self._current_step: Callable[[], int] | None = None
        self._pinned = False

    @property
    def started(self) -> bool:
        """Whether the line of the start was written."""
        return self._current_step is not None

    def take_lock(self, patience_s: float, stop: StopFlag) -> None:
        """Take the run's lock on rank 0. A collective; if the lock is lost later, ``stop`` is set.

        Args:
            patience_s: How long to wait for another holder to leave, in seconds.
            stop: Ends the wait when it is set.

        Raises:
            ResumeError: On all ranks, where another process trains in this folder.
            Stopped: On all ranks, where ``stop`` was set during the wait.
        """
        if self.lock is not None:
            self.lock.on_loss = lambda: stop.set("the run's lock was lost")

        def should_stop() -> bool:
            self.world.set_phase("lock")  # the wait has an end of its own
            return stop.is_set()

        self.world.set_phase("lock")
        self.world.run_on_main(lambda: self._main_lock().take(patience_s, should_stop))
        folders.make_folder(self.run.root)  # another node may not see it yet
        self._pinned = folders.pin_folder(self.run.root)

    def check_lock(self) -> None:
        """On rank 0: raise ``ResumeError`` if the lock is lost (``RunLock.check``)."""
        self._main_lock().check()

    def _main_lock(self) -> RunLock:
        assert self.lock is not None, "the lock is rank 0's"
        return self.lock

    def start(self, current_step: Callable[[], int]) -> None:
        """Write the line of the start. A collective.

        Args:
            current_step: Returns the number of finished steps. It is asked again when the attempt ends.
        """
        self.world.run_on_main(lambda: self._write_start(current_step()))
        # by hand, the processes have different ids, and may have read different numbers
        self.fields |= json.loads(
            self.world.broadcast_text(json.dumps({n: self.fields[n] for n in ("attempt", "job")}))
        )
        self.phases.take()  # the start-up is the time between ``began`` and this line
        self._current_step = current_step

    def _write_start(self, first_step: int) -> None:
        with files.exclusive_lock(self.run.attempts):  # a job that waits for this run's lock may record its end
            self.fields["attempt"] = attempts.choose_number(self._read_lines(), self.fields)
            self._write(event="start", first_step=first_step)

    def finish(self, result: AttemptResult) -> None:
        """Write the line of the end, on rank 0, if the attempt was started."""
        if self._current_step is None or not self.world.is_main:
            return
        line: dict[str, Any] = {"event": "end", "cause": result.cause, "last_step": self._current_step()}
        if result.cause != "done":
            line["signals"] = list(result.signals)
        if result.problem:
            line["why"] = result.problem
        line["unlogged_s"] = self.phases.take()
        try:
            self._write(**line)
        except OSError as error:  # a full disk must not turn a stop into a failure
            self._warn_unwritten(error)

    def fail(self, cause: str, why: str, step: int | None = None, *, consequence: bool = False) -> None:
        """Write that the attempt failed, from any rank and thread, unless it has not started or a rank has done so.

        Only the first failure is recorded, since the others follow from it. No collective.

        Args:
            cause: ``error``, ``hang``, ``killed`` or ``lost``.
            why: A sentence.
            step: Number of finished steps; by default what ``current_step`` of ``start`` returns.
            consequence: Whether the failure was caused by that of another rank, which may explain more.
        """
        # Looked up without the lock first: of a thousand ranks, few should queue for the file.
        if self._current_step is None or self._has_end():
            return
        with files.exclusive_lock(self.run.attempts):
            if not self._has_end():
                last_step = self._current_step() if step is None else step
                marks = {"consequence": True} if consequence else {}
                self._write(event="end", cause=cause, why=why, last_step=last_step, **marks)

    def _has_end(self) -> bool:
        number = self.fields["attempt"]
        ends = (line for line in self._read_lines() if (line["event"], line["attempt"]) == ("end", number))
        return any(attempts.is_same_attempt(line, self.fields) for line in ends)

    def _read_lines(self) -> list[dict[str, Any]]:
        return files.read_lines(self.run.attempts, {"event": str, "attempt": int}, attempts.FIELDS)

    def _write(self, **fields: Any) -> None:
        about = {"host": socket.gethostname()} | self.fields
        if fields["event"] == "end":
            fields["longest_waits"] = self.limits.summary()
        where = {"world": self.world.size, "device": self.world.device.type}
        files.append_line(self.run.attempts, about | fields | where | {"time": round(time.time(), 1)})

    def _warn_unwritten(self, error: OSError) -> None:
        LOG.warning(
            "%s: %s. The end of this attempt is not recorded there.", self.run.attempts, error.strerror or error
        )

    def __enter__(self) -> AttemptRecord:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None:
            try:
                self._fail_with(error)
            except OSError as full:  # a full disk must not hide the error
                self._warn_unwritten(full)
        if self.lock is not None:
            self.lock.release()
        if self._pinned:  # not where the job has pinned it
            folders.unpin_folder(self.run.root)

    def _fail_with(self, error: BaseException) -> None:
        if isinstance(error, RankLost):
            self.fail(error.cause, error.got)
            return
        rank = "" if self.world.is_main else f"rank {self.world.rank}: "
        message = " ".join(f"{type(error).__name__}: {error}".split())
        consequence = self.world.is_collective_error(error)
        self.fail("error", (rank + message)[:_MAX_REASON], consequence=consequence)


def read_longest_waits(ends: list[dict[str, Any]], world: World) -> dict[str, tuple[int, float]]:
    """The history of ``PhaseLimits`` from the ends of attempts on as many processes with the same kind of device."""
    history: dict[str, tuple[int, float]] = {}
    for line in ends:
        if (line.get("world"), line.get("device")) != (world.size, world.device.type):
            continue
        waits = {phase: wait for phase, wait in line.get("longest_waits", {}).items() if len(wait) == 2}
        for phase, (count, seconds) in waits.items():
            before = history.get(phase, (0, 0.0))
            history[phase] = before[0] + int(count), max(before[1], seconds)
    return history


def process_start() -> float:
    """Return the Unix time at which this process was started, before Python and its imports."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine was booted
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
