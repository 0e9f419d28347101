"""What a person does to a run that was submitted: cancel it, preempt it, read its logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpcssl.errors import SubmitError
from hpcssl.files import RunDir
from slurm import local, records, sched, watch


def cancel(run: RunDir) -> list[str]:
    """End every living job of the run; their ids."""
    with records.locked(run):  # nothing is submitted meanwhile
        ended = [job.job for job in reversed(living(run)) if end(run, job)]  # what is chained on another goes first
    if not ended:
        raise SubmitError(f"run {run.root}", got="no job in the queue", expected="a job to cancel",
                          mend=f"see `hpcssl-submit status {run.root}`")
    return ended[::-1]


def end(run: RunDir, job: records.Job) -> bool:
    """End one job for good. The intent is noted first, so that no rank asks for a requeue, and taken back if SLURM
    refuses: the job lives on, and shall go on after a preemption."""
    records.note(run, "cancel", job.job)
    try:
        if job.local:
            local.cancel(run, job)
        else:
            _must("scancel", job.job, job=job)
    except SubmitError:
        records.note(run, "cancel", job.job, refused=True)
        raise
    return True


def preempt(run: RunDir) -> str:
    """Send CONT and TERM to the tasks of the job that runs now; one sentence that says to whom."""
    for job in living(run):
        state = watch.state_of(run, job)
        if state.name != "RUNNING":
            continue
        records.note(run, "signal", job.job, cause="preempted", restart=state.restarts)
        if job.local:
            count = local.preempt(run, job)
            return f"Sent SIGCONT and SIGTERM to {count} tasks of job {job.job}"
        for name in ("CONT", "TERM"):  # without --batch or --full: to the steps, as a preemption does it
            _must("scancel", f"--signal={name}", job.job, job=job)
        return f"Sent SIGCONT and SIGTERM to the tasks of job {job.job}"
    raise SubmitError(f"run {run.root}", got="no job that runs", expected="a running job to preempt",
                      mend=f"see `hpcssl-submit status {run.root}`, and preempt it while it runs")


def logs(run: RunDir, what: str, rank: int) -> list[Path]:
    """The log files of one rank of a job's newest attempt: output, then errors. Raises ``SubmitError``."""
    job = records.submitted(run).get(what)
    stem = None
    if job is not None:
        started = records.of(run, "controller", job.job)
        stem = job.job if not job.local else started[-1]["logs"] if started else None
    files = [run.logs / f"{stem}_{rank}_log.{kind}" for kind in ("out", "err")]
    found = [path for path in files if path.exists()]
    if not found:
        raise SubmitError(f"log of {what}, rank {rank}, in {run.logs}", got="no such file",
                          expected="a job that has started", mend=f"see `hpcssl-submit status {run.root}`")
    return found


def tail(path: Path, lines: int, say: Callable[[str], None]) -> int:
    """Say the last lines of a file; the position after them."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 200 * (lines + 1)))
        for line in file.read().decode(errors="replace").splitlines()[-lines:]:
            say(line)
        return file.tell()


def since(path: Path, place: int, say: Callable[[str], None]) -> int:
    """Say whole lines from a position on; the position after them."""
    with open(path, "rb") as file:
        file.seek(place)
        body = file.read()
    whole = body[: body.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        say(line)
    return place + len(whole)


def living(run: RunDir) -> list[records.Job]:
    """Jobs of the run that are queued or running, training first."""
    return [job for job in records.submitted(run).values() if watch.state_of(run, job).live]


def _must(program: str, *words: str, job: records.Job) -> None:
    answer = sched.call(program, *words, cluster=job.cluster)
    if answer.returncode:
        raise SubmitError(f"`{program} {' '.join(words)}`", got=" ".join(answer.stderr.split()) or "a refusal",
                          expected="SLURM to do it", mend="see whether the job is yours and still in the queue")
