"""Which job is ours: a job id is not enough.

A cluster that lost its state counts its jobs from the beginning again, and a job of somebody else gets the id that
``jobs.jsonl`` has. So each submission has a random token. It is recorded before sbatch is called, the job carries it in
its comment, and its tasks get it in their environment. It survives a requeue, which the submission time does not
(measured: SLURM 22.05 changes ``SubmitTime``).

The token also finds a job that SLURM has accepted but that could not be recorded: sbatch gave no answer, the process
was killed, or the disk was full.
"""

from __future__ import annotations

import os
import pwd
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcssl.cli_runner import print_message
from hpcssl.errors import SubmitError
from hpcssl.run_dir import RunDir
from slurm.backend import scheduler
from slurm.backend.owner import TOKEN_NAME, find_token
from slurm.backend.scheduler import JobState
from slurm.log import job_log
from slurm.log.job_log import Job, SbatchOptions

MAX_NAME = 255
"""Longest job name in characters, where the user gives none. SLURM accepts 1000 and refuses 1030 (measured)."""


def create_token() -> str:
    """Return a random token."""
    return secrets.token_hex(8)


def format_comment(token: str, sbatch: SbatchOptions) -> str:
    """Return the job's comment: the user's own, then the token."""
    return f"{sbatch.get('comment', '')} {TOKEN_NAME}={token}".lstrip()


def format_job_name(run: RunDir, what: str, sbatch: SbatchOptions) -> str:
    """Return the name of a job: the user's own, or that of the run folder and of the evaluation."""
    default = run.root.name + ("" if what == job_log.TRAIN else f"-{what}")
    return str(sbatch.get("job-name", default[:MAX_NAME]))


def current_user() -> str:
    """Return the name of the user of this process, as SLURM shows it."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container without an entry for this user
        return str(os.geteuid())


def is_same_job(run: RunDir, job: Job, state: JobState) -> bool:
    """Return whether the job that SLURM has under this id is the one that was submitted.

    The token decides. Where it is missing, because the job was submitted without one or the site replaces comments, the
    user, the job name and the folder of the logs must agree. A copy of a run folder does not own the jobs of the
    original.

    Args:
        run: The run folder.
        job: The job as it was recorded.
        state: What SLURM reports about the job with this id; without an owner, there is nothing to compare.
    """
    owner = state.owner
    if owner is None:
        return True
    logs = Path(owner.output).parent if owner.output else run.logs
    if owner.token:
        return owner.token == job.token and not (logs.exists() and run.logs.exists() and not _is_same(logs, run.logs))
    same_user = not job.user or owner.user == job.user
    return same_user and owner.job_name == format_job_name(run, job.what, job.options) and _is_same(logs, run.logs)


def find_unrecorded_jobs(
    run: RunDir, list_jobs: Callable[[str | None], dict[str, str]] | None = None
) -> list[tuple[str, dict[str, Any], bool]]:
    """Return queued and running jobs that SLURM has accepted from a submission that could not record them.

    Args:
        run: The run folder.
        list_jobs: Returns the ids of this user's jobs on a cluster by token; None for ``list_tokens``.

    Returns:
        The id of each job, the values of its request, and whether another job was submitted in its place since then.

    Raises:
        SubmitError: SLURM did not answer. It is not asked if every request was followed by the record of its job.
    """
    requests = job_log.open_requests(run)
    clusters = {job_log.get_cluster(request.get("options") or {}) for request, _ in requests}
    jobs = {token: job for cluster in clusters for token, job in (list_jobs or list_tokens)(cluster).items()}
    found = [(jobs[r["token"]], r, is_replaced) for r, is_replaced in requests if r["token"] in jobs]
    return [(job, r, is_replaced) for job, r, is_replaced in found if _is_requested(run, job, r)]


def _is_requested(run: RunDir, job: str, request: dict[str, Any]) -> bool:
    """Whether a queued job with the token of a request is that of this run folder, and not of one that it copies."""
    asked = Job(job, request["what"], "slurm", request.get("options") or {}, token=request["token"])
    state = scheduler.query_job(job, asked.cluster)
    return state.name != scheduler.GONE and is_same_job(run, asked, state)


def record_unrecorded_jobs(run: RunDir) -> None:
    """Record the jobs of ``find_unrecorded_jobs``, or cancel those in whose place another one was submitted.

    Args:
        run: The run folder. The caller holds ``job_log.submission_lock``.

    Raises:
        SubmitError: SLURM did not answer.
    """
    for job, request, is_replaced in find_unrecorded_jobs(run):
        name = f"job {job} ({request.get('what')}), whose submission was interrupted"
        if is_replaced:
            cluster = job_log.get_cluster(request.get("options") or {})
            if scheduler.run_command("scancel", job, cluster=cluster).returncode == 0:
                job_log.record_event(run, "withdrawn", job, token=request["token"])
                print_message(f"cancelled {name}: another one was submitted since then")
        else:
            job_log.record_event(run, "submit", job, **request)
            print_message(f"found {name}")


def find_accepted_job(token: str, cluster: str | None) -> tuple[str | None, bool]:
    """Return the id of the queued or running job with this token, or None; and whether SLURM has answered."""
    try:
        return list_tokens(cluster).get(token), True
    except SubmitError:
        return None, False


def list_tokens(cluster: str | None) -> dict[str, str]:
    """Return the ids of this user's queued and running jobs, by token."""
    words = ("-h", "-a", "-t", "all", "-u", current_user(), "-o", "%i %T %k")
    answer = scheduler.run_command("squeue", *words, cluster=cluster)
    if answer.returncode:
        raise SubmitError(
            "`squeue`",
            got=" ".join(answer.stderr.split())[:300],
            expected="the queue: an earlier submission got no answer, and SLURM may have accepted its job",
            fix="check that `sinfo` works, then run the command again",
        )
    found = {}
    for line in answer.stdout.splitlines():
        job, state, comment = [*line.split(maxsplit=2), "", ""][:3]
        if state in scheduler.ACTIVE_STATES and (token := find_token(comment)):
            found[token] = job
    return found


def _is_same(folder: Path, other: Path) -> bool:
    try:
        return folder == other or folder.samefile(other)
    except OSError:
        return False
