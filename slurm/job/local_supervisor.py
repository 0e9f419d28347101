"""The supervisor of local jobs: ``python -m slurm.job.local_supervisor RUN SUPERVISOR_ID``.

It takes the place of SLURM on one machine: it runs the attempts of its jobs one after the other, and the evaluations
after the training has succeeded. Which attempts follow is decided by the same rules as on SLURM (``retry``).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, HpcsslError
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.storage import folders
from slurm.backend import local, permissions
from slurm.backend.scheduler import GONE, JobState
from slurm.job import concurrent_evals
from slurm.job.attempt_runner import KILL_WAIT_S, POLL_S, AttemptRunner
from slurm.log import attempts, job_log, retry
from slurm.log.job_log import Job
from slurm.manage import lanes, status

LOG = logging.getLogger("hpcssl")
WAIT_POLL_S = 1.0
"""Seconds between two looks at the runs that a run waits for. Many supervisors may wait at once."""


def run_supervisor(run: RunDir, supervisor_id: str) -> int:
    """Run the jobs of a supervisor in order. An evaluation of the last weights waits for the success of the training.

    Args:
        run: The run folder.
        supervisor_id: Id of the supervisor.

    Returns:
        The exit code of the last job that failed, or 0.
    """
    folders.pin_folder(run.root)  # an OSError ends this supervisor: a folder that is moved must not be created again
    stop, code = StopFlag(), EXIT_DONE
    stop.install(signal.SIGINT)
    jobs = local.jobs_of_supervisor(run, supervisor_id)
    if all(job.is_concurrent for job in jobs):
        os.nice(10)  # the training uses the same cores
    while jobs:
        for job in jobs:
            needs_training = job.what != job_log.TRAIN and not job.is_concurrent
            training_code = _wait_for_training(run, job, stop) if needs_training else EXIT_DONE
            if training_code == EXIT_DONE:
                code = run_job(run, job, stop) or code
            else:
                reason = "DependencyNeverSatisfied: the training did not succeed"
                code = _record_job_end(run, job, training_code, reason)
        jobs = concurrent_evals.add_due_jobs(run, supervisor_id) if jobs[0].is_concurrent and not stop.is_set() else []
    return code


def run_job(run: RunDir, job: Job, stop: StopFlag) -> int:
    """Run attempts of one job until it is done, or gets no further attempt.

    Args:
        run: The run folder.
        job: The job.
        stop: The flag of this supervisor.

    Returns:
        The exit code of the job.
    """
    _wait_for_other_runs(run, job, stop)
    while True:
        if stop.is_set():
            return _record_job_end(run, job, EXIT_STOPPED, "the supervisor was stopped")
        if job_log.is_cancelled(run, job.id):
            return _record_job_end(run, job, EXIT_STOPPED, "cancelled")
        runner = AttemptRunner(run, job, attempts.next_number(run, job.what), stop)
        try:
            permissions.check(run.root)
        except (HpcsslError, OSError) as error:
            return _record_job_end(run, job, EXIT_FAILED, str(error))
        runner.start()
        codes = runner.wait()
        LOG.info("%s: attempt %d ended with exit codes %s", job.id, runner.number, codes)
        code = _handle_attempt_end(run, job, runner, codes)
        if code is not None:
            return code


def _handle_attempt_end(run: RunDir, job: Job, runner: AttemptRunner, codes: list[int | None]) -> int | None:
    """Record how an attempt ended. Return the exit code of the job; None if another attempt follows."""
    recorded = attempts.find_attempt(run, job.what, runner.info)
    cause = recorded.cause if recorded is not None else None
    if all(code == EXIT_DONE for code in codes) or cause == "done":
        return _record_job_end(run, job, EXIT_DONE, "")  # what ended a task after that does not matter
    if all(code == EXIT_STOPPED for code in codes):
        return None  # every rank saved and left by itself
    if runner.stop_cause and not cause:
        why = f"the tasks did not save within {KILL_WAIT_S:g} s"
        attempts.record_end(run, job.what, runner.info, runner.stop_cause, why)
        return None
    was_killed = bool(runner.dead_ranks)
    explanation = _describe_exit(codes, runner.dead_ranks)
    decision = retry.decide_after_exit(run, job.what, runner.info, explanation, was_killed=was_killed)
    LOG.info("%s: %s", job.id, decision.reason)
    if decision.retry or job_log.is_cancelled(run, job.id):
        return None
    failures = (code for code in codes if code is not None and code not in (EXIT_DONE, EXIT_STOPPED))
    return _record_job_end(run, job, next(failures, EXIT_FAILED), decision.reason)


def _wait_for_other_runs(run: RunDir, job: Job, stop: StopFlag) -> None:
    """Wait for the end of the runs beside this one that its dependency names, with their evaluations.

    It returns at once after a stop or a cancel. A run that is gone, or whose supervisor died, has ended.
    """
    ids = set(lanes.find_dependencies(job.options))
    folders_beside = [RunDir(path.parent) for path in run.root.parent.glob("*/jobs.jsonl")] if ids else []
    others = [(other, i) for other in folders_beside for i in ids if local.jobs_of_supervisor(other, i)]
    while others and not stop.is_set() and not job_log.is_cancelled(run, job.id):
        others = [(other, i) for other, i in others if local.has_active_job(other, i)]
        if others:
            time.sleep(WAIT_POLL_S)


def _wait_for_training(run: RunDir, job: Job, stop: StopFlag) -> int:
    """Wait for the end of the training, which may have another supervisor. Return its exit code."""
    while not run.finished:
        train = job_log.latest_jobs(run).get(job_log.TRAIN)
        state = status.query_job(run, train) if train else JobState(GONE)
        if not state.is_active:
            return EXIT_STOPPED if state.name == "CANCELLED" else EXIT_FAILED
        if stop.is_set() or job_log.is_cancelled(run, job.id):
            return EXIT_STOPPED
        time.sleep(POLL_S)
    return EXIT_DONE


def _record_job_end(run: RunDir, job: Job, code: int, why: str) -> int:
    job_log.record_event(run, "ended", job.id, code=code, why=why)
    return code


def _describe_exit(codes: list[int | None], dead_ranks: list[int]) -> str:
    dead = dead_ranks or [rank for rank, code in enumerate(codes) if code is None]
    if not dead:
        return f"exit codes {codes}"
    return f"rank {', '.join(map(str, dead))} died without an exit code: killed, perhaps for lack of memory"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    sys.exit(run_supervisor(RunDir(sys.argv[1]), sys.argv[2]))
