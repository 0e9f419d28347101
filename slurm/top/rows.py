"""What the screen shows of each run, as text, from the values of ``status --json``."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl.run_dir import RunDir, find_runs
from slurm.manage import status, status_json

COLUMNS = {
    "run": 28,
    "state": 10,
    "step": 13,
    "left": 7,
    "epoch": 6,
    "img/s": 7,
    "loss": 7,
    "k-NN": 6,
    "reason": 20,
    "start": 12,
    "last end": 60,
}
"""Columns by importance, with their greatest width in characters. Those that do not fit are left out, the last ones
first; the panel below the table has all values of the selected run."""
PADDING = 2
"""Characters that the table adds to the width of each column."""
MISSING = "-"


@dataclass(frozen=True)
class Row:
    """One run on the screen.

    Attributes:
        run: The run folder.
        cells: Texts by column.
        state: SLURM's state, for the color.
        details: Lines about the run for the panel, as pairs of name and text.
    """

    run: RunDir
    cells: dict[str, str]
    state: str
    details: list[tuple[str, str]]


def list_runs(roots: Sequence[Path]) -> list[RunDir]:
    """Return the runs that folders are or contain, each once."""
    runs: dict[Path, RunDir] = {}
    for root in roots:
        own = RunDir(root)
        for run in [own] if own.config.exists() else find_runs(root):
            runs.setdefault(run.root, run)
    return list(runs.values())


def read_rows(roots: Sequence[Path]) -> list[Row]:
    """Read the states of all runs below folders, by one call of squeue (per cluster).

    Raises:
        HpcsslError: A record is damaged, or SLURM did not answer.
        OSError: A file cannot be read.
    """
    document = status_json.to_document(status.query_runs(list_runs(roots)))
    bases = [root.absolute() for root in roots]
    return [to_row(values, _shorten_path(Path(values["run"]), bases)) for values in document["runs"]]


def to_row(values: dict[str, Any], name: str) -> Row:
    """Build a row from one object of ``status_json.SCHEMA``."""
    step, steps, scores = values["step"], values["steps"], values["scores"]
    knn = next((score for key, score in scores.items() if key.startswith("knn")), None)
    start = values["expected_start"]
    cells = {
        "run": name,
        "state": "FINISHED" if values["finished"] else values["state"],
        "step": f"{step}/{steps}" if steps is not None else str(step),
        "left": format_span(values["seconds_left"]) if not values["finished"] else MISSING,
        "epoch": _format(values["epoch"], 1),
        "img/s": _format(values["images_per_s"], 0),
        "loss": _format(values["loss"], 4),
        "k-NN": _format(knn, 2),
        "reason": values["reason"] or MISSING,
        "start": format_time(start) if start is not None else MISSING,
        "last end": values["last_end"] or MISSING,
    }
    details = [
        ("run", values["run"]),
        ("job", f"{values['job'] or 'none'}, {values['state']}, attempt {values['attempt']}"),
        ("reason", values["reason"] or ""),
        ("expected start", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start)) if start is not None else ""),
        ("last end", values["last_end"] or ""),
        ("hint", values["hint"] or ""),
        ("scores", ", ".join(f"{key} {score:g}" for key, score in scores.items())),
        ("evaluations", ", ".join(f"{key} {state}" for key, state in values["evaluations"].items())),
        ("effective", f"{values['effective']:.1%} of the allocated time" if values["effective"] is not None else ""),
    ]
    return Row(RunDir(values["run"]), cells, cells["state"], [(key, text) for key, text in details if text])


def choose_columns(rows: Sequence[Row], width: int) -> dict[str, int]:
    """Return the columns that fit into a width, with their own widths.

    Columns in which no run has a value are left out, except for the first three.
    """
    chosen: dict[str, int] = {}
    left = width
    for place, (name, limit) in enumerate(COLUMNS.items()):
        texts = [row.cells[name] for row in rows]
        if place > 2 and all(text == MISSING for text in texts):
            continue
        needed = min(limit, max([len(name), *map(len, texts)]))
        if needed + PADDING > left:
            if name == "last end" and left - PADDING >= len(name):
                chosen[name] = left - PADDING
            break
        chosen[name] = needed
        left -= needed + PADDING
    if "run" in chosen and left > 0:  # what is left shows more of long names
        longest = max((len(row.cells["run"]) for row in rows), default=0)
        chosen["run"] = min(longest, chosen["run"] + left) if longest > chosen["run"] else chosen["run"]
    return chosen


def shorten(text: str, width: int, *, keep_end: bool = False) -> str:
    """Cut a text to a width, marked by an ellipsis: at its end, or at its start for paths, which differ at the end."""
    if len(text) <= width:
        return text
    return "…" + text[-(width - 1) :] if keep_end else text[: width - 1] + "…"


def summarize(rows: Sequence[Row]) -> str:
    """Return the number of runs by state, such as ``30 runs: 4 running, 26 pending``."""
    counts = Counter(row.state.lower() for row in rows)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return f"{len(rows)} run{'s' * (len(rows) != 1)}" + (f": {states}" if states else "")


def format_span(seconds: float | None) -> str:
    """Return a time span in its two largest units: ``2d 03h``, ``1h 05m``, ``45s``."""
    if seconds is None:
        return MISSING
    whole = math.ceil(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


def format_time(when: float) -> str:
    """Return a local time without what is the same today: ``14:05``, or ``03 Jan 14:05``."""
    is_today = time.localtime(when)[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if is_today else "%d %b %H:%M", time.localtime(when))


def _format(value: float | None, digits: int) -> str:
    if value is None:
        return MISSING
    return f"{value:.3g}" if abs(value) >= 10**6 else f"{value:.{digits}f}"


def _shorten_path(path: Path, bases: Sequence[Path]) -> str:
    """The path from the folder of the command line that it lies in; its name if it is that folder itself."""
    base = next((base for base in bases if path.is_relative_to(base) and path != base), None)
    return str(path.relative_to(base)) if base is not None else path.name
