"""The attempts of a training or an evaluation: how lines about their starts and ends become one record each.

An attempt is one start of a job's tasks. The trainer records its attempts in ``attempts.jsonl``, an evaluation in
``jobs.jsonl``: a line with ``event: start``, and one with ``event: end`` and a ``cause``:

| cause | what ended the attempt |
|---|---|
| ``done`` | it finished |
| ``timeout``, ``preempted``, ``node_fail`` | its time limit, a job of higher priority, the loss of a node |
| ``cancelled`` | its user |
| ``stopped`` | a signal whose reason is unknown |
| ``error``, ``killed``, ``hang`` | a crash: its own error, a death without an error, no progress (the watchdog) |
| ``lost`` | unknown: a later attempt found no end, and the nodes were up |
| ``interrupted`` | Ctrl-C |

A crash is seen by many ranks, and each of them may record an end. The first one counts, unless a later one explains
more: an error in a collective is a ``consequence`` of what another rank did, and any other crash replaces it.
``node_fail`` replaces all crashes. Any later end replaces that of a stop: SLURM shows the reason of a signal late, and
an attempt can crash while it stops. Nothing replaces ``done`` and ``cancelled``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

CRASH_CAUSES = ("error", "killed", "hang")
CAUSE_PRECEDENCE = dict.fromkeys(CRASH_CAUSES, 1) | {"node_fail": 2}
"""A cause replaces those with a lower number. An error that is a consequence has the number 0."""


FINAL_CAUSES = ("done", "cancelled")
"""Causes that no later end replaces."""


@dataclass
class AttemptLines:
    """The lines that count for one attempt.

    Attributes:
        start: The line of its start.
        ends: The lines of its end, oldest first; each explains more than those before it.
        cause: Why it ended; None while it is open.
        is_consequence: Whether the error came from a collective, which fails on every rank when one of them is gone.
    """

    start: dict[str, Any]
    ends: list[dict[str, Any]] = field(default_factory=list)
    cause: str | None = None
    is_consequence: bool = False


def group_by_attempt(lines: Iterable[dict[str, Any]]) -> list[AttemptLines]:
    """Group the lines of starts and ends by attempt, oldest first, and leave out ends that explain nothing more.

    An attempt without an end that was followed by another one has the cause ``lost``. Once a later attempt has begun,
    the end of an earlier one no longer changes, because leftover processes may still write. An attempt that never
    began has only an end, and does not close the earlier ones: it may have been refused because one of them still
    runs.

    Args:
        lines: Records with ``attempt`` and ``event``, of which ``start`` and ``end`` count.
    """
    by_number: dict[int, AttemptLines] = {}
    latest_begun = 0
    for line in lines:
        number = line["attempt"]
        if line["event"] == "start":
            latest_begun = max(latest_begun, 0 if line.get("never_began") else number)
            by_number[number] = AttemptLines(line)
        elif line["event"] == "end" and number in by_number and number >= latest_begun:
            _add_end(by_number[number], line)
    attempts = [by_number[number] for number in sorted(by_number)]
    for attempt in attempts[:-1]:
        attempt.cause = attempt.cause or "lost"
    return attempts


def _add_end(attempt: AttemptLines, line: dict[str, Any]) -> None:
    # a local time limit ends with an INT, which Python turns into KeyboardInterrupt
    interrupted = line.get("cause") == "error" and str(line.get("why")).startswith("KeyboardInterrupt")
    cause, is_consequence = "interrupted" if interrupted else line.get("cause"), bool(line.get("consequence"))
    old = 0 if attempt.is_consequence else CAUSE_PRECEDENCE.get(str(attempt.cause))
    new = 0 if is_consequence else CAUSE_PRECEDENCE.get(str(cause))
    if attempt.cause in FINAL_CAUSES or (old is not None and (new is None or new <= old)):
        return
    attempt.ends.append(line)
    attempt.cause, attempt.is_consequence = cause, is_consequence
