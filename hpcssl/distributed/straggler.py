"""Finds the rank that the others wait for, from each rank's own seconds per step.

Ranks that wait for each other all take the same time per step. What differs is the time that is a rank's own: its wait
for data, and the time from there to the last backward pass, minus the time spent in collectives on the way. (The last
backward pass does not count: it overlaps with the reduction of the gradients, in which all ranks wait for the slowest.)

On a GPU the host runs ahead of the device, so CUDA events are used in place of its clock. They are recorded in one step
of ``SAMPLE_EVERY`` and read once they have completed; nothing waits for them.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

MIN_EXCESS, MIN_EXCESS_S = 0.20, 0.002
"""A rank is a straggler if it is slower than the others' median by this fraction, and by this many seconds per step."""
SAMPLE_EVERY = 10
"""On a GPU, the own time is measured in one step of this many."""
QUIET_FLUSHES = 10
"""A rank that stays the straggler is named again after this many flushes of the journal."""


class StepClock:
    """Own seconds per step of one rank.

    Args:
        event: On a GPU, makes a timing event that is recorded on the current stream; None on a CPU.
    """

    def __init__(self, event: Callable[[], Any] | None = None):
        self.event = event
        self._began = 0.0  # start of the wait for data
        self._first: Any = None  # start of the measured part of a step
        self._collectives: list[tuple[Any, Any]] | None = None  # (begin, end) of each; None outside a measured part
        self._steps = 0
        self._data: list[float] = []
        self._own: list[float] = []
        self._incomplete: deque[tuple[Any, Any, list[tuple[Any, Any]]]] = deque()

    def wait_for_data(self) -> None:
        """The rank begins to wait for its next batch."""
        self._began, self._collectives = time.perf_counter(), None

    def begin_step(self) -> None:
        """The batch has arrived, and the step begins."""
        if not self._began:
            return
        now = time.perf_counter()
        self._data.append(now - self._began)
        self._began = 0.0
        self._steps += 1
        if self.event is None or self._steps % SAMPLE_EVERY == 0:
            self._first, self._collectives = self._now(), []

    def enter_collective(self) -> None:
        """A collective begins."""
        if self._collectives is not None:
            self._collectives.append((self._now(), None))

    def leave_collective(self) -> None:
        """The collective ends."""
        if self._collectives:
            self._collectives[-1] = self._collectives[-1][0], self._now()

    def begin_last_backward(self) -> None:
        """The last backward pass begins, in which the gradients are reduced over ranks."""
        if self._collectives is not None:
            self._incomplete.append((self._first, self._now(), self._collectives))
            self._collectives = None

    def take(self) -> tuple[float, float]:
        """Mean seconds per step since the last call.

        Returns:
            The rank's own seconds, with the wait for data; and the wait for data alone. 0 where nothing was measured.
        """
        while self._incomplete and (self.event is None or self._incomplete[0][1].query()):
            first, last, collectives = self._incomplete.popleft()
            self._own.append(_between(first, last) - sum(_between(*pair) for pair in collectives))
        data = statistics.fmean(self._data) if self._data else 0.0
        own = statistics.fmean(self._own) if self._own else 0.0
        self._data, self._own = [], []
        return own + data, data

    def _now(self) -> Any:
        return time.perf_counter() if self.event is None else self.event()


class StragglerDetector:
    """Decides whether one rank slows down the others, from flush to flush of the journal.

    Args:
        hosts: Node name of each rank, for the message.
    """

    def __init__(self, hosts: Sequence[str]):
        self.hosts = hosts
        self._last: int | None = None
        self._quiet: dict[int, int] = {}

    def update(self, own: Sequence[float], data: Sequence[float]) -> tuple[dict[str, float], str]:
        """Take the times of all ranks since the last flush.

        Args:
            own: Each rank's own seconds per step, with its wait for data.
            data: Each rank's wait for data, seconds per step.

        Returns:
            Scalars for the journal; and a sentence if one rank has slowed down the others for the second flush in a
            row, else an empty string.
        """
        slowest = max(range(len(own)), key=lambda rank: own[rank])
        others = statistics.median([s for rank, s in enumerate(own) if rank != slowest])
        scalars = {
            "own_s": statistics.median(own),
            "data_s": statistics.fmean(data),
            "slowest_rank": slowest,
            "slowest_s": own[slowest],
        }
        is_slow = own[slowest] > (1 + MIN_EXCESS) * others and own[slowest] - others > MIN_EXCESS_S
        repeated, self._last = is_slow and slowest == self._last, slowest if is_slow else None
        self._quiet = {rank: left - 1 for rank, left in self._quiet.items() if left > 1}
        if not repeated or slowest in self._quiet:
            return scalars, ""
        self._quiet[slowest] = QUIET_FLUSHES
        excess = f"{own[slowest] / others - 1:.0%}" if others > 0 else "all of it"
        return scalars, (
            f"rank {slowest} on {self.hosts[slowest]} is the slowest: {own[slowest]:.3g} s of its own per "
            f"step, {data[slowest]:.3g} s of it waiting for data; the others' median is {others:.3g} s "
            f"(+{excess})"
        )


def _between(first: Any, last: Any) -> float:
    """Seconds from one time, or CUDA event, to another."""
    return float(last - first) if isinstance(first, float) else first.elapsed_time(last) / 1e3
