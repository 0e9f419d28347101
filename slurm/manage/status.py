"""The state of a run, from SLURM (or /proc for local jobs) and the run folder. Imports no torch."""

from __future__ import annotations

import functools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl.config import read_yaml
from hpcssl.errors import EXIT_DONE, EXIT_FAILED, ConfigError, SubmitError
from hpcssl.run_dir import RunDir
from hpcssl.timing.uptime import Uptime, last_written, measure_uptime
from slurm.backend import identity, local, scheduler
from slurm.backend.scheduler import JobState
from slurm.log import attempts, avoided_nodes, job_log, retry
from slurm.log.attempts import Attempt
from slurm.log.job_log import Job
from slurm.manage.queue_snapshot import QueueSnapshot


@dataclass(frozen=True)
class RunStatus:
    """One run as ``hpcssl-submit status`` shows it.

    Attributes:
        run: The run folder.
        job: Id of the training's job; ``-`` if there is none.
        state: The state of that job, with SLURM's reason in parentheses.
        attempt: Number of the newest attempt; 0 before the first.
        step: The last known step.
        steps: Steps of the whole training; None if unknown.
        last_end: Cause and error of the last attempt that ended; empty before.
        evals: State of each evaluation, by its text. Concurrent ones are counted by state, under ``NAME@*``.
        hint: What a user should know or do; empty if nothing.
        uptime: Where the time of the training went; None before its first attempt.
        expected_start: When SLURM expects to start the queued training (Unix time); None if unknown.
    """

    run: RunDir
    job: str
    state: str
    attempt: int
    step: int
    steps: int | None
    last_end: str
    evals: dict[str, str]
    hint: str
    uptime: Uptime | None = None
    expected_start: float | None = None

    def line(self) -> str:
        """Return one line of ``name=value``, separated by tabs, for pipes."""
        words = [
            str(self.run.root),
            f"job={self.job}",
            f"state={self.state}",
            f"attempt={self.attempt}",
            f"step={self.step}/{self.steps if self.steps is not None else '?'}",
        ]
        words += [f"effective={self.uptime.share:.1%}"] if self.uptime else []
        words += [f"last={self.last_end}"] if self.last_end else []
        words += [f"{name}={state}" for name, state in self.evals.items()]
        return "\t".join(words + ([f"hint={self.hint}"] if self.hint else []))


def query_runs(runs: Sequence[RunDir]) -> list[RunStatus]:
    """Return the states of runs and of their evaluations, by one call of squeue for all of them (per cluster)."""
    queue = QueueSnapshot(job for run in runs for job in job_log.latest_jobs(run).values() if not _is_done(run, job))
    list_jobs = functools.cache(identity.list_tokens)  # asked for where the submission of a job was interrupted
    return [query_run(run, queue, list_jobs) for run in runs]


def query_job(run: RunDir, job: Job, queue: QueueSnapshot | None = None) -> JobState:
    """Return the state of a job, local or on SLURM. The run folder replaces what SLURM has forgotten.

    If SLURM has another job under its id, it has forgotten the one that was submitted.

    Args:
        run: The run folder.
        job: The job.
        queue: What SLURM reports about this job and others; None to ask about this one.
    """
    if job.is_local:
        state = local.query_job(run, job)
        outlived_supervisor = state.name == local.LOST and job.what == job_log.TRAIN and run.finished
        return JobState("COMPLETED", exit_code=EXIT_DONE) if outlived_supervisor else state
    if _is_done(run, job):
        return JobState("COMPLETED", exit_code=EXIT_DONE)
    state = queue.query(job) if queue is not None else scheduler.query_job_or_unknown(job.id, job.cluster)
    is_other = not identity.is_same_job(run, job, state)
    if state.name != scheduler.GONE and not is_other:
        return state
    if job.what == job_log.TRAIN and (run.finished or _has_ended_well(run, job)):
        return JobState("COMPLETED", exit_code=EXIT_DONE)
    new_user = f", and gave its number to a job of {state.owner.user}" if is_other and state.owner else ""
    hint = f"SLURM has forgotten it{new_user}: submit again with the same command to continue"
    return JobState(scheduler.GONE, hint=hint, exit_code=EXIT_FAILED)


def _is_done(run: RunDir, job: Job) -> bool:
    """Whether an evaluation has recorded that it is done. SLURM is not asked about these: there may be many."""
    return job.what != job_log.TRAIN and not job.is_local and _has_ended_well(run, job)


