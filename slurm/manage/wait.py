"""Following jobs to their end, for ``hpcssl-submit --wait``: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from hpcssl.run_dir import RunDir
from hpcssl.terminal.progress import ProgressBar, format_scalar, select_scalars
from slurm.backend.scheduler import JobState
from slurm.log import attempts, job_log
from slurm.log.job_log import Job
from slurm.manage import status

LOCAL_POLL_S = 0.5
SLURM_POLL_S = 5.0  # longer, since the controller answers the questions of all users


def wait_for_jobs(
    run: RunDir,
    write: Callable[[str], None],
    on_poll: Callable[[], None] = lambda: None,
    jobs: Collection[Job] | None = None,
) -> int:
    """Follow jobs to their end, one after the other.

    Args:
        run: The run folder.
        write: Called with each line of progress, if there is no terminal.
        on_poll: Called at each poll of the training.
        jobs: The jobs; by default the newest of the training and of each evaluation. Concurrent evaluations that are
            submitted meanwhile are followed as well.

    Returns:
        The exit code of the training, or of the first evaluation that failed.
    """
    progress, code = _Progress(run, write), EXIT_DONE
    pending = list(job_log.latest_jobs(run).values() if jobs is None else jobs)
    followed: set[tuple[str, str]] = set()
    earlier = {job.key for job in job_log.latest_jobs(run).values()}
    while pending:
        job = pending.pop(0)
        followed.add(job.key)
        state = _follow(run, job, progress, on_poll)
        if (successor := job_log.find_successor(run, job)) is not None:
            pending.insert(0, successor)
            continue
        if job.what == job_log.TRAIN:
            progress.close()
        code = code or _exit_code(run, job, state)
        if not pending:
            pending = [
                job
                for job in job_log.latest_jobs(run).values()
                if job.is_concurrent
                and job.key not in followed
                and (job.key not in earlier or status.query_job(run, job).is_active)
            ]
    return code


def _follow(run: RunDir, job: Job, progress: _Progress, on_poll: Callable[[], None]) -> JobState:
    """Poll a job until it has ended. Return its last state."""
    while True:
        state = status.query_job(run, job)
        progress.show_state(job, state)
        if job.what == job_log.TRAIN:
            progress.update()
            on_poll()
        if not state.is_active and state.name != "UNKNOWN":
            return state
        time.sleep(LOCAL_POLL_S if job.is_local else SLURM_POLL_S)


class _Progress:
    """A bar on a terminal; elsewhere a line per state, per attempt and per tenth of the training."""

    def __init__(self, run: RunDir, write: Callable[[str], None]):
        self.run, self._write = run, write
        self._last_state = ""
        self._tenth, self._attempts = -1, 0
        self._bar: ProgressBar | None = None
        if sys.stderr.isatty():
            self._bar = ProgressBar(status.total_steps(run), first=status.current_step(run))

    def write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            self._write(text)

    def show_state(self, job: Job, state: JobState) -> None:
        text = f"{job.what} {job.id}: {state.name}" + (f" ({state.reason})" if state.reason else "")
        if text != self._last_state:
            self.write(text + (f"; {state.hint}" if state.hint else ""))
            self._last_state = text

    def update(self) -> None:
        history = attempts.read_attempts(self.run)
        for k in range(self._attempts, len(history)):
            previous_end = f" ({status.describe_last_end(history[:k])})" if k else ""
            self.write(f"attempt {history[k].number} starts at step {history[k].first_step}{previous_end}")
        self._attempts = len(history)
        if not history:
            return
        step, total = status.current_step(self.run), status.total_steps(self.run)
        if self._bar is not None:
            self._bar.update(step, _read_scalars(self.run), total)
        elif total and step * 10 // total > self._tenth:
            self._tenth = step * 10 // total
            scalars = "  ".join(format_scalar(name, value) for name, value in _read_scalars(self.run).items())
            self.write(f"step {step} of {total}  {scalars}".rstrip())

    def close(self) -> None:
        self.update()
        if self._bar is not None:
            self._bar.close()


def _read_scalars(run: RunDir) -> dict[str, str]:
    return select_scalars(attempts.read_last_record(run.journal))


def _exit_code(run: RunDir, job: Job, state: JobState) -> int:
    if state.name == "COMPLETED" or (job.what == job_log.TRAIN and run.finished):
        return EXIT_DONE
    if state.name == "CANCELLED":
        return EXIT_STOPPED
    return state.exit_code or EXIT_FAILED
