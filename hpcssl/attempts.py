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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcssl.storage.records import Fields

FIELDS: Fields = {
    "began": float,
    "cause": str,
    "consequence": bool,
    "device": str,
    "first_step": int | None,
    "host": str,
    "job": str,
    "last_step": int | None,
    "launch": int,
    "longest_waits": dict[str, list[float]],
    "never_began": bool,
    "restart": int,
    "signals": list[str],
    "time": float | str,
    "token": str,
    "unlogged_s": dict,
    "why": str | None,
    "world": int,
}
"""Types of the fields of a line, besides ``event`` (str) and ``attempt`` (int), which each line has."""
IDENTITY = ("job", "token", "restart", "launch")
"""Fields that tell an attempt from others. Its number does not: two processes may have chosen the same one."""

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
        position: Position of the line that ended it among all lines; -1 while it is open.
    """

    start: dict[str, Any]
    ends: list[dict[str, Any]] = field(default_factory=list)
    cause: str | None = None
    is_consequence: bool = False
    position: int = -1


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
    begun_at: dict[int, int] = {}
    latest_begun = 0
    for position, line in enumerate(lines):
        number = line["attempt"]
        known = by_number.get(number)
        is_own = known is not None and is_same_attempt(known.start, line)
        if line["event"] == "start":
            if not line.get("never_began"):
                latest_begun, begun_at[number] = max(latest_begun, number), position
            if known is not None and is_own and known.start.get("never_began"):
                known.start = line  # another rank has failed before rank 0 wrote this line
            else:
                by_number[number] = AttemptLines(line)
        elif line["event"] == "end" and known is not None and is_own and number >= latest_begun:
            _add_end(known, line, position)
    attempts = [by_number[number] for number in sorted(by_number)]
    for number, attempt in by_number.items():
        if number < latest_begun and attempt.cause is None:
            attempt.cause = "lost"
            attempt.position = min(at for later, at in begun_at.items() if later > number)
    return attempts


def is_same_attempt(line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two lines with the same number belong to the same attempt, as far as both say whose they are."""
    return all(line[name] == other[name] for name in IDENTITY if name in line and name in other)


def choose_number(lines: Iterable[Mapping[str, Any]], attempt: Mapping[str, Any]) -> int:
    """Return the number of an attempt that is about to be recorded.

    That is its own number, or the next free one if another attempt has that: a process chooses its number before it
    waits for the run's lock, and the holder of the lock may not have recorded its start by then.

    Args:
        lines: The lines of all attempts so far.
        attempt: Number and identity of the attempt (``attempt``, and ``IDENTITY`` as far as known).
    """
    number, numbers, is_taken = int(attempt["attempt"]), [0], False
    for line in lines:
        numbers.append(line["attempt"])
        has_begun = line["event"] == "start" and not line.get("never_began")
        is_taken = is_taken or (line["attempt"] == number and (has_begun or not is_same_attempt(line, attempt)))
    return max(numbers) + 1 if is_taken else number


def _add_end(attempt: AttemptLines, line: dict[str, Any], position: int) -> None:
    # a local time limit ends with an INT, which Python turns into KeyboardInterrupt
    interrupted = line.get("cause") == "error" and str(line.get("why")).startswith("KeyboardInterrupt")
    cause, is_consequence = "interrupted" if interrupted else line.get("cause"), bool(line.get("consequence"))
    old = 0 if attempt.is_consequence else CAUSE_PRECEDENCE.get(str(attempt.cause))
    new = 0 if is_consequence else CAUSE_PRECEDENCE.get(str(cause))
    if attempt.cause in FINAL_CAUSES or (old is not None and (new is None or new <= old)):
        return
    attempt.ends.append(line)
    attempt.position = position
    attempt.cause, attempt.is_consequence = cause, is_consequence
