"""What was submitted for a run, as JSON lines in the run folder: the only state that the doors trust.

submitit's pickles say what was once asked for; a requeue, a dead node or a second submission changes that without
touching them. Events in ``jobs.jsonl``: ``submit``, ``supervisor`` (local), ``exit`` (one task of a local attempt),
``signal`` (why the next one comes), ``cancel``, ``ended``, and ``start``/``end`` of an evaluation's attempts (the
training's are in ``attempts.jsonl``, written by the trainer).
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from hpcssl import files
from hpcssl.files import RunDir, append_line, read_lines

TRAIN = "train"


@dataclass(frozen=True)
class Job:
    """One submitted job: ``what`` is ``train``, or the evaluation as ``chain.Entry`` writes it."""

    job: str
    what: str
    kind: str
    options: dict
    profile: dict = field(default_factory=dict)
    """Of the cluster, as ``cluster.Profile`` has it."""
    follows: str | None = None
    """The job that this one took over from, where SLURM requeues none."""

    @property
    def local(self) -> bool:
        return self.kind == "local"

    @property
    def beside(self) -> bool:
        """Whether it evaluates weights that a training exports on its way."""
        return "@" in self.what.partition(":")[0]

    @property
    def cluster(self) -> str | None:
        """The name that ``--clusters`` gave, which every other SLURM command needs too."""
        return self.options.get("clusters")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def note(run: RunDir, event: str, job: str, **values) -> None:
    append_line(run.jobs, {"event": event, "job": job, "time": now(), **values})


def every(run: RunDir) -> list[Job]:
    """Every job that was submitted for the run, oldest first."""
    return [Job(line["job"], line["what"], line["kind"], line.get("options", {}), line.get("profile", {}),
                line.get("follows")) for line in read_lines(run.jobs, "job", "what", "kind", "time")
            if line.get("event") == "submit"]


def submitted(run: RunDir) -> dict[str, Job]:
    """The latest job of each kind of work, in the order of their first submission."""
    return {job.what: job for job in every(run)}


def successor(run: RunDir, job: Job) -> Job | None:
    """The job that took over from this one."""
    return next((other for other in every(run) if other.follows == job.job and other.what == job.what), None)


def of(run: RunDir, event: str, job: str) -> list[dict]:
    """Lines of one event of one job, oldest first."""
    return [x for x in read_lines(run.jobs) if x.get("event") == event and x.get("job") == job]


def allow_pipe(run: RunDir, command: str) -> None:
    """Note the shell command that ``--allow-pipe`` was given for: this text may run in the run's jobs, no other."""
    append_line(run.jobs, {"event": "allow-pipe", "command": command, "time": now()})


def allowed_pipe(run: RunDir) -> str:
    """The command that the last submission allowed, '' for none."""
    return ([x.get("command", "") for x in read_lines(run.jobs) if x.get("event") == "allow-pipe"] or [""])[-1]


def cancelled(run: RunDir, job: str) -> bool:
    """Whether its user asked for its end, and nobody refused: then nothing asks for another attempt."""
    asked = of(run, "cancel", job)
    return bool(asked) and not asked[-1].get("refused")


@contextlib.contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """One submission of a run at a time. The lock dies with its holder."""
    run.jobs.parent.mkdir(parents=True, exist_ok=True)
    with open(run.jobs, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def alone(run: RunDir, patience_s: float = 10.0) -> contextlib.AbstractContextManager[None]:
    """One rank at a time writes how an attempt ended (``files.alone``)."""
    return files.alone(run.attempts, patience_s)
