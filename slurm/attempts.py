"""The attempts of a run, why each of them ended, and whether another one may be asked for.

| cause | the attempt ended by |
|---|---|
| done | its own end |
| timeout, preempted, node_fail | its time limit, a job of more worth, the loss of a node |
| cancelled | its user |
| stopped | a signal that nobody explains |
| error, killed, hang | a crash: its own error, a death without a word, no progress (the watchdog's word) |
| lost | nobody knows: a later attempt found it open, and its nodes alive |
| interrupted | Ctrl-C |

All but a crash are free, however often they come. Two crashes in a row at the same step mean that the next attempt
would end there too. A crash shows on many ranks, each of which may write: the first word on it stands, but for what
is known better later: ``error``, then ``killed``, ``hang``, ``node_fail``.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from hpcssl.files import RunDir, append_line, read_lines
from slurm import records

CRASHES = ("error", "killed", "hang")
BETTER = (*CRASHES, "node_fail")
"""Each explains those before it."""


@dataclass(frozen=True)
class Attempt:
    """``job`` and ``restart`` (how often SLURM had started it before) name it; ``cause`` is None while it is open."""

    number: int
    job: str
    restart: int
    first_step: int
    last_step: int | None = None
    cause: str | None = None
    error: str = ""
    host: str = ""
    """Where it ran: SLURM's node list, or a machine."""
    time: float = 0.0
    """When it began (Unix time); 0 where that was not written as a number."""

    @property
    def crashed(self) -> bool:
        return self.cause in CRASHES


@dataclass(frozen=True)
class Verdict:
    """``again``: ask for another attempt. ``why`` is one clause for a person."""

    again: bool
    why: str


def history(run: RunDir, what: str = records.TRAIN) -> list[Attempt]:
    """Attempts, oldest first. An attempt that a later one followed without an end was lost.

    Once a later attempt has begun, nothing changes an earlier one: a process that was left over may still write. (Of
    an attempt that never began only its end is known: it may have been refused because an earlier one still lives.)
    """
    found: dict[int, Attempt] = {}
    begun = 0
    for line in _lines(run, what):
        number = int(line["attempt"])
        if line["event"] == "start":
            begun = max(begun, 0 if line.get("never_began") else number)
            began = line.get("time")
            found[number] = Attempt(number, str(line.get("job", "")), int(line.get("restart", 0)),
                                    int(line.get("first_step") or 0), host=str(line.get("host", "")),
                                    time=began if isinstance(began, float) else 0.0)
        elif number in found and number >= begun:
            before, cause = found[number], _cause(line)
            if before.cause in BETTER and (cause not in BETTER or BETTER.index(cause) <= BETTER.index(before.cause)):
                continue
            found[number] = replace(before, cause=cause, last_step=line.get("last_step", before.last_step),
                                    error=line.get("why") or ", ".join(line.get("signals", [])) or before.error)
    attempts = [found[n] for n in sorted(found)]
    return [replace(a, cause="lost") if a.cause is None and a is not attempts[-1] else a for a in attempts]


def next_number(run: RunDir, what: str = records.TRAIN) -> int:
    return max((a.number for a in history(run, what)), default=0) + 1


def begin(run: RunDir, what: str, attempt: dict) -> None:
    """The start line of an evaluation's attempt; the trainer writes its own."""
    _append(run, what, {**attempt, "event": "start", "first_step": 0, "time": round(time.time(), 1)})


def end(run: RunDir, what: str, attempt: dict, cause: str, why: str = "") -> None:
    """Close an attempt that did not close itself. One that never wrote its start gets that line too."""
    mine = [a for a in history(run, what) if a.number == attempt["attempt"]]
    step = reached(run) if what == records.TRAIN else 0
    if not mine:
        _append(run, what, {**attempt, "event": "start", "first_step": step, "time": records.now(),
                            "never_began": True})
    _append(run, what, {"attempt": attempt["attempt"], "event": "end", "cause": cause, "last_step": step,
                        "why": why, "time": records.now()})


def reached(run: RunDir) -> int:
    """The step that the last attempt reached, as far as the journal or its own record knows."""
    known = [int(newest(run.journal).get("step") or 0)]
    known += [step for a in history(run)[-1:] for step in (a.first_step, a.last_step) if step is not None]
    return max(known, default=0)


def newest(path: Path) -> dict:
    """The last whole JSON line of a file that may be long; empty where there is none."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return {}


def settle(run: RunDir, what: str, attempt: dict, killed: str, sure: bool = False) -> Verdict:
    """What to do after an attempt that ended by itself and is not done: the one place that decides.

    An attempt without an end line died without a word; ``killed`` says how, as far as its parent could see. ``sure``:
    its parent saw a death by KILL, of which the errors of the other ranks, and the signal that ended them, are echoes.
    """
    mine = [a for a in history(run, what) if a.number == attempt["attempt"]]
    if not mine or mine[0].cause is None or (sure and mine[0].cause in ("stopped", "error")):
        end(run, what, attempt, "killed", killed)
    return verdict(history(run, what))


def verdict(attempts: list[Attempt]) -> Verdict:
    """Whether the end of the last attempt asks for another one."""
    if not attempts:
        return Verdict(True, "no attempt yet")
    last = attempts[-1]
    if last.cause in ("done", "cancelled"):
        return Verdict(False, last.cause)
    if not last.crashed:
        return Verdict(True, f"attempt {last.number} was stopped ({last.cause})")
    where = last.first_step if last.last_step is None else last.last_step
    what = f"attempt {last.number} crashed at step {where}: {last.error or last.cause}"
    if len(attempts) > 1 and attempts[-2].crashed:
        before = attempts[-2]
        if where == (before.first_step if before.last_step is None else before.last_step):
            return Verdict(False, f"two crashes in a row at the same step; {what}")
    return Verdict(True, what)


def stuck(attempts: list[Attempt], most: int = 3) -> str:
    """What a person should know where the last ``most`` attempts were stopped without a single step: '' elsewhere."""
    last = [a for a in attempts if a.cause is not None][-most:]
    if len(last) < most or any(a.crashed or a.cause in ("done", "cancelled") or a.last_step is None
                               or a.last_step > a.first_step for a in last):
        return ""
    mend = "raise --time" if last[-1].cause == "timeout" else "see the logs, and whether they get time to start"
    return f"the last {most} attempts ended before their first step ({last[-1].cause}): {mend}"


def _cause(line: dict) -> str | None:
    interrupted = line.get("cause") == "error" and str(line.get("why")).startswith("KeyboardInterrupt")
    return "interrupted" if interrupted else line.get("cause")  # an INT comes at the end of a local time limit


def _lines(run: RunDir, what: str) -> list[dict]:
    path = run.attempts if what == records.TRAIN else run.jobs
    lines = [x for x in read_lines(path) if x.get("event") in ("start", "end") and "attempt" in x]
    return lines if what == records.TRAIN else [x for x in lines if x.get("what") == what]


def _append(run: RunDir, what: str, line: dict) -> None:
    if what == records.TRAIN:
        append_line(run.attempts, line)
    else:
        append_line(run.jobs, {**line, "what": what})
