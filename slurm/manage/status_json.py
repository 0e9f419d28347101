"""``hpcssl-submit status --json``: the state of runs for programs, and the schema of what it prints."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

from hpcssl.config import read_yaml
from hpcssl.errors import ConfigError
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import RecordError, parse_record
from hpcssl.storage.tail import read_backward
from slurm.manage.status import RunStatus

VERSION = 1
"""Raised when a field is removed or changes its meaning. New fields do not raise it."""
_MAX_LINES = 2000
"""Lines of the end of a journal that are searched for the newest values."""


def _field(kind: str | list[str], description: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "description": description, **more}


_NUMBER, _TEXT = ["number", "null"], ["string", "null"]
_RUN: dict[str, Any] = {
    "run": _field("string", "The run folder, as an absolute path."),
    "job": _field(_TEXT, "Id of the training's newest job."),
    "state": _field(
        "string",
        "SLURM's state of that job; GONE if SLURM has forgotten it, UNKNOWN if SLURM does not answer, LOST if the "
        "supervisor of a local job died, NONE if there is no job.",
    ),
    "reason": _field(_TEXT, "SLURM's reason for the state, such as why the job is pending."),
    "expected_start": _field(_NUMBER, "Unix time at which SLURM expects to start the queued job."),
    "attempt": _field("integer", "Number of the newest attempt; 0 before the first."),
    "step": _field("integer", "The last known step."),
    "steps": _field(["integer", "null"], "Steps of the whole training."),
    "epoch": _field(_NUMBER, "Epochs that the newest journal line has completed."),
    "images_per_s": _field(_NUMBER, "The newest logged speed of the training."),
    "loss": _field(_NUMBER, "The newest loss; null if it is not finite."),
    "scores": _field(
        "object", "The newest scores of online evaluations, by name.", additionalProperties={"type": "number"}
    ),
    "seconds_left": _field(_NUMBER, "Rest of the training at the newest speed, in seconds; 0 if it is finished."),
    "finished": _field("boolean", "Whether the training is finished."),
    "last_end": _field(_TEXT, "Cause of the last attempt that ended, with its error in parentheses."),
    "evaluations": _field("object", "State of each evaluation, by its text.", additionalProperties={"type": "string"}),
    "effective": _field(_NUMBER, "Share of the allocated time that was spent in steps that counted, 0 to 1."),
    "hint": _field(_TEXT, "What a person should know or do."),
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "hpcssl-submit status --json",
    "type": "object",
    "required": ["version", "time", "runs"],
    "additionalProperties": False,
    "properties": {
        "version": _field("integer", "Version of this format.", const=VERSION),
        "time": _field("number", "Unix time at which the states were read."),
        "runs": {
            "type": "array",
            "description": "One object per run, in the order of the command line.",
            "items": {"type": "object", "required": [*_RUN], "additionalProperties": False, "properties": _RUN},
        },
    },
}
"""JSON Schema of the output; ``--schema`` prints it."""


def to_document(rows: Sequence[RunStatus]) -> dict[str, Any]:
    """Return the states of runs as ``SCHEMA`` describes them."""
    return {"version": VERSION, "time": round(time.time(), 1), "runs": [_to_object(row) for row in rows]}


def _to_object(row: RunStatus) -> dict[str, Any]:
    newest, is_finished = _read_newest(row.run), row.run.finished is not None
    state, _, reason = row.state.partition(" (")
    return {
        "run": str(row.run.root),
        "job": None if row.job == "-" else row.job,
        "state": state,
        "reason": reason.removesuffix(")") or None,
        "expected_start": row.expected_start,
        "attempt": row.attempt,
        "step": row.step,
        "steps": row.steps,
        "epoch": newest["epoch"],
        "images_per_s": newest["images_per_s"],
        "loss": newest["loss"],
        "scores": newest["scores"],
        "seconds_left": 0.0 if is_finished else _seconds_left(row, newest["images_per_s"]),
        "finished": is_finished,
        "last_end": row.last_end or None,
        "evaluations": row.evals,
        "effective": round(row.uptime.share, 4) if row.uptime is not None else None,
        "hint": row.hint or None,
    }


def _read_newest(run: RunDir) -> dict[str, Any]:
    """The newest values near the end of the journal; None for those that are not there."""
    newest: dict[str, Any] = {"epoch": None, "images_per_s": None, "loss": None, "scores": None}
    lines = read_backward(run.journal) if run.journal.exists() else iter(())
    for _, text in itertools.islice(lines, _MAX_LINES):
        with contextlib.suppress(RecordError):
            line = parse_record(text, {"step": int})
            if not line.get("eval"):
                for name in ("epoch", "images_per_s", "loss"):
                    newest[name] = line.get(name) if newest[name] is None else newest[name]
            elif newest["scores"] is None:
                scores = {name: value for name, value in line.items() if name not in ("step", "eval")}
                newest["scores"] = {name: value for name, value in scores.items() if _is_number(value)}
        if None not in newest.values():
            break
    numbers = {name: newest[name] if _is_number(newest[name]) else None for name in ("epoch", "images_per_s", "loss")}
    return numbers | {"scores": newest["scores"] or {}}


def _seconds_left(row: RunStatus, images_per_s: float | None) -> float | None:
    try:
        batch = int(read_yaml(row.run.config)["optim"]["batch"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return None
    if not images_per_s or row.steps is None:
        return None
    return round(max(0, row.steps - row.step) * batch / images_per_s, 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
