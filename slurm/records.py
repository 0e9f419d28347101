"""What was submitted for a run, as JSON lines in the run folder: the only state that the doors trust.

submitit's pickles say what was once asked for; a requeue, a dead node or a second submission changes that without
touching them. Events in ``jobs.jsonl``: ``submit``, ``supervisor`` (local), ``exit`` (one task of a local attempt),
``cancel``, ``ended``, and ``start``/``end`` of an evaluation's attempts (the training's are in ``attempts.jsonl``,
written by the trainer).
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hpcssl.files import RunDir, append_line, read_lines

TRAIN = "train"


@dataclass(frozen=True)
class Job:
    """One submitted job: ``what`` is ``train`` or the evaluation's name."""

    job: str
    what: str
    kind: str
    options: dict

    @property
    def local(self) -> bool:
        return self.kind == "local"

    @property
    def cluster(self) -> str | None:
        """The name that ``--clusters`` gave, which every other SLURM command needs too."""
        return self.options.get("clusters")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def note(run: RunDir, event: str, job: str, **values) -> None:
    append_line(run.jobs, {"event": event, "job": job, "time": now(), **values})


def submitted(run: RunDir) -> dict[str, Job]:
    """The latest job of each kind of work, in the order of their first submission."""
    jobs: dict[str, Job] = {}
    for line in read_lines(run.jobs):
        if line.get("event") == "submit":
            jobs[line["what"]] = Job(line["job"], line["what"], line["kind"], line.get("options", {}))
    return jobs


def of(run: RunDir, event: str, job: str) -> list[dict]:
    """Lines of one event of one job, oldest first."""
    return [x for x in read_lines(run.jobs) if x.get("event") == event and x.get("job") == job]


def cancelled(run: RunDir, job: str) -> bool:
    """Whether its user asked for its end: then nothing asks for another attempt."""
    return bool(of(run, "cancel", job))


@contextlib.contextmanager
def locked(run: RunDir) -> Iterator[None]:
    """One submission of a run at a time. The lock dies with its holder."""
    run.jobs.parent.mkdir(parents=True, exist_ok=True)
    with open(run.jobs, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
