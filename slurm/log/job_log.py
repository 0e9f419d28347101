"""The record of submitted jobs: JSON lines in ``jobs.jsonl`` of the run folder.

All commands of ``hpcssl-submit`` and all jobs read the state of a run's jobs from this file.

Each line has ``event``, ``job`` (the job id) and ``time``. A cluster that lost its state counts its jobs from the
beginning again, so a job id alone names nothing: an event belongs to the last submission of its ``job`` before it, and
each submission has a random ``token``, which the job carries as well (``backend.identity``). The events:

| event | written when |
|---|---|
| ``request`` | sbatch is about to be called; it has no ``job``, but the ``token`` that the job will carry |
| ``submit`` | a job was submitted |
| ``withdrawn`` | a request has no job: sbatch refused it, or it was cancelled because another one had taken its place |
| ``supervisor`` | the supervisor process of local jobs was started in ``folder``, on the GPUs ``gpus`` if it has some |
| ``controller`` | the tasks of an attempt of a local job were started |
| ``exit`` | one task of a local attempt has ended |
| ``step`` | the tasks of an attempt on SLURM have ended, with srun's exit ``code``; its nodes were looked at |
| ``signal`` | a signal is about to be sent; ``cause`` says why |
| ``cancel`` | a user cancels the job; with ``refused``, SLURM did not do it |
| ``ended`` | a local job has ended for good |
| ``start``, ``end`` | an attempt of an evaluation; those of the training are in ``attempts.jsonl`` |
| ``avoid`` | a job was made to avoid ``nodes``, which earlier attempts blame; ``why`` has the reasons |
| ``allow-pipe`` | ``--allow-pipe`` was given for a shell command |
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcssl import files
from hpcssl.files import append_line, read_lines
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import Fields

_TYPES: Fields = {
    "attempt": int,
    "cause": str,
    "code": int,
    "command": str,
    "first_step": int | None,
    "folder": str,
    "follows": str | None,
    "gpus": str,
    "host": str,
    "job": str,
    "kind": str,
    "last_step": int | None,
    "launch": int,
    "logs": str,
    "nodes": list[str],
    "never_began": bool,
    "options": dict[str, str | bool],
    "pid": int,
    "profile": dict,
    "rank": int,
    "refused": bool,
    "restart": int,
    "signals": list[str],
    "started": int,
    "tasks": int,
    "time": float | str,
    "token": str,
    "user": str,
    "what": str,
    "why": str | None,
}
_REQUIRED = {
    "request": ("token", "what", "kind"),
    "withdrawn": ("token",),
    "submit": ("job", "what", "kind", "time"),
    "supervisor": ("job", "pid", "started", "host"),
    "controller": ("job", "attempt", "logs", "tasks"),
    "exit": ("job", "attempt", "rank", "code"),
    "step": ("job", "what", "attempt", "code"),
    "signal": ("job", "cause", "restart"),
    "cancel": ("job",),
    "ended": ("job", "code"),
    "start": ("attempt", "what"),
    "end": ("attempt", "what"),
    "allow-pipe": ("command",),
    "avoid": ("job", "what", "nodes", "why"),
}
TRAIN = "train"
"""``what`` of the training's job. Every other value of ``what`` is an evaluation (``evaluations.EvalRequest``)."""

SbatchOptions = dict[str, str | bool]
"""Options of sbatch by long name, without dashes; True for an option without a value."""


@dataclass(frozen=True)
class Job:
    """One submitted job.

    Attributes:
        id: The job id: SLURM's, or ``local-…`` of a local job.
        what: ``train``, or the text of an ``evaluations.EvalRequest``.
        kind: ``slurm`` or ``local``.
        options: The options of sbatch that it was submitted with.
        profile: The cluster profile as a dict (``profiles.Profile``); empty for a local job.
        follows: Id of the job that this one continues, where SLURM requeues no jobs; else None.
        token: What tells it from other jobs that have, had or get the same id; empty for a local job.
        user: Name of the user who submitted it; empty if unknown.
    """

    id: str
    what: str
    kind: str
    options: SbatchOptions
    profile: dict[str, Any] = field(default_factory=dict)
    follows: str | None = None
    token: str = ""
    user: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the job: its id and its token."""
        return self.id, self.token

    @property
    def is_local(self) -> bool:
        """Whether the job runs on this machine without SLURM."""
        return self.kind == "local"

    @property
    def is_concurrent(self) -> bool:
        """Whether it evaluates weights that the training exports while it still runs."""
        return "@" in self.what.partition(":")[0]

    @property
    def cluster(self) -> str | None:
        """The cluster that ``--clusters`` named. All other SLURM commands need it as well."""
        return get_cluster(self.options)


def get_cluster(options: SbatchOptions) -> str | None:
    """Return the cluster that ``--clusters`` names, or None."""
    return str(options["clusters"]) if "clusters" in options else None


def timestamp() -> str:
    """Return the local time with its offset from UTC, as in ``2026-11-20T18:37:38+0000``."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def record_event(run: RunDir, event: str, job: str, **values: object) -> None:
    """Append an event of a job. ``values``: further keys of the line."""
    append_line(run.jobs, {"event": event, "job": job, "time": timestamp(), **values})


