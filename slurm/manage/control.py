"""Commands on a submitted run: cancel it, preempt it, read its logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpcssl.errors import SubmitError
from hpcssl.run_dir import RunDir
from slurm.backend import identity, local, scheduler
from slurm.log import job_log
from slurm.log.job_log import Job
from slurm.manage import status


def cancel(run: RunDir) -> list[str]:
    """Cancel every queued or running job of a run.

    Returns:
        The ids of the jobs, training first. Those that ended by themselves meanwhile are missing.

    Raises:
        SubmitError: There is none, or SLURM refused or did not answer.
    """
    with job_log.submission_lock(run):  # so that nothing is submitted meanwhile
        identity.record_unrecorded_jobs(run)
        jobs = [*active_jobs(run), *_find_replaced_jobs(run)]
        ends = {job.id: cancel_job(run, job) for job in reversed(jobs)}  # jobs that depend on another one first
    cancelled = [job.id for job in jobs if ends[job.id] is None]
    if not cancelled:
        ended = " and ".join(f"job {job}, which has just ended ({state})" for job, state in ends.items())
        raise SubmitError(
            f"run {run.root}",
            got=ended or "no job in the queue",
            expected="a job to cancel",
            fix=f"run `hpcssl-submit status {run.root}` to see its jobs",
        )
    return cancelled


def cancel_job(run: RunDir, job: Job) -> str | None:
    """Cancel one job for good.

    The cancellation is recorded first, so that no rank asks for a requeue. If SLURM refuses it, that is recorded too:
    the job goes on, and continues after a preemption.

    Returns:
        The state of a job that had ended before, such as ``COMPLETED``; None if it was cancelled.

    Raises:
        SubmitError: SLURM refused, or the local job runs on another machine.
    """
    job_log.record_event(run, "cancel", job.id)
    try:
        if job.is_local:
            local.cancel(run, job)
        else:
            _run_or_raise("scancel", job.id, job=job)
    except SubmitError:
        job_log.record_event(run, "cancel", job.id, refused=True)
        if ended := _find_end(run, job):
            return ended
        raise
    ended = _find_end(run, job)  # scancel accepts a job that has ended (measured)
    if ended in (None, "CANCELLED", scheduler.GONE, local.LOST):
        return None
    job_log.record_event(run, "cancel", job.id, refused=True)
    return ended


def preempt(run: RunDir) -> str:
    """Send CONT and TERM to the tasks of the running job.

    Returns:
        A sentence that says which job got the signals.

    Raises:
        SubmitError: No job of the run is running, or SLURM refused.
    """
    for job in active_jobs(run):
        state = status.query_job(run, job)
        if state.name != "RUNNING":
            continue
        job_log.record_event(run, "signal", job.id, cause="preempted", restart=state.restarts)
        try:
            return _send_preemption(run, job)
        except SubmitError as error:
            if ended := _find_end(run, job):
                got, fix = f"it has just ended ({ended})", f"run `hpcssl-submit status {run.root}`"
                raise SubmitError(f"job {job.id}", got=got, expected="a running job to preempt", fix=fix) from error
            raise
    raise SubmitError(
        f"run {run.root}",
        got="no running job",
        expected="a running job to preempt",
        fix=f"run `hpcssl-submit status {run.root}`, and preempt the run while it is running",
    )


def requeue(run: RunDir) -> str:
    """Let SLURM requeue the running job, or release a job that SLURM holds.

    SLURM ends the job itself and puts it back into the queue; the training saves first. Unlike ``preempt``, this does
    not need a training that answers: one that hangs is killed after SLURM's ``KillWait``.

    Returns:
        A sentence that says what was requested.

    Raises:
        SubmitError: No job of the run is running or held, it is a local one, or SLURM refused.
    """
    for job in active_jobs(run):
        state = status.query_job(run, job)
        is_held = "held" in state.reason.lower()
        if state.name != "RUNNING" and not is_held:
            continue
        if job.is_local:
            raise SubmitError(
                f"job {job.id}",
                got="a local job",
                expected="a job of SLURM, which requeues it",
                fix=f"run `hpcssl-submit preempt {run.root}`: the local supervisor then starts the next attempt",
            )
        if is_held:
            _run_or_raise("scontrol", "release", job.id, job=job)
            return f"Released job {job.id}"
        _run_or_raise("scontrol", "requeue", job.id, job=job)
        return f"Requeued job {job.id}"
    raise SubmitError(
        f"run {run.root}",
        got="no running or held job",
        expected="a job to requeue",
        fix=f"run `hpcssl-submit status {run.root}`; a run that ended continues if it is submitted again",
    )


def active_jobs(run: RunDir) -> list[Job]:
    """Return the queued and running jobs of a run, training first.

    Raises:
        SubmitError: SLURM did not answer.
    """
    jobs = []
    for what, job in job_log.latest_jobs(run).items():
        state = status.query_job(run, job)
        if state.name == "UNKNOWN":
            raise SubmitError(
                f"job {job.id} ({what})",
                got=state.hint,
                expected="an answer of SLURM",
                fix="check that `sinfo` works, then run the command again",
            )
        if state.is_active:
            jobs.append(job)
    return jobs


def _find_replaced_jobs(run: RunDir) -> list[Job]:
    """Queued and running jobs in whose place others were submitted.

    There are some where the file system has no locks between hosts, and two submissions took place at once.
    """
    latest = {job.key for job in job_log.latest_jobs(run).values()}
    older = {job.key: job for job in job_log.all_jobs(run) if job.token and job.key not in latest}
    queued = {cluster: identity.list_tokens(cluster) for cluster in {job.cluster for job in older.values()}}
    candidates = [job for job in older.values() if queued[job.cluster].get(job.token) == job.id]
    return [job for job in candidates if status.query_job(run, job).is_active]


def find_logs(run: RunDir, what: str, rank: int) -> list[Path]:
    """Return the log files of one rank in the newest attempt: standard output, then standard error.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        rank: The rank.

    Raises:
        SubmitError: There are none.
    """
    job = job_log.latest_jobs(run).get(what)
    stem = None
    if job is not None:
        attempts = job_log.read_events(run, "controller", job.id)
        stem = job.id if not job.is_local else attempts[-1]["logs"] if attempts else None
    files = [run.logs / f"{stem}_{rank}_log.{suffix}" for suffix in ("out", "err")]
    existing = [path for path in files if path.exists()]
    if not existing:
        raise SubmitError(
            f"log of {what}, rank {rank}, in {run.logs}",
            got="no such file",
            expected="a job that has started",
            fix=f"run `hpcssl-submit status {run.root}` to see its jobs",
        )
    return existing


def print_tail(path: Path, lines: int, write: Callable[[str], None]) -> int:
    """Write the last lines of a file.

    Args:
        path: The file.
        lines: How many lines.
        write: Called with each line.

    Returns:
        The position after them, in bytes, for ``print_new_lines``.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 200 * (lines + 1)))
        for line in file.read().decode(errors="replace").splitlines()[-lines:]:
            write(line)
        return file.tell()


