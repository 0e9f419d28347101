"""The states of many jobs by one call of ``squeue`` per cluster, however many jobs there are."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from slurm.backend import reasons, scheduler
from slurm.backend.owner import JobOwner, find_token
from slurm.backend.scheduler import GONE, JobState
from slurm.log.job_log import Job

_FORMAT = "%i\t%T\t%r\t%u\t%S\t%D\t%o\t%j\t%k"
"""Id, state, reason, user, start, nodes, batch script, name, comment: the texts of users come last."""


class QueueSnapshot:
    """What SLURM reports about jobs at one moment.

    Args:
        jobs: The jobs; local ones are left out.

    Attributes:
        starts: Unix time at which a queued job is expected to start, by cluster and id, where SLURM knows one.
    """

    def __init__(self, jobs: Iterable[Job]):
        self.starts: dict[tuple[str | None, str], float] = {}
        self._states: dict[tuple[str | None, str], JobState] = {}
        self._errors: dict[str | None, str] = {}
        ids: dict[str | None, dict[str, None]] = {}
        for job in jobs:
            if not job.is_local:
                ids.setdefault(job.cluster, {})[job.id] = None
        for cluster, names in ids.items():
            self._read(cluster, list(names))

    def query(self, job: Job) -> JobState:
        """Return the state of one of the jobs; ``UNKNOWN`` with the error as its hint if SLURM did not answer."""
        if job.cluster in self._errors:
            return JobState("UNKNOWN", hint=self._errors[job.cluster])
        return self._states.get((job.cluster, job.id), JobState(GONE))

    def expected_start(self, job: Job) -> float | None:
        """Return the Unix time at which a queued job is expected to start; None if unknown."""
        return self.starts.get((job.cluster, job.id))

    def _read(self, cluster: str | None, ids: list[str]) -> None:
        words = ("-h", "-a", "-r", "-t", "all", "-j", ",".join(ids), "-o", _FORMAT)
        answer = scheduler.run_command("squeue", *words, cluster=cluster)
        if answer.returncode and "Invalid job id" not in answer.stderr:  # the answer to a single job that is gone
            self._errors[cluster] = " ".join(answer.stderr.split())[:300]
            return
        for line in answer.stdout.splitlines():
            fields = line.split("\t", 8)
            if len(fields) == 9:  # squeue -M prints the name of the cluster first
                self._add(cluster, fields)

    def _add(self, cluster: str | None, fields: list[str]) -> None:
        job, name, reason, user, start, nodes, script, job_name, comment = fields
        if name not in scheduler.ACTIVE_STATES and reason.replace(" ", "") not in scheduler.LASTING_REASONS:
            reason = "None"  # SLURM still shows what the job waited for before
        owner = JobOwner(find_token(comment), user, job_name, script)  # the script lies in the folder of the logs
        reason = "" if reason == "None" else reason.replace(" ", "_")
        self._states[cluster, job] = JobState(
            name,
            reason,
            hint=reasons.find_hint(reason, job, name),
            nodes=int(nodes) if nodes.isdigit() else None,
            owner=owner,
        )
        if name == "PENDING" and (time := _parse_time(start)):
            self.starts[cluster, job] = time


def _parse_time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A
        return 0.0
