"""Why an attempt was stopped, and the request for the next one.

After a stop by a signal, rank 0 asks for the next attempt (``handle_stop``); after a crash the batch script does
(``epilogue``). The cause is what the sender of the signal recorded in the run folder, or else what SLURM reports about
the job and its nodes; without either it is ``stopped``. Where SLURM refuses to requeue (``JobRequeue=0``, a site that
removes ``--requeue``), another job continues the run (``successor``).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from typing import Any

from hpcssl.errors import EXIT_DONE
from hpcssl.run_dir import RunDir
from hpcssl.signals import Requeue, hold_signals
from hpcssl.timing.uptime import to_unix_time
from slurm.backend import resources, scheduler
from slurm.job import avoidance, bootstrap
from slurm.log import attempts, job_log
from slurm.log.attempts import Attempt

ATTEMPT_VARIABLE, LOCAL_JOB_VARIABLE = "HPCSSL_ATTEMPT", "HPCSSL_LOCAL_JOB"
"""Environment variables with the number of the attempt and the job id, set for the tasks of local jobs only."""
WARNING_MARGIN_S = 75
"""How many seconds before its lead the warning of the time limit may arrive: up to 60 by SLURM, and time to save."""
SUCCESSOR_TIMEOUT_S = 300  # sbatch alone may take 120 s, and squeue 60 s before and after it


def handle_stop(run: RunDir, what: str, attempt: dict[str, Any], signals: list[str]) -> Requeue:
    """Determine why an attempt was stopped, and ask for the next one. Called by rank 0 after the state was saved.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: The attempt, from ``task.describe_attempt``.
        signals: Names of the signals that the ranks got, such as ``SIGTERM``.
    """
    job = attempt["job"]
    if LOCAL_JOB_VARIABLE in os.environ:
        cause = "cancelled" if job_log.is_cancelled(run, job) else _recorded_cause(run, attempt) or "stopped"
        # the supervisor starts the next attempt when all tasks have left with code 75
        return Requeue(cause, "the job was cancelled" if cause == "cancelled" else None)
    for pause_s in (0, 1):  # without a grace time the signal may arrive before SLURM shows its reason
        time.sleep(pause_s)
        state = scheduler.query_job_or_unknown(job)
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))  # all run tasks: the other ranks wait for this one
        cause = determine_cause(run, what, attempt, state, signals, nodes)
        if cause != "stopped":
            break
    return Requeue(cause, request_next_attempt(run, what, attempt, state, cause))


def determine_cause(
    run: RunDir,
    what: str,
    attempt: dict[str, Any],
    state: scheduler.JobState,
    signals: list[str],
    nodes: int = 0,
) -> str:
    """Determine why an attempt was stopped.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: The attempt.
        state: The job as SLURM reports it now.
        signals: Names of the signals that arrived.
        nodes: See ``scheduler.infer_cause``.

    Returns:
        ``cancelled``, ``preempted``, ``node_fail``, ``timeout`` or ``stopped``.
    """
    if job_log.is_cancelled(run, attempt["job"]):
        return "cancelled"
    cause = scheduler.infer_cause(state, attempt["restart"], nodes) or _recorded_cause(run, attempt)
    if cause:
        return cause
    job = job_log.latest_jobs(run).get(what)
    name, lead = resources.get_warning_signal(job.options if job else {})
    is_warning = f"SIG{name}" in signals
    is_late = state.remaining_s is not None and state.remaining_s <= lead + WARNING_MARGIN_S
    return "timeout" if is_warning and is_late else "stopped"


def request_next_attempt(
    run: RunDir, what: str, attempt: dict[str, Any], state: scheduler.JobState, cause: str
) -> str | None:
    """Ask SLURM to requeue the job; where it requeues nothing, submit another job that continues the run.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: The attempt that has ended or is about to.
        state: The job as SLURM reports it now.
        cause: Why it ended.

    Returns:
        None if another attempt will follow, else the reason why not.
    """
    job = attempt["job"]
    if cause == "cancelled":
        return "the job was cancelled"
    if state.name == scheduler.GONE:
        return "SLURM no longer knows this job"  # its number may be that of another job, which must not be requeued
    lost = str(attempt.get("host", "")) if cause == "node_fail" else ""
    if state.restarts > attempt["restart"]:  # another requeue would end the attempt that runs now
        with hold_signals():  # TERM may be on its way
            avoidance.exclude(run, what, job, avoidance.find_nodes(run, what, lost))
        return None
    if state.requeue_enabled:
        refusal = avoidance.requeue_and_exclude(run, what, job, lost)
    else:
        refusal = scheduler.REQUEUE_DISABLED
    if refusal is None or scheduler.REQUEUE_DISABLED not in refusal:
        return refusal
    return _start_successor(run, what, job, refusal)


def record_previous_end(run: RunDir, what: str, attempt: dict[str, Any]) -> None:
    """Record that the previous attempt ended because a node was lost. Called before an attempt on SLURM begins.

    A lost node cannot record its own end, and the remaining ranks see its loss as a crash. An open attempt whose nodes
    are all up gets the cause ``lost``.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: The attempt that begins.
    """
    job, own = job_log.latest_jobs(run).get(what), (attempt["job"], attempt.get("token", ""))
    earlier = [
        other
        for other in attempts.read_attempts(run, what)
        if other.number < attempt["attempt"]
        and (other.job_key == own or (job is not None and other.job == job.follows))  # not one that was refused
    ]
    if LOCAL_JOB_VARIABLE in os.environ or not earlier or not earlier[-1].time:
        return
    previous = earlier[-1]
    if previous.cause is not None and not previous.is_crash:
        return
    steps = job_log.read_events(run, "step", previous.job)
    if any((step["what"], step["attempt"]) == (what, previous.number) for step in steps):
        return  # its batch script survived it, and has looked at the nodes
    lost = scheduler.find_lost_nodes(previous.host, previous.time, only_down=previous.is_explained)
    if lost:
        attempts.record_end(run, what, {"attempt": previous.number}, "node_fail", f"lost {' and '.join(lost)}")
    elif previous.cause is None:
        attempts.record_end(
            run, what, {"attempt": previous.number}, "lost", "it left no record, and SLURM reports no lost node"
        )


def record_removed_nodes(run: RunDir, what: str, attempt: dict[str, Any], recorded: Attempt | None) -> None:
    """Record that an attempt ended because of lost nodes, if its job continues without some of them.

    After ``--no-kill`` SLURM takes lost nodes out of the allocation, and they may be up again at once. A node whose
    daemon was only restarted is not lost: the tasks have reported their ends.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: The attempt, which has ended, from ``task.describe_attempt``. Its job runs.
        recorded: What was recorded of it; None if nothing was.
    """
    if recorded is not None and not (recorded.cause is None or recorded.is_crash):
        return
    host, left = recorded.host if recorded is not None else attempt["host"], scheduler.list_nodes(attempt["job"])
    is_explained = recorded is not None and recorded.is_explained
    lost = list(scheduler.find_lost_nodes(host, math.inf, only_down=is_explained))
    lost += [node for node in scheduler.expand_nodes(host) if left and node not in [*left, *lost]]
    if lost:
        attempts.record_end(run, what, attempt, "node_fail", f"lost {' and '.join(lost)}")


def _start_successor(run: RunDir, what: str, job: str, refusal: str) -> str | None:
    words = [sys.executable, "-m", "slurm.job.successor", str(run.root), what, job]
    # the child inherits the blocked signals: they come more than once, and to every process of a step
    bootstrap.block_signals()
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    finally:
        bootstrap.unblock_signals()
    try:
        message = process.communicate(timeout=SUCCESSOR_TIMEOUT_S)[1]
    except subprocess.TimeoutExpired:
        return f"SLURM does not requeue ({refusal}), and no other job was submitted within {SUCCESSOR_TIMEOUT_S} s"
    sys.stderr.write(message)
    if process.returncode == EXIT_DONE:
        return None
    return " ".join(message.split())[-300:] or "no other job could be submitted"


def _recorded_cause(run: RunDir, attempt: dict[str, Any]) -> str | None:
    """The cause that a user's command or the local supervisor recorded before it signaled this attempt."""
    events = job_log.read_events(run, "signal", attempt["job"])
    began = attempt.get("began", 0)  # a signal before an earlier launch of the same allocation is not for this one
    causes = [
        str(event["cause"])
        for event in events
        if event["restart"] == attempt["restart"] and to_unix_time(event.get("time")) >= began
    ]
    return causes[-1] if causes else None
