"""Which rank the others wait for: each rank's own seconds per step, and what the journal says of the slowest.

Ranks that wait for each other all take the same time per step. What tells them apart is the time that is their own:
the wait for data, and from there to the last backward pass, less what they spend in collectives on the way. (That
pass itself overlaps with the reduction of the gradients, in which all of them wait for the slowest.) On a GPU the host
runs ahead, so that events on the stream take the place of its clock; they are read once they have passed, never waited
for, and set in one step of ``SAMPLED``.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

EXCESS, LEAST_S = 0.20, 0.002
"""Worth a line in the log: so far above the median of the others, and by so many seconds per step."""
SAMPLED = 10
QUIET = 10
"""A straggler that stays one is named again after so many flushes."""


class StepClock:
    """Seconds of one rank. ``event``: on a GPU, makes a timing event that is recorded on the current stream."""

    def __init__(self, event: Callable[[], Any] | None = None):
        self.event = event
        self._began = 0.0  # the wait for data, then the step
        self._pairs: list[tuple[Any, Any]] | None = None  # around collectives; None outside of a measured part
        self._first: Any = None
        self._steps = 0
        self._data: list[float] = []
        self._own: list[float] = []
        self._passing: deque[tuple[Any, Any, list[tuple[Any, Any]]]] = deque()

    def wait_for_data(self) -> None:
        self._began, self._pairs = time.perf_counter(), None

    def begin_step(self) -> None:
        """The batch is there."""
        if not self._began:
            return
        now = time.perf_counter()
        self._data.append(now - self._began)
        self._began = 0.0
        self._steps += 1
        if self.event is None or self._steps % SAMPLED == 0:
            self._first, self._pairs = self._now(), []

    def enter(self) -> None:
        """A collective begins."""
        if self._pairs is not None:
            self._pairs.append((self._now(), None))

    def leave(self) -> None:
        if self._pairs:
            self._pairs[-1] = self._pairs[-1][0], self._now()

    def meet(self) -> None:
        """The last backward pass begins, in which the rank meets the others."""
        if self._pairs is not None:
            self._passing.append((self._first, self._now(), self._pairs))
            self._pairs = None

    def take(self) -> tuple[float, float]:
        """Mean seconds per step since the last call: the rank's own, waiting for data included, and that wait."""
        while self._passing and (self.event is None or self._passing[0][1].query()):
            first, last, pairs = self._passing.popleft()
            self._own.append(_between(first, last) - sum(_between(*pair) for pair in pairs))
        data = statistics.fmean(self._data) if self._data else 0.0
        own = statistics.fmean(self._own) if self._own else 0.0
        self._data, self._own = [], []
        return own + data, data

    def _now(self) -> Any:
        return time.perf_counter() if self.event is None else self.event()


class Stragglers:
    """Which ranks were slowest, flush after flush, and whether to say so. ``hosts``: of the ranks."""

    def __init__(self, hosts: Sequence[str]):
        self.hosts = hosts
        self._last, self._quiet = None, {}

    def look(self, own: Sequence[float], data: Sequence[float]) -> tuple[dict[str, float], str]:
        """Scalars for the journal from all ranks' seconds per step, and a sentence where one rank holds up the others
        for the second flush in a row."""
        slowest = max(range(len(own)), key=lambda rank: own[rank])
        others = statistics.median([s for rank, s in enumerate(own) if rank != slowest])
        scalars = {"own_s": statistics.median(own), "data_s": statistics.fmean(data), "slowest_rank": slowest,
                   "slowest_s": own[slowest]}
        held = own[slowest] > (1 + EXCESS) * others and own[slowest] - others > LEAST_S
        again, self._last = held and slowest == self._last, slowest if held else None
        self._quiet = {rank: left - 1 for rank, left in self._quiet.items() if left > 1}
        if not again or slowest in self._quiet:
            return scalars, ""
        self._quiet[slowest] = QUIET
        excess = f"{own[slowest] / others - 1:.0%}" if others > 0 else "all of it"
        return scalars, (f"rank {slowest} on {self.hosts[slowest]} is the slowest: {own[slowest]:.3g} s of its own per "
                         f"step, {data[slowest]:.3g} s of it waiting for data; the others' median is {others:.3g} s "
                         f"(+{excess})")


def _between(first: Any, last: Any) -> float:
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3
