"""The attempts of a job, and why each of them ended. ``hpcssl.attempts`` says what the recorded lines mean."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcssl.attempts import CRASH_CAUSES, IDENTITY, AttemptLines, choose_number, group_by_attempt
from hpcssl.files import append_line
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import RecordError, parse_record
from hpcssl.storage.tail import read_backward
from slurm.log import job_log


@dataclass(frozen=True)
class Attempt:
    """One attempt as it was recorded.

    Attributes:
        number: 1 for the first attempt of a run or evaluation.
        job: Id of the job that it belongs to.
        restart: How often the job had been restarted when the attempt began.
        launch: How often its batch script had launched the tasks before, since that restart.
        first_step: The training step that it continued from; 0 for an evaluation.
        last_step: The last step that was finished; None if unknown.
        cause: Why it ended (see ``hpcssl.attempts``); None while it is open.
        error: The error message, or the signals that stopped it.
        is_consequence: Whether the error came from a collective, which fails on every rank when one of them is gone.
        host: Where it ran: SLURM's node list, or a host name.
        time: When it began (Unix time); 0 if that was not recorded as a number.
        token: The job's ``job_log.Job.token``.
        never_began: Whether it ended before it could record its start.
        was_saved: Whether its trainer saved the state and recorded that it was stopped.
        position: Position of the line that ended it among all lines; -1 while it is open.
    """

    number: int
    job: str
    restart: int
    first_step: int
    last_step: int | None = None
    cause: str | None = None
    error: str = ""
    is_consequence: bool = False
    host: str = ""
    time: float = 0.0
    token: str = ""
    launch: int = 0
    never_began: bool = False
    was_saved: bool = False
    position: int = -1

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What identifies the attempt: job, token, restart and launch."""
        return self.job, self.token, self.restart, self.launch

    @property
    def job_key(self) -> tuple[str, str]:
        """The ``job_log.Job.key`` of its job."""
        return self.job, self.token

    @property
    def is_crash(self) -> bool:
        """Whether the attempt ended by a crash."""
        return self.cause in CRASH_CAUSES

    @property
    def is_explained(self) -> bool:
        """Whether a rank has reported a crash of its own, which is not a consequence of a lost node."""
        return self.cause in ("error", "hang") and not self.is_consequence


def read_attempts(run: RunDir, what: str = job_log.TRAIN) -> list[Attempt]:
    """Return the attempts of the training or of an evaluation, oldest first.

    Args:
        run: The run folder.
        what: ``train``, or the text of an evaluation.
    """
    history = [_parse_attempt(lines) for lines in group_by_attempt(_read_records(run, what))]
    if any(attempt.cause == "lost" for attempt in history):  # a job that is cancelled while suspended records no end
        cancelled = job_log.cancelled_jobs(run)
        history = [
            replace(a, cause="cancelled") if a.cause == "lost" and a.job_key in cancelled else a for a in history
        ]
    return history


def next_number(run: RunDir, what: str = job_log.TRAIN) -> int:
    """Return the number of the next attempt."""
    return max((a.number for a in read_attempts(run, what)), default=0) + 1


def find_attempt(run: RunDir, what: str, attempt: Mapping[str, Any]) -> Attempt | None:
    """Return what was recorded of an attempt, or None if nothing was.

    The number alone does not identify it: another process may have recorded its attempt under the same one.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: See ``record_start``. Without a ``job``, the number counts.
    """
    history = read_attempts(run, what)
    if "job" not in attempt:
        return next((a for a in history if a.number == attempt["attempt"]), None)
    key = attempt["job"], attempt.get("token", ""), attempt["restart"], attempt.get("launch", 0)
    return next((a for a in reversed(history) if a.key == key), None)


def in_order_of_end(history: Iterable[Attempt]) -> list[Attempt]:
    """Return attempts in the order in which they have ended, with those last that are open.

    That is not the order of their numbers if an attempt was refused because an earlier one was still running.
    """
    return sorted(history, key=lambda attempt: (attempt.cause is None, attempt.position))


