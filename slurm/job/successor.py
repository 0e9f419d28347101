"""A successor: the job that continues a run where SLURM requeues no jobs.

``python -m slurm.job.successor RUN WHAT JOB`` submits it from inside the old job. It has the same options and waits for
the end of the old one. Jobs that depend on the old job's success are changed to depend on the new one before the old
one ends: otherwise ``--kill-on-invalid-dep`` would cancel them.
"""

from __future__ import annotations

import re
import sys

from hpcssl.cli_runner import print_message
from hpcssl.errors import EXIT_DONE, EXIT_FAILED, HpcsslError
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, identity, scheduler
from slurm.backend.profiles import Profile
from slurm.job import avoidance, bootstrap
from slurm.log import job_log

FULFILLED_OPTIONS = ("dependency", "begin", "hold", "time-min")
"""Options that the old job has fulfilled already."""


def submit_successor(run: RunDir, what: str, job: str) -> str:
    """Submit the successor of a job, unless it has one.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        job: Id of the old job.

    Returns:
        The id of the successor.

    Raises:
        SubmitError: sbatch refused.
    """
    with job_log.submission_lock(run):  # so that no cancel comes in between
        identity.record_unrecorded_jobs(run)  # perhaps the old job itself
        latest = job_log.latest_jobs(run).get(what)
        if latest is not None and latest.id != job:
            if latest.follows == job:  # its submission may have been interrupted before this
                move_dependencies(job, latest.id, latest.cluster)
            return latest.id
        options = {k: v for k, v in (latest.options if latest else {}).items() if k not in FULFILLED_OPTIONS}
        profile = Profile(**latest.profile) if latest and latest.profile else Profile()
        options |= {"dependency": f"afterany:{job}"}
        avoided = avoidance.find_nodes(run, what)
        successor = batch_script.submit(run, what, options, profile, follows=job, avoided=avoided)
        move_dependencies(job, successor, latest.cluster if latest else None)
        return successor


def move_dependencies(old: str, new: str, cluster: str | None = None) -> list[str]:
    """Make every queued job that depends on the end of ``old`` depend on ``new``.

    Args:
        old: Id of the old job.
        new: Id of its successor.
        cluster: The cluster, where the jobs were submitted with ``--clusters``.

    Returns:
        The ids of the changed jobs.
    """
    moved = []
    queue = scheduler.run_command("squeue", "-h", "-t", "PD", "-o", "%i|%E", cluster=cluster)
    for line in queue.stdout.splitlines():
        child, _, dependency = line.strip().partition("|")
        dependency = re.sub(r"\([^)]*\)", "", dependency)  # (unfulfilled)
        changed = re.sub(rf"\b(afterok|afternotok|afterany):((?:\d+:)*){old}\b", rf"\1:\g<2>{new}", dependency)
        if child == new or changed == dependency:
            continue
        words = ("update", f"jobid={child}", f"dependency={changed}")
        answer = scheduler.run_command("scontrol", *words, cluster=cluster)
        if answer.returncode:
            error = " ".join(answer.stderr.split())
            print_message(
                f"job {child} still depends on {old} instead of {new}: {error}. Fix: scontrol {' '.join(words)}"
            )
        else:
            moved.append(child)
    return moved


def main(folder: str, what: str, job: str) -> int:
    """Submit the successor of a job, and print the result for the job's log. Returns the exit code."""
    bootstrap.block_signals()  # a signal between sbatch's answer and its record would leave an unknown job
    try:
        successor = submit_successor(RunDir(folder), what, job)
    except HpcsslError as error:
        print_message(f"job {job} cannot be requeued here, and no other job could be submitted: {error}")
        return EXIT_FAILED
    print_message(f"job {job} cannot be requeued here: job {successor} continues the run")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
