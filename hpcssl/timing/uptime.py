"""Effective training time: the share of the allocated time that was spent in steps that counted, and the rest.

An allocation lasts from the start of its first attempt to the end of its last one. The journal has the seconds of the
steps that counted: when a run resumes, the totals go on at the step of its checkpoint. What is neither in the journal
nor in the records of the attempts was lost: replayed steps, the time to notice a fault, and the time between two
attempts in one allocation. An attempt whose end is not known, as after the loss of its node, lasts as long as its steps
that counted. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from hpcssl import files
from hpcssl.run_dir import RunDir
from hpcssl.timing.phase_clock import COLUMNS, read_totals


@dataclass(frozen=True)
class Uptime:
    """Where the time of a training went, in seconds of wall-clock time.

    Attributes:
        step: In steps that counted.
        data: Waiting for the data of steps that counted.
        save: In saves, as far as they held up the training.
        eval: In exports and evaluations during the training.
        start: From the start of an attempt's processes to its first wait for data.
        other: In other phases of the training, such as k-means or the wait for the run's lock.
        lost: In replayed steps, between a fault and its detection, and between attempts of one allocation.
        queue: Outside of allocations: from the submission to the first one, and between two. Not allocated.
    """

    step: float = 0.0
    data: float = 0.0
    save: float = 0.0
    eval: float = 0.0
    start: float = 0.0
    other: float = 0.0
    lost: float = 0.0
    queue: float = 0.0

    @property
    def allocated(self) -> float:
        """Seconds of all allocations."""
        return float(sum(getattr(self, part.name) for part in fields(self))) - self.queue

    @property
    def share(self) -> float:
        """Effective training time: ``step`` as a share of ``allocated``; 0 before the first attempt."""
        return self.step / self.allocated if self.allocated > 0 else 0.0

    def describe(self) -> str:
        """Return the share and where the rest went in one line, the largest part first."""
        parts = {part.name: getattr(self, part.name) for part in fields(self) if part.name not in ("step", "queue")}
        largest = sorted(parts.items(), key=lambda item: -item[1])
        rest = ", ".join(f"{name} {seconds / self.allocated:.1%}" for name, seconds in largest if seconds > 0)
        queued = f"; {self.queue:.0f} s in the queue" if self.queue else ""
        return f"{self.share:.1%} of {self.allocated:.0f} s in steps that counted ({rest or 'no rest'}){queued}"


@dataclass
class _Attempt:
    """One attempt; the times are Unix times.

    Attributes:
        number: Its number.
        allocation: What tells its allocation from others.
        began: Start of its processes.
        trained: Start of its training.
        ended: Its end; infinite if it is not known.
        unlogged: Seconds by category that are not in the journal.
    """

    number: int
    allocation: tuple[Any, ...]
    began: float
    trained: float
    ended: float = math.inf
    unlogged: dict[str, float] = field(default_factory=dict)


def measure_uptime(run: RunDir, now: float) -> Uptime | None:
    """Measure where the time of a training went so far.

    Args:
        run: The run folder.
        now: Unix time at which the last attempt ends if it has recorded no end.

    Returns:
        The times; None if no attempt has recorded a start.
    """
    attempts, jobs = _read_attempts(run), files.read_lines(run.jobs, {"event": str})
    if not attempts:
        return None
    _find_unknown_ends(attempts, jobs, now)
    seconds = read_totals(run.journal)
    for attempt in attempts:
        for name in COLUMNS:
            seconds[name] += _number(attempt.unlogged.get(name))
    submitted = next((to_unix_time(line.get("time")) for line in jobs if line["event"] == "submit"), attempts[0].began)
    gaps = sum(
        max(0.0, later.began - earlier.ended)
        for earlier, later in itertools.pairwise(attempts)
        if later.allocation != earlier.allocation
    )
    allocated = attempts[-1].ended - attempts[0].began - gaps
    start = sum(attempt.trained - attempt.began for attempt in attempts)
    lost = max(0.0, allocated - start - sum(seconds.values()))
    return Uptime(**seconds, start=start, lost=lost, queue=max(0.0, attempts[0].began - submitted) + gaps)


def _read_attempts(run: RunDir) -> list[_Attempt]:
    """The attempts that have recorded a start, oldest first."""
    by_number: dict[int, _Attempt] = {}
    for line in files.read_lines(run.attempts, {"event": str, "attempt": int}, {"unlogged_s": dict}):
        number, time = line["attempt"], to_unix_time(line.get("time"))
        if line["event"] == "start" and not line.get("never_began"):
            allocation = (line.get("job"), line.get("token"), line.get("restart"))
            began = min(_number(line.get("began")) or time, time)
            by_number[number] = _Attempt(number, allocation, began, time)
        elif line["event"] == "end" and number in by_number:
            attempt = by_number[number]
            attempt.ended = min(attempt.ended, max(time, attempt.trained))
            attempt.unlogged = attempt.unlogged or line.get("unlogged_s", {})
    return [by_number[number] for number in sorted(by_number)]


def _find_unknown_ends(attempts: list[_Attempt], jobs: list[dict[str, Any]], now: float) -> None:
    """Set the ends that were not recorded, or only by the next attempt.

    Within one allocation an attempt ends where the next one begins. Otherwise it ends when its batch script saw its
    tasks end, or with its start if not even the script survived.
    """
    for earlier, later in itertools.pairwise(attempts):
        if earlier.ended < later.began:
            continue
        seen = [
            to_unix_time(line.get("time"))
            for line in jobs
            if line["event"] == "step" and (line.get("what"), line.get("attempt")) == ("train", earlier.number)
        ]
        is_same = earlier.allocation == later.allocation
        earlier.ended = later.began if is_same else max([earlier.trained, *seen[-1:]])
    if attempts[-1].ended == math.inf:
        attempts[-1].ended = max(now, attempts[-1].trained)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def to_unix_time(time: object) -> float:
    """Return the Unix time of a record's time: a number, or a local time with its offset; 0 for anything else."""
    if isinstance(time, str):
        try:
            return datetime.fromisoformat(time).timestamp()
        except ValueError:
            return 0.0
    return _number(time)


def last_written(run: RunDir) -> float:
    """Return the Unix time of the last line of the journal: the last sign of a training that recorded no end."""
    return run.journal.stat().st_mtime if run.journal.exists() else 0.0


def total(uptimes: Iterable[Uptime]) -> Uptime:
    """Return the sums over several trainings."""
    values = list(uptimes)
    return Uptime(**{part.name: sum(getattr(value, part.name) for value in values) for part in fields(Uptime)})