def _has_ended_well(run: RunDir, job: Job) -> bool:
    own_attempts = [a for a in attempts.read_attempts(run, job.what) if a.job_key == job.key]
    return bool(own_attempts) and own_attempts[-1].cause == "done"


def query_run(
    run: RunDir, queue: QueueSnapshot | None = None, list_jobs: Callable[[str | None], dict[str, str]] | None = None
) -> RunStatus:
    """Return the state of a run and of its evaluations.

    Args:
        run: The run folder.
        queue: What SLURM reports about the run's jobs; None to ask about each.
        list_jobs: See ``identity.find_unrecorded_jobs``.
    """
    history = attempts.read_attempts(run)
    train = job_log.latest_jobs(run).get(job_log.TRAIN)
    state = query_job(run, train, queue) if train else JobState("COMPLETED" if run.finished else "NONE")
    evals, hints = _query_evaluations(run, queue)
    decision = retry.decide_retry(history)
    last = next(reversed(attempts.in_order_of_end(history)), None)
    has_given_up = last is not None and last.is_crash and not state.is_active and not decision.retry
    hints = [
        state.hint,
        *hints,
        decision.reason if has_given_up else "",
        "" if run.finished else retry.describe_no_progress(history),
        _describe_unrecorded_jobs(run, list_jobs),
        "" if run.finished else avoided_nodes.describe(run),
    ]
    return RunStatus(
        run,
        train.id if train else "-",
        state.name if not state.reason else f"{state.name} ({state.reason})",
        history[-1].number if history else 0,
        current_step(run),
        total_steps(run),
        describe_last_end(history),
        evals,
        "; ".join(hint for hint in hints if hint),
        measure_uptime(run, time.time() if state.is_active else last_written(run)),
        queue.expected_start(train) if queue is not None and train is not None else None,
    )


def current_step(run: RunDir) -> int:
    """Return the last step of a finished run, or else the last known one."""
    finished = run.finished
    return int(finished["step"]) if finished else attempts.last_known_step(run)


def total_steps(run: RunDir) -> int | None:
    """Return the number of steps of the whole training, from its recipe and its data; None if unknown."""
    try:
        values = read_yaml(run.config)
        schedule = values.get("schedule") or {}
        if schedule.get("steps"):
            return int(schedule["steps"])
        index: dict[str, Any] = json.loads((Path(values["data"]["train"]) / "index.json").read_text())
        samples = sum(int(shard["samples"]) for shard in index["shards"])
        batch, epochs = int(values["optim"]["batch"]), int(schedule["epochs"])
        return epochs * samples // batch if schedule.get("fractional_epochs") else epochs * (samples // batch)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


def describe_last_end(history: list[Attempt]) -> str:
    """Return the cause of the last attempt that ended, with its error in parentheses; empty if none ended."""
    ended = [attempt for attempt in attempts.in_order_of_end(history) if attempt.cause]
    if not ended:
        return ""
    return f"{ended[-1].cause}" + (f" ({ended[-1].error})" if ended[-1].error else "")


def _describe_unrecorded_jobs(run: RunDir, list_jobs: Callable[[str | None], dict[str, str]] | None) -> str:
    """What to do about jobs whose submission was interrupted; empty if there are none."""
    try:
        jobs = identity.find_unrecorded_jobs(run, list_jobs)
    except SubmitError as error:
        return str(error)
    names = " and ".join(f"job {job} ({request.get('what')})" for job, request, _ in jobs)
    return names and f"the submission of {names} was interrupted: submit again with the same command, or cancel the run"


def _query_evaluations(run: RunDir, queue: QueueSnapshot | None) -> tuple[dict[str, str], list[str]]:
    """States by evaluation, and hints."""
    states: dict[str, str] = {}
    hints = []
    concurrent: dict[str, Counter[str]] = {}
    for what, job in job_log.latest_jobs(run).items():
        if what == job_log.TRAIN:
            continue
        state = query_job(run, job, queue)
        hint = state.hint
        for attempt in attempts.read_attempts(run, what)[-1:]:
            if not hint and attempt.job_key == job.key and attempt.is_crash and not state.is_active:
                hint = f"job {job.id} crashed: {attempt.error}; submit again to retry it"
        hints.append(hint and f"{what}: {hint}")
        if job.is_concurrent:
            group = re.sub(r"@\d+", "@*", what, count=1)
            concurrent.setdefault(group, Counter())[state.name] += 1
        else:
            states[what] = f"{state.name}{f' ({state.reason})' if state.reason else ''} job {job.id}"
    for group, counts in concurrent.items():
        states[group] = ", ".join(f"{count} {name}" for name, count in counts.items())
    return states, hints
