"""Another attempt inside the same allocation.

A requeue gives the nodes back: the next attempt waits for two minutes at best, and for hours on a busy cluster. After a
crash the nodes are usually fine, so the batch script starts the tasks again itself. With spare nodes it also does so
after the loss of a node. The rules of ``retry`` decide whether there is another attempt at all; this module decides
where it runs.
"""

from __future__ import annotations

from typing import Any

from hpcssl.run_dir import RunDir
from slurm.backend import resources, scheduler
from slurm.job import avoidance, step_nodes
from slurm.job.requeue import WARNING_MARGIN_S
from slurm.log import avoided_nodes, job_log
from slurm.log.attempts import Attempt
from slurm.log.launches import STEP_WAIT_S


def explain_refusal(run: RunDir, what: str, attempt: Attempt, state: scheduler.JobState) -> str | None:
    """Return why the next attempt cannot start in this allocation; None if it can.

    An attempt that crashed before it made a new step is not repeated at once: the nodes or the file system may be the
    cause, and a requeue gives both time. This also bounds the number of launches: each of them makes progress, or
    has lost a node.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: The attempt that has ended.
        state: The job as SLURM reports it now.
    """
    if what != job_log.TRAIN:
        return "only a training starts again in its allocation"
    if not attempt.is_crash and attempt.cause != "node_fail":
        return f"it was not a crash ({attempt.cause})"
    if attempt.is_crash and (attempt.last_step is None or attempt.last_step <= attempt.first_step):
        return "the attempt made no step"
    if state.name != "RUNNING" or state.preempted or state.restarts != attempt.restart:
        return f"SLURM does not report it as running ({state.name})"
    job = job_log.latest_jobs(run).get(what)
    if job is not None and job.key != attempt.job_key:
        return f"job {job.id} continues the run"
    options = job.options if job else {}
    needed = resources.get_warning_signal(options)[1] + WARNING_MARGIN_S
    if state.remaining_s is not None and state.remaining_s <= needed:
        return (
            f"{state.remaining_s} s are left of the time limit, and more than {needed} s are needed to start and save"
        )
    if attempt.cause != "node_fail":
        return None if resources.count_spare_nodes(options) else _explain_replacement(run, what, attempt)
    usable, count = step_nodes.find_usable_nodes(attempt.job), resources.count_nodes(options)
    if resources.count_spare_nodes(options) and len(usable) >= count:
        return None
    return f"{attempt.error}, and no spare node is left"


def explain_failed_launch(attempt: dict[str, Any]) -> str:
    """Return why no task of an attempt began, if SLURM did not start the step; else an empty string.

    Args:
        attempt: The attempt, from ``task.describe_attempt``, of which nothing was recorded.
    """
    if not attempt["launch"]:
        return ""
    steps = scheduler.run_command("squeue", "--steps", "--noheader", "--format=%i", "--jobs", attempt["job"]).stdout
    held = [step for step in steps.split() if step.rpartition(".")[2].isdigit()]
    if not held:
        return ""
    return f"SLURM did not start its step within {STEP_WAIT_S} s: step {' and '.join(held)} still has the nodes"


def _explain_replacement(run: RunDir, what: str, attempt: Attempt) -> str | None:
    """Why a requeue is better: other nodes can take the place of one that the attempt blames. None if it is not."""
    blamed = avoided_nodes.find_blamed_nodes(attempt)
    avoided = avoidance.find_nodes(run, what) if blamed else {}
    names = [node for node in blamed if node in avoided]
    return f"{' and '.join(names)} is to blame, and another node can take its place" if names else None
