"""Progress of long work: a bar on a terminal, and lines in a log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LOG = logging.getLogger("hpcssl")
SHOWN = {"images_per_s": "images/s", "loss": "loss", "purity": "purity", "lr": "lr"}
"""Scalars that are shown, and their names there: the first are kept where there is no room for all."""
MIN_BAR = 8
"""Columns of the bar itself, which scalars must leave."""
MIN_PERIOD_S = 1.0
"""Seconds between two lines of a ``ProgressLog``: quick work would only fill the log."""
_TIMES = "[1:00:00<99:00:00]"  # the longest usual text of time spent and left


class ProgressBar:
    """A bar with the time left, and scalars as far as they fit in the line. The bar is never pushed out of it.

    Args:
        total: Number of steps, if it is known.
        first: Number of steps that were taken earlier: they do not count for the time left.
        width: Columns of the terminal; None to detect them at each update.
        file: The terminal.
    """

    def __init__(self, total: int | None, *, first: int = 0, width: int | None = None, file: TextIO | None = None):
        from tqdm import tqdm  # slow to import: only where there is a terminal

        self._width, self._file = width, file or sys.stderr
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=first,
            file=self._file,
            ncols=width,
            dynamic_ncols=width is None,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def update(self, step: int, scalars: Mapping[str, str], total: int | None = None) -> None:
        """Show a step.

        Args:
            step: Number of steps taken.
            scalars: Texts by name, the most important first: those at the end are left out in a narrow terminal.
            total: Number of steps, if it was not known before.
        """
        bar = self._bar
        if total is not None:
            bar.total = total
        taken = len(f"100%|| {bar.total}/{bar.total} {_TIMES}") + MIN_BAR
        bar.set_postfix_str(_fit(scalars, self._columns() - taken), refresh=False)
        bar.update(step - bar.n)
        bar.refresh()

    def write(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.write(text, file=self._file)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _columns(self) -> int:
        if self._width is not None:
            return self._width
        try:
            return os.get_terminal_size(self._file.fileno()).columns
        except (OSError, ValueError):
            return 80


def _fit(scalars: Mapping[str, str], columns: int) -> str:
    """As many scalars, from the first, as fit."""
    shown = ""
    for name, value in scalars.items():
        word = format_scalar(name, value)
        longer = f"{shown}, {word}" if shown else word
        if len(longer) + 2 > columns:  # and the comma in front of the first
            break
        shown = longer
    return shown


def select_scalars(record: Mapping[str, Any]) -> dict[str, str]:
    """The scalars of a line of the journal that are shown, by their shown names."""
    values = {shown: float(record[name]) for name, shown in SHOWN.items() if isinstance(record.get(name), float)}
    return {name: f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" for name, value in values.items()}


def format_scalar(name: str, value: str) -> str:
    """``loss 1.2``, or ``512 images/s`` where the name is a unit."""
    return f"{value} {name}" if name.endswith("/s") else f"{name} {value}"


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes lines of a log above the bar where there is one, and not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class ProgressLog:
    """Logs one line per tenth of some work, with its rate and the time left.

    Tenths that follow each other within a second are left out, except for the last one.

    Args:
        what: Name of the work.
        total: Amount of work.
        unit: What it is counted in, such as ``images``.
        first: Amount that an earlier attempt has done.
        now: The clock, in seconds.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, first: int = 0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self.total, self.unit, self.first, self.now = what, total, unit, first, now
        self._tenth = first * 10 // total if total else 10
        self._began = self._logged_at = now()
        self._done = first

    def add(self, amount: int, note: str = "") -> None:
        """Count more work as done, and log a line if that makes a new tenth."""
        self.update(self._done + amount, note)

    def update(self, done: int, note: str = "") -> None:
        """Log a line if a new tenth is done.

        Args:
            done: Amount of work that is done.
            note: Text at the end of the line.
        """
        done = self._done = min(done, self.total)
        tenth, now = done * 10 // self.total if self.total else 10, self.now()
        if tenth <= self._tenth or (done < self.total and now - self._logged_at < MIN_PERIOD_S):
            return
        self._tenth, self._logged_at = tenth, now
        rate = (done - self.first) / max(now - self._began, 1e-9)
        text = (
            f"{self.what}: {100 * done // self.total} %, {done} of {self.total} {self.unit}, {rate:.3g} {self.unit}/s"
        )
        if done < self.total:
            text += f", {format_seconds((self.total - done) / rate)} left"
        LOG.info("%s", f"{text}, {note}" if note else text)


def format_seconds(seconds: float) -> str:
    """A duration as minutes and seconds, ``2:05``, or with hours, ``1:02:05``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
