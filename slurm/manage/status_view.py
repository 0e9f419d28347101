"""What ``hpcssl-submit status`` prints: a table on a terminal, lines elsewhere, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from hpcssl.run_dir import RunDir
from slurm.manage import status, status_json
from slurm.manage.status import RunStatus

_CLEAR = "\x1b[H\x1b[2J\x1b[3J"
"""Moves to the first line of a terminal and clears it."""


def write_schema() -> None:
    """Write the JSON Schema of the JSON output."""
    sys.stdout.write(json.dumps(status_json.SCHEMA, indent=2) + "\n")


def write_status(runs: Sequence[RunDir], *, as_json: bool = False, time: bool = False, watch: bool = False) -> None:
    """Query runs, and write their states to standard output.

    Args:
        runs: The run folders.
        as_json: Write JSON.
        time: Write where the allocated time went instead.
        watch: More will follow: clear a terminal first, and write JSON in one line.
    """
    rows = status.query_runs(runs)
    is_terminal = sys.stdout.isatty()
    if watch and is_terminal and not as_json:
        sys.stdout.write(_CLEAR)
    if as_json:
        sys.stdout.write(json.dumps(status_json.to_document(rows), indent=None if watch else 2) + "\n")
    elif time:
        for row in rows:
            sys.stdout.write(f"{row.run.root}\t{row.uptime.describe() if row.uptime else 'no attempt yet'}\n")
    elif is_terminal:
        _write_table(rows)
    else:
        sys.stdout.writelines(f"{row.line()}\n" for row in rows)
    sys.stdout.flush()


def _write_table(rows: Sequence[RunStatus]) -> None:
    from hpcssl.terminal.tables import print_table

    print_table(
        ["run", "job", "state", "attempt", "step", "effective", "last end", "evaluations", "hint"],
        [
            [
                str(row.run.root),
                row.job,
                row.state,
                str(row.attempt),
                f"{row.step}/{row.steps or '?'}",
                f"{row.uptime.share:.1%}" if row.uptime else "",
                row.last_end,
                "\n".join(f"{name} {state}" for name, state in row.evals.items()),
                row.hint,
            ]
            for row in rows
        ],
        wrapped={"state": 12, "last end": 20, "hint": 24},
    )
