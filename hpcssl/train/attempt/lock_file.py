"""The lock file of a run folder as others read it: who holds the run, and whether that process shows signs of life."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hpcssl.storage.records import RecordError, parse_record

_TYPES = {"token": str, "job": str, "attempt": int, "pid": int, "place": str}


class LockFileObserver:
    """Watches a lock file for changes over time.

    The clocks of two hosts are never compared: only this process's clock counts how long the file stays the same.

    Args:
        path: The lock file.

    Attributes:
        changed: Whether the content has changed since the first look.
    """

    def __init__(self, path: Path):
        self.path, self.changed = path, False
        self._last: dict[str, Any] | None = None
        self._since = time.monotonic()

    def look(self) -> dict[str, Any] | None:
        """Read the file and return its holder; None if it names nobody."""
        holder = read_holder(self.path)
        if holder != self._last:
            self.changed = self._last is not None
            self._last, self._since = holder, time.monotonic()
        return holder

    @property
    def unchanged_s(self) -> float:
        """Seconds since the last look at which the content was new."""
        return time.monotonic() - self._since


def read_holder(path: Path) -> dict[str, Any] | None:
    """Read the record that the holder wrote into its lock file.

    Returns:
        The record; None if there is no file or it is empty. A record that is torn or of another format is returned
        as ``{"unreadable": text}``, which differs from every holder's.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    try:
        return parse_record(text, optional=_TYPES)
    except RecordError:
        return {"unreadable": text} if text.strip() else None


def describe_holder(holder: dict[str, Any] | None) -> str:
    """Return who holds the lock, in words."""
    if not holder or "job" not in holder:
        return "an unnamed process"
    process = f"process {holder.get('pid')}"
    job = "" if holder["job"] == process else f"job {holder['job']}, "  # outside SLURM the process is the job
    started, heartbeat = holder.get("started"), holder.get("time")
    return f"{job}{process} on {holder.get('host')}, started {started}, last heartbeat {heartbeat}"