def read_records(run: RunDir, path: Path | None = None) -> list[dict[str, Any]]:
    """Return the lines of ``jobs.jsonl``, or of ``path``, that hold a usable record, oldest first.

    The others are reported in the log: those that are damaged, and those whose fields have other types.
    """
    lines = read_lines(path or run.jobs, {"event": str}, _TYPES)
    return [line for line in lines if path or line.keys() >= {*_REQUIRED.get(line["event"], ())}]


def read_events(run: RunDir, event: str, job: str) -> list[dict[str, Any]]:
    """Return the lines of one kind of event of the job that got this id last, oldest first."""
    lines = [line for line in read_records(run) if line.get("job") == job]
    first = max((k for k, line in enumerate(lines) if line["event"] == "submit"), default=0)
    return [line for line in lines[first:] if line["event"] == event]


def all_jobs(run: RunDir) -> list[Job]:
    """Return every job that was submitted for the run, oldest first."""
    return [
        Job(
            line["job"],
            line["what"],
            line["kind"],
            line.get("options", {}),
            line.get("profile", {}),
            line.get("follows"),
            line.get("token", ""),
            line.get("user", ""),
        )
        for line in read_records(run)
        if line["event"] == "submit"
    ]


def latest_jobs(run: RunDir) -> dict[str, Job]:
    """Return the latest job of the training and of each evaluation, by ``what``, in the order of first submission."""
    return {job.what: job for job in all_jobs(run)}


def find_successor(run: RunDir, job: Job) -> Job | None:
    """Return the job that continues this one, or None."""
    jobs = all_jobs(run)
    own = max((k for k, other in enumerate(jobs) if other.key == job.key), default=-1)
    return next((other for other in jobs[own + 1 :] if other.follows == job.id and other.what == job.what), None)


def record_request(run: RunDir, **values: object) -> None:
    """Record that sbatch is about to be called. ``values``: those of the ``submit`` event, but the job id."""
    append_line(run.jobs, {"event": "request", "time": timestamp(), **values})


def open_requests(run: RunDir) -> list[tuple[dict[str, Any], bool]]:
    """Return the requests of which it is not known whether sbatch has accepted a job.

    Returns:
        The values of each request (see ``record_request``), and whether a job was submitted in its place since then.
    """
    requests: dict[str, dict[str, Any]] = {}
    replaced: set[str] = set()
    for line in read_records(run):
        token = line.get("token", "")
        if line["event"] == "request":
            requests[token] = {key: value for key, value in line.items() if key not in ("event", "time")}
        elif line["event"] in ("submit", "withdrawn"):
            requests.pop(token, None)
            replaced |= {t for t, request in requests.items() if request.get("what") == line.get("what")}
    return [(request, token in replaced) for token, request in requests.items()]


def record_allowed_pipe(run: RunDir, command: str) -> None:
    """Record the shell command of ``data.train`` that ``--allow-pipe`` was given for. The run's jobs run no other."""
    append_line(run.jobs, {"event": "allow-pipe", "command": command, "time": timestamp()})


def read_allowed_pipe(run: RunDir) -> str:
    """Return the shell command that the last submission allowed; empty if none."""
    commands = [str(line["command"]) for line in read_records(run) if line["event"] == "allow-pipe"]
    return commands[-1] if commands else ""


def is_cancelled(run: RunDir, job: str) -> bool:
    """Return whether a user has cancelled the job, and SLURM did not refuse it. It gets no further attempt then."""
    events = read_events(run, "cancel", job)
    return bool(events) and not events[-1].get("refused")


def cancelled_jobs(run: RunDir) -> set[tuple[str, str]]:
    """Return the ``Job.key`` of each job that a user has cancelled, and SLURM did not refuse it."""
    keys: dict[str, tuple[str, str]] = {}
    cancelled: set[tuple[str, str]] = set()
    for line in read_records(run):
        job = line.get("job", "")
        if line["event"] == "submit":
            keys[job] = (job, line.get("token", ""))
        elif line["event"] == "cancel":
            key = keys.get(job, (job, ""))
            cancelled = cancelled - {key} if line.get("refused") else cancelled | {key}
    return cancelled


@contextlib.contextmanager
def submission_lock(run: RunDir) -> Iterator[None]:
    """Allow one submission or cancellation of a run at a time; wait as long as it takes.

    The kernel releases the lock when its holder dies. The package ``filelock`` is not used: where the file system has
    no locks it falls back to a marker file, which a killed process leaves behind.

    Raises:
        OSError: The file system has no locks.
    """
    run.jobs.parent.mkdir(parents=True, exist_ok=True)
    with open(run.jobs, "ab") as file:
        files.lock_descriptor(file.fileno(), wait=True)
        yield


def attempt_lock(run: RunDir, patience_s: float = 10.0) -> contextlib.AbstractContextManager[None]:
    """Allow one rank at a time to record how an attempt ended (``files.exclusive_lock``)."""
    return files.exclusive_lock(run.attempts, patience_s)