def record_start(run: RunDir, what: str, attempt: dict[str, Any]) -> None:
    """Record the start of an evaluation's attempt. The trainer records its own.

    Args:
        run: The run folder.
        what: The evaluation.
        attempt: ``attempt``, ``job``, ``restart``, ``launch`` and ``host``, as ``task.describe_attempt`` returns them.
    """
    with job_log.attempt_lock(run):
        number = choose_number(_read_records(run, what), attempt)
        start = {"event": "start", "first_step": 0, "time": round(time.time(), 1)}
        _append(run, what, {**attempt, "attempt": number, **start})


def record_end(
    run: RunDir, what: str, attempt: dict[str, Any], cause: str, why: str = "", *, is_consequence: bool = False
) -> None:
    """Record the end of an attempt that did not record its own; also its start, if that is missing.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: See ``record_start``.
        cause: One of the causes in ``hpcssl.attempts``.
        why: The error message, or another explanation.
        is_consequence: See ``Attempt``.
    """
    step = last_known_step(run) if what == job_log.TRAIN else 0
    recorded = find_attempt(run, what, attempt)
    number = recorded.number if recorded is not None else choose_number(_read_records(run, what), attempt)
    if recorded is None:
        start = {"event": "start", "first_step": step, "time": job_log.timestamp(), "never_began": True}
        _append(run, what, {**attempt, "attempt": number, **start})
    _append(
        run,
        what,
        {
            **{name: attempt[name] for name in IDENTITY if name in attempt},
            "attempt": number,
            "event": "end",
            "cause": cause,
            "last_step": step,
            "why": why,
            **({"consequence": True} if is_consequence else {}),
            "time": job_log.timestamp(),
        },
    )


def last_known_step(run: RunDir) -> int:
    """Return the step that the last attempt has reached, according to the journal or its own record."""
    steps = [int(read_last_record(run.journal).get("step", 0))]
    for attempt in read_attempts(run)[-1:]:
        steps += [step for step in (attempt.first_step, attempt.last_step) if step is not None]
    return max(steps, default=0)


def read_last_record(path: Path) -> dict[str, Any]:
    """Return the last whole record of a journal, with its ``step``; empty if there is none."""
    for _, line in read_backward(path) if path.exists() else ():
        with contextlib.suppress(RecordError):
            return parse_record(line, {"step": int})
    return {}


def _parse_attempt(lines: AttemptLines) -> Attempt:
    line, began = lines.start, lines.start.get("time")
    last_steps = [end["last_step"] for end in lines.ends if "last_step" in end]
    errors = [error for end in lines.ends if (error := end.get("why") or ", ".join(end.get("signals", [])))]
    return Attempt(
        line["attempt"],
        line.get("job", ""),
        line.get("restart", 0),
        line.get("first_step") or 0,
        last_steps[-1] if last_steps else None,
        lines.cause,
        errors[-1] if errors else "",
        lines.is_consequence,
        host=line.get("host", ""),
        time=began if isinstance(began, float) else 0.0,
        token=str(line.get("token", "")),
        launch=line.get("launch", 0),
        never_began=line.get("never_began", False),
        was_saved=bool(lines.ends) and "signals" in lines.ends[-1],
        position=lines.position,
    )


def _read_records(run: RunDir, what: str) -> list[dict[str, Any]]:
    if what == job_log.TRAIN:
        lines = job_log.read_records(run, run.attempts)
    else:
        lines = [line for line in job_log.read_records(run) if line.get("what") == what]
    return [line for line in lines if line["event"] in ("start", "end") and "attempt" in line]


def _append(run: RunDir, what: str, line: dict[str, Any]) -> None:
    if what == job_log.TRAIN:
        append_line(run.attempts, line)
    else:
        append_line(run.jobs, {**line, "what": what})
