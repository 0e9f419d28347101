"""Sends steps to a tracker, each exactly once, however often the sender is interrupted.

The cursor is a file in the run folder: the last step that the tracker has confirmed, and, while steps are being sent,
the last one of them. It is replaced atomically before and after each batch. A sender that finds a batch without its
confirmation was interrupted, and asks the tracker to ``recover``: to say up to which step it has the batch, or to make
that it has nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from hpcssl import files
from hpcssl.errors import ConfigError
from hpcssl.run_dir import RunDir
from hpcssl.tracking.pending import StepValues, read_pending

MAX_STEPS = 500
"""Steps of one batch: what is sent again at most, to a tracker that ignores what it has."""


class Tracker(Protocol):
    """An experiment tracker with one run in it.

    Attributes:
        destination: Where the run is kept, in words that another process can compare.
    """

    destination: str

    def recover(self, first: int, last: int) -> int:
        """Say what an interrupted batch has left.

        Args:
            first: The first step that the batch may have.
            last: Its last step.

        Returns:
            The last step that must not be sent again; ``first - 1`` if the batch is to be sent as a whole.
        """
        ...

    def send(self, steps: Sequence[StepValues]) -> None:
        """Send a batch, and return when the tracker has stored all of it."""
        ...


def send_pending(run: RunDir, name: str, tracker: Tracker) -> int:
    """Send all steps that may be sent and were not.

    Args:
        run: The run folder.
        name: Name of the tracker; each has a cursor of its own.
        tracker: The tracker.

    Returns:
        The number of steps that were sent.

    Raises:
        ConfigError: Earlier steps were sent to another destination, or another process sends this run.
    """
    path, sent = run.tracking(name), 0
    with _only_sender(path):
        last, until = _read_cursor(path, tracker.destination)
        if until is not None:
            last = min(max(last, tracker.recover(last + 1, until)), until)
            _write_cursor(path, tracker.destination, last)
        while pending := read_pending(run, last):  # more may become durable in the meantime
            for first in range(0, len(pending), MAX_STEPS):
                batch = pending[first : first + MAX_STEPS]
                _write_cursor(path, tracker.destination, last, batch[-1].step)
                tracker.send(batch)
                last, sent = batch[-1].step, sent + len(batch)
                _write_cursor(path, tracker.destination, last)
    return sent


def send_until_finished(
    run: RunDir,
    name: str,
    tracker: Tracker,
    write: Callable[[int], None],
    *,
    every: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Send steps as they become durable, until the run is finished.

    Args:
        run: The run folder.
        name: See ``send_pending``.
        tracker: The tracker.
        write: Called with the number of steps of each transmission.
        every: Seconds between two looks at the run.
        sleep: Waits that long.
    """
    while True:
        is_finished = run.finished is not None  # before the steps are read: the last ones are then among them
        if count := send_pending(run, name, tracker):
            write(count)
        if is_finished:
            return
        sleep(every)


def _read_cursor(path: Path, destination: str) -> tuple[int, int | None]:
    """The last step that was confirmed, and the last one of an interrupted batch."""
    record = files.read_record(path, {"step": int, "sending": int | None, "destination": str})
    if record is None:
        if path.exists():
            raise ConfigError(
                f"cursor {path}",
                got="a damaged file",
                expected="the last step that was sent",
                fix="delete the run in the tracker and this file, then send everything again",
            )
        return -1, None
    if record["destination"] != destination:
        raise ConfigError(
            f"cursor {path}",
            got=f"steps that were sent to {record['destination']}",
            expected=destination,
            fix="send to the same place, or delete the file to send everything again",
        )
    return record["step"], record["sending"]


def _write_cursor(path: Path, destination: str, step: int, sending: int | None = None) -> None:
    files.write_record(path, {"step": step, "sending": sending, "destination": destination})


@contextlib.contextmanager
def _only_sender(path: Path) -> Iterator[None]:
    """Refuse a second sender of the same run to the same tracker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if files.lock_descriptor(descriptor) is False:
            raise ConfigError(
                f"cursor {path}",
                got="another process that sends this run",
                expected="one sender at a time",
                fix="wait for it, or end it",
            )
        yield
    finally:
        os.close(descriptor)
