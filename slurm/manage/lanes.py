"""How many trainings run at once: each one waits for another, so that they form as many lanes as may run.

A training of a lane has the dependency ``afterany`` on the one before it. That holds through requeues, since a job
that is requeued has not ended, and where SLURM requeues nothing, since the dependency moves to the successor
(``slurm.job.successor``). The lanes are stored nowhere else than in the options of the jobs: a later submission reads
them there and appends to them. The limit of a job array (``--array=0-9%4``) does not serve: what is missing later would
be another array, with a limit of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hpcssl.run_dir import RunDir
from slurm.backend import local
from slurm.log import job_log
from slurm.log.job_log import Job, SbatchOptions


@dataclass(frozen=True)
class ActiveRun:
    """A run with a training that is queued or running.

    Attributes:
        id: The id that others depend on.
        earlier_ids: Ids of the jobs that this one continues.
        waits_for: Ids that it depends on.
        gpus: ``CUDA_VISIBLE_DEVICES`` of a local run that was given some; else None.
    """

    id: str
    earlier_ids: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    gpus: str | None = None


@dataclass
class Lane:
    """Trainings of which one runs at a time.

    Attributes:
        tails: Ids of the last ones; several if lanes were joined, none in a lane that is free.
        length: Number of trainings in it.
        gpus: ``CUDA_VISIBLE_DEVICES`` of its local runs; None to inherit it.
    """

    tails: tuple[str, ...] = ()
    length: int = 0
    gpus: str | None = None

    def append(self, job: str) -> None:
        """Put a job at the end."""
        self.tails, self.length = (job,), self.length + 1


@dataclass
class Lanes:
    """The lanes of a folder.

    Args:
        active: Its runs with a training that is queued or running.
        limit: How many trainings may run at once; None for all.
        gpus: ``CUDA_VISIBLE_DEVICES`` of the lanes of local runs; empty to inherit it.
    """

    active: Sequence[ActiveRun]
    limit: int | None
    gpus: Sequence[str] = ()
    lanes: list[Lane] = field(init=False)

    def __post_init__(self) -> None:
        """Find the lanes. Where more run already than may, lanes are joined: what is added waits for all of them."""
        owner = {job: run.id for run in self.active for job in (run.id, *run.earlier_ids)}
        before = {run.id: {owner[job] for job in run.waits_for if job in owner} - {run.id} for run in self.active}
        roots = [run for run in self.active if not before[run.id]]
        tails = [run for run in self.active if not any(run.id in others for others in before.values())]
        limit = len(roots) if self.limit is None else self.limit
        free = max(0, limit - len(roots))
        unused = [gpus for gpus in self.gpus if gpus not in [run.gpus for run in roots]]
        self.lanes = [Lane(gpus=unused[i] if i < len(unused) else None) for i in range(free)]
        count = min(len(tails), limit - free)
        for i in range(count):
            joined = tails[i::count]
            upstream = sum(_count_upstream(run.id, before) for run in joined)
            self.lanes.append(Lane(tuple(run.id for run in joined), upstream, joined[0].gpus))

    def choose(self) -> Lane:
        """Return the lane for the next training: the shortest one; a new one where there is no limit."""
        return Lane() if self.limit is None else min(self.lanes, key=lambda lane: lane.length)


def _count_upstream(job: str, before: dict[str, set[str]]) -> int:
    """How many active runs there are from the heads of a lane to this one."""
    found, todo = {job}, [job]
    while todo:
        others = before[todo.pop()] - found
        found |= others
        todo += others
    return len(found)


def add_dependency(sbatch: SbatchOptions, jobs: Sequence[str]) -> SbatchOptions:
    """Return the options of sbatch with the dependency on the end of other jobs, besides the user's own."""
    if not jobs:
        return sbatch
    own = str(sbatch.get("dependency", ""))
    return sbatch | {"dependency": ",".join([":".join(["afterany", *jobs]), *([own] if own else [])])}


def describe_active(run: RunDir, jobs: Sequence[Job]) -> ActiveRun | None:
    """Describe a run by its queued and running jobs; None if none of them counts.

    On SLURM, the training counts. On this machine, evaluations use the same processors, so they count as well.

    Args:
        run: The run folder.
        jobs: Its queued and running jobs (``control.active_jobs``).
    """
    counted = [job for job in jobs if (job.is_local and not job.is_concurrent) or job.what == job_log.TRAIN]
    if not counted:
        return None
    job = counted[0]
    waits_for = tuple(find_dependencies(job.options))
    if job.is_local:
        supervisor = local.find_supervisor(run, job) or {}
        return ActiveRun(job.id.partition(".")[0], (), waits_for, supervisor.get("gpus"))
    earlier, by_id, follows = [], {other.id: other for other in job_log.all_jobs(run)}, job.follows
    while follows is not None and follows not in earlier:
        earlier.append(follows)
        follows = by_id[follows].follows if follows in by_id else None
    return ActiveRun(job.id, tuple(earlier), waits_for)


def find_dependencies(sbatch: SbatchOptions) -> list[str]:
    """Return the ids of the jobs for whose end a job waits, by its options of sbatch."""
    groups = re.findall(r"\bafterany:([\w:-]+)", str(sbatch.get("dependency", "")))
    return [job for group in groups for job in group.split(":")]
