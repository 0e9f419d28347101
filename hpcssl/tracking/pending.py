"""Which steps of a journal may be sent: those that a durable checkpoint covers, so that no curve is ever rewound.

When a run resumes, its journal is cut after the step of the checkpoint, and later steps are written again. A step is
sent once its evaluations are in the journal as well: they stand between its line and that of the next step.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from hpcssl import files
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import RecordError, parse_record
from hpcssl.storage.tail import read_backward


@dataclass(frozen=True)
class StepValues:
    """What is sent about one step.

    Attributes:
        step: Number of completed steps.
        values: Numbers by name; those of evaluations are named ``eval/NAME``. They may be NaN or infinite.
    """

    step: int
    values: dict[str, float]


def find_durable_step(run: RunDir) -> int | None:
    """Return the step that no resume of the run goes behind; None before the first checkpoint.

    That is the last step of a finished run, or that of the newest checkpoint with its manifest and all of its parts.
    """
    if (finished := run.finished) is not None:
        return int(finished["step"])
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        manifest = files.read_record(folder / "manifest.json", {"step": int, "parts": list[dict[str, Any]]})
        if manifest is not None and all(_has_size(run, folder.name, part) for part in manifest["parts"]):
            return int(manifest["step"])
    return None


def _has_size(run: RunDir, folder: str, part: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError, KeyError, TypeError):
        return bool((run.checkpoints / folder / part["file"]).stat().st_size == part["bytes"])
    return False


def read_pending(run: RunDir, after: int) -> list[StepValues]:
    """Read the steps that may be sent and were not, in their order.

    Args:
        run: The run folder.
        after: The last step that was sent; -1 for none.
    """
    durable = find_durable_step(run)
    if durable is None or durable <= after or not run.journal.exists():
        return []
    is_finished, newest = run.finished is not None, -1
    lines: list[dict[str, Any]] = []
    for _, text in read_backward(run.journal):  # a journal may have millions of lines, of which few are new
        with contextlib.suppress(RecordError):
            line = parse_record(text, {"step": int})
            newest = max(newest, line["step"])
            if line["step"] <= after:
                break
            if line["step"] <= durable:
                lines.append(line)
    values: dict[int, dict[str, float]] = {}
    for line in reversed(lines):
        prefix = "eval/" if line.get("eval") else ""
        names = [name for name in line if name not in ("step", "eval")]
        numbers = {f"{prefix}{name}": number for name in names if (number := _to_number(line[name])) is not None}
        values.setdefault(line["step"], {}).update(numbers)
    # an evaluation of the newest step may still be running
    return [StepValues(step, values[step]) for step in sorted(values) if is_finished or step < newest]


def _to_number(value: object) -> float | None:
    """A number, or a text such as ``nan``, which the journal has for numbers that JSON does not know."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else None
    return None