def print_new_lines(path: Path, position: int, write: Callable[[str], None]) -> int:
    """Write the complete lines after a position in a file.

    Args:
        path: The file.
        position: Where to start, in bytes.
        write: Called with each line.

    Returns:
        The position after the last complete line, in bytes.
    """
    with open(path, "rb") as file:
        file.seek(position)
        body = file.read()
    complete = body[: body.rfind(b"\n") + 1]
    for line in complete.decode(errors="replace").splitlines():
        write(line)
    return position + len(complete)


def _send_preemption(run: RunDir, job: Job) -> str:
    if job.is_local:
        return f"Sent SIGCONT and SIGTERM to {local.preempt(run, job)} tasks of job {job.id}"
    for name in ("CONT", "TERM"):  # without --batch or --full they go to the steps, as in a preemption
        _run_or_raise("scancel", f"--signal={name}", job.id, job=job)
    return f"Sent SIGCONT and SIGTERM to the tasks of job {job.id}"


def _find_end(run: RunDir, job: Job) -> str | None:
    """The state of a job if it is over, else None."""
    state = status.query_job(run, job)
    return None if state.is_active or state.name == "UNKNOWN" else state.name


def _run_or_raise(program: str, *words: str, job: Job) -> None:
    answer = scheduler.run_command(program, *words, cluster=job.cluster)
    if answer.returncode or "Kill job error" in answer.stderr:  # scancel of a forgotten job has the code 0 (measured)
        raise SubmitError(
            f"`{program} {' '.join(words)}`",
            got=" ".join(answer.stderr.split()) or "a refusal without a reason",
            expected="SLURM to accept it",
            fix="check that the job is yours and still in the queue",
        )
