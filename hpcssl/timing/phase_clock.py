"""How long the main thread of rank 0 spends in each phase, and the totals in the journal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from hpcssl.storage.records import RecordError, parse_record
from hpcssl.storage.tail import read_backward

CATEGORIES = {
    "data": "data",
    "step": "step",
    "backward": "step",
    "save": "save",
    "finish": "save",
    "export": "eval",
    "evaluate": "eval",
}
"""Category of each phase (``World.set_phase``). Every other phase is ``other``."""
COLUMNS = {name: f"total_{name}_s" for name in ("step", "data", "save", "eval", "other")}
"""Keys of the journal, by category: seconds since the start of the training, without those of replayed steps."""


class PhaseClock:
    """Adds up the seconds of the main thread by category.

    Args:
        now: Returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._since, self._category = now, now(), "other"
        self._seconds = dict.fromkeys(COLUMNS, 0.0)

    def enter(self, phase: str) -> None:
        """The main thread now does ``phase``."""
        now = self._now()
        self._seconds[self._category] += now - self._since
        self._since, self._category = now, CATEGORIES.get(phase, "other")

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call, by category; categories without any are left out."""
        now = self._now()
        self._seconds[self._category] += now - self._since
        self._since = now
        seconds = {name: round(value, 4) for name, value in self._seconds.items() if value > 0}
        self._seconds = dict.fromkeys(COLUMNS, 0.0)
        return seconds


def read_totals(journal: Path) -> dict[str, float]:
    """Return the last totals of a journal by category; 0 where there are none.

    The file is read from its end: of its lines, every tenth or so has totals.
    """
    for _, line in read_backward(journal) if journal.exists() else ():
        with contextlib.suppress(RecordError):
            record = parse_record(line, {COLUMNS["step"]: float}, dict.fromkeys(COLUMNS.values(), float))
            return {name: float(record.get(column, 0.0)) for name, column in COLUMNS.items()}
    return dict.fromkeys(COLUMNS, 0.0)
