"""Concurrent evaluations: submitted by the running training, as soon as there are weights to score.

A job that is submitted beforehand would hold an allocation while it waits for a file. Submitted from inside, a small
job enters the queue when there is something to do. The moment does not matter: ``evaluations.due_requests`` is computed
again at every poll of every attempt, so a poll that a preemption cut short is repeated by the next one, and the
evaluation of the last weights scores what remains.

The training does not wait for any of this. On SLURM a thread of rank 0 polls the run folder and starts a process of its
own for each submission (``python -m slurm.job.concurrent_evals RUN``). For local jobs the training's supervisor polls;
the evaluations then run one after the other, at a lower priority, on GPUs that the training does not use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from hpcssl.cli_runner import print_message
from hpcssl.errors import EXIT_DONE, HpcsslError
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, identity, local
from slurm.backend.profiles import Profile
from slurm.job import bootstrap
from slurm.log import job_log
from slurm.log.job_log import Job
from slurm.manage import evaluations
from slurm.manage.evaluations import EvalRequest

POLL_S = 5.0
RETRY_S = 300.0
"""Seconds until the next poll after a refused submission: a full queue stays full for a while."""
LOCAL_POLL_S = 1.0
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Variables with the devices of this task, which the new job must not inherit."""


def start_polling(run: RunDir) -> None:
    """Start a thread that submits due evaluations until this process ends. For rank 0 of a training on SLURM."""
    threading.Thread(target=_poll, args=(run,), daemon=True, name="concurrent evaluations").start()


def submit_requests(run: RunDir, requests: list[EvalRequest]) -> list[Job]:
    """Submit evaluations to SLURM or to a local supervisor, as the plan says.

    Args:
        run: The run folder. The caller holds ``job_log.submission_lock``.
        requests: Evaluations of ``evaluations.concurrent_requests``.

    Raises:
        SubmitError: sbatch refused.
    """
    plan, options = evaluations.read_plan(run), evaluations.get_sbatch_options(run, requests)
    if not options:
        return []
    if plan["kind"] == "local":
        return local.launch(run, options)
    profile = Profile(**plan["profile"])
    for what, sbatch in options.items():
        batch_script.submit(run, what, sbatch, profile)
    return [job_log.latest_jobs(run)[what] for what in options]


def launch_due(run: RunDir, train: Job) -> None:
    """Start a supervisor for due evaluations, unless one is running or the training uses every GPU.

    Called by the local supervisor of a training.

    Args:
        run: The run folder.
        train: The job of the training.
    """
    if not evaluations.due_requests(run):
        return
    gpus = local.find_spare_gpu(run, train.options)
    earlier = [job for job in job_log.latest_jobs(run).values() if job.is_local and job.is_concurrent]
    if gpus is None or (earlier and local.has_running_supervisor(run, max(earlier, key=lambda job: job.id))):
        return
    with job_log.submission_lock(run):
        if options := evaluations.get_sbatch_options(run, evaluations.due_requests(run)):
            local.launch(run, options, gpus=gpus)


def add_due_jobs(run: RunDir, supervisor_id: str) -> list[Job]:
    """Record what has become due while a local supervisor worked as its next jobs. None after a cancellation.

    Args:
        run: The run folder.
        supervisor_id: Id of the supervisor.
    """
    if any(job_log.is_cancelled(run, job.id) for job in local.jobs_of_supervisor(run, supervisor_id)):
        return []
    with job_log.submission_lock(run):
        options = evaluations.get_sbatch_options(run, evaluations.due_requests(run))
        return [local.record_submission(run, supervisor_id, what, sbatch) for what, sbatch in options.items()]


def _poll(run: RunDir) -> None:
    command = [sys.executable, "-m", "slurm.job.concurrent_evals", str(run.root)]
    bootstrap.block_signals()  # in this thread only, and in what it starts
    while True:
        failed = False
        try:
            if evaluations.due_requests(run):
                failed = subprocess.run(command, stdin=subprocess.DEVNULL).returncode != EXIT_DONE
        except (OSError, ValueError, HpcsslError) as error:
            print_message(f"concurrent evaluations are postponed to the end of the training: {error}")
            failed = True
        time.sleep(RETRY_S if failed else POLL_S)


def main(folder: str) -> int:
    """Submit the due evaluations of a run once, from inside the training's job. Returns the exit code."""
    bootstrap.block_signals()  # a signal between sbatch's answer and its record would leave an unknown job
    for name in DEVICE_VARIABLES:
        os.environ.pop(name, None)
    run = RunDir(folder)
    try:
        with job_log.submission_lock(run):
            identity.record_unrecorded_jobs(run)
            jobs = submit_requests(run, evaluations.due_requests(run))
    except HpcsslError as error:
        print_message(f"concurrent evaluations are postponed: {error}")
        return error.exit_code
    for job in jobs:
        print_message(f"submitted job {job.id} ({job.what})")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
