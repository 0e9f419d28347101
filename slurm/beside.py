"""Evaluations beside a training: submitted from the running job, as soon as there are weights to score.

A job submitted beforehand would have to hold an allocation while it waits for a file; from inside, a small job enters
the queue when there is something to do. Nothing hangs on the moment: ``chain.due`` is asked anew by every look of
every attempt, so a look that a preemption cut short is made up for by the next one, and the evaluation of the last
weights takes what is left. The training is not held up: on SLURM a thread of rank 0 looks into the run folder and
leaves the submission to a process of its own; on this machine the training's supervisor looks, and the evaluations
run one after the other, at a lower priority, and on GPUs that the training does not use.

``python -m slurm.beside RUN`` is one look, inside a job.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from hpcssl.errors import EXIT_DONE, HpcsslError
from hpcssl.files import RunDir
from slurm import chain, local, records, script, start
from slurm.cluster import Profile

POLL_S = 5.0
PATIENCE_S = 300.0
"""Until the next try after a refusal: a full queue stays full for a while."""
LOCAL_POLL_S = 1.0
BOUND = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""What SLURM says of a task's own devices, which are not those of the next job."""


def follow(run: RunDir) -> None:
    """Look for what is due until this process ends. For rank 0 of a training on SLURM."""
    threading.Thread(target=_look_again, args=(run,), daemon=True, name="evaluations beside").start()


def submit(run: RunDir, entries: list[chain.Entry]) -> list[records.Job]:
    """Hand these to SLURM or to a supervisor, as the plan says. Who calls it holds ``records.locked``."""
    plan, wanted = chain.read(run), chain.jobs_of(run, entries)
    if not wanted:
        return []
    if plan["kind"] == "local":
        return local.launch(run, wanted)
    profile = Profile(**plan["profile"])
    return [records.Job(script.submit(run, what, sbatch, profile), what, "slurm", sbatch)
            for what, sbatch in wanted.items()]


def launch_due(run: RunDir, train: records.Job) -> None:
    """One look of the local supervisor of a training: start another supervisor where something is due, there is
    room, and none is at work."""
    if not chain.due(run):
        return
    gpus = local.spare_gpus(run, train.options)
    before = [job for job in records.submitted(run).values() if job.local and job.beside]
    if gpus is None or (before and local.supervised(run, max(before, key=lambda job: job.job))):
        return
    with records.locked(run):
        if wanted := chain.jobs_of(run, chain.due(run)):
            local.launch(run, wanted, gpus=gpus)


def more(run: RunDir, base: str) -> list[records.Job]:
    """What has become due while a local supervisor worked, now its own jobs. None after a cancel."""
    if any(records.cancelled(run, job.job) for job in local.of_base(run, base)):
        return []
    with records.locked(run):
        return [local.note(run, base, what, sbatch)
                for what, sbatch in chain.jobs_of(run, chain.due(run)).items()]


def _look_again(run: RunDir) -> None:
    command = [sys.executable, "-m", "slurm.beside", str(run.root)]
    start.hold()  # of this thread alone, and of what it starts
    while True:
        refused = False
        try:
            refused = bool(chain.due(run)) and subprocess.run(command, stdin=subprocess.DEVNULL).returncode != EXIT_DONE
        except (OSError, ValueError, HpcsslError) as error:
            _say(f"evaluations beside the training wait for its end: {error}")
            refused = True
        time.sleep(PATIENCE_S if refused else POLL_S)


def _say(sentence: str) -> None:
    sys.stderr.write(f"hpcssl: {sentence}\n")
    sys.stderr.flush()


def main(folder: str) -> int:
    start.hold()  # a signal between sbatch's answer and its note would leave a job that nobody knows
    for name in BOUND:
        os.environ.pop(name, None)
    run = RunDir(folder)
    try:
        with records.locked(run):
            jobs = submit(run, chain.due(run))
    except HpcsslError as error:
        _say(f"evaluations beside the training wait: {error}")
        return error.exit_code
    for job in jobs:
        _say(f"submitted job {job.job} ({job.what})")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
