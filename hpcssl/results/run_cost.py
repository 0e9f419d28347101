"""What a run has cost: hours of its ranks, and the share of them that counted."""

from __future__ import annotations

import contextlib
from datetime import datetime

from hpcssl import files
from hpcssl.run_dir import RunDir
from hpcssl.timing.uptime import last_written, measure_uptime

_ATTEMPT_FIELDS = {"event": str, "attempt": int, "time": float | str}


def effective_share(run: RunDir) -> float | str:
    """Return the share of the allocated time that was spent in steps that counted; empty if that was not recorded."""
    uptime = measure_uptime(run, last_written(run))
    return round(uptime.share, 4) if uptime is not None and uptime.step else ""


def rank_hours(run: RunDir) -> tuple[int | str, float | str]:
    """Return the ranks of the last attempt, and hours times ranks over all attempts that recorded their end."""
    world: int | str = ""
    hours, unfinished = 0.0, {}
    for line in files.read_lines(run.attempts, _ATTEMPT_FIELDS, {"world": int}):
        if line.get("event") == "start":
            unfinished[line["attempt"]] = line
            world = line.get("world", world)
        elif line.get("event") == "end" and line["attempt"] in unfinished:
            start = unfinished.pop(line["attempt"])
            with contextlib.suppress(ValueError):  # a text that is not a time
                hours += (_seconds(line["time"]) - _seconds(start["time"])) / 3600 * start.get("world", 1)
    # an attempt that was killed recorded no end: the sum is a lower bound
    return world, f"≥ {hours:.3g}" if unfinished else float(f"{hours:.3g}")


def _seconds(time: float | str) -> float:
    return datetime.fromisoformat(time).timestamp() if isinstance(time, str) else float(time)
