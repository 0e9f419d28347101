"""Why an attempt was stopped, and asking for the next one: by rank 0 of the stopped ranks, or by the batch script.

The cause is what whoever sent the signal has noted in the run folder, else what SLURM says of the job and its nodes;
a signal that nobody explains is ``stopped``. Where SLURM refuses a requeue (JobRequeue=0, a site that strips
``--requeue``), another job takes over (``successor``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from hpcssl.errors import EXIT_DONE
from hpcssl.files import RunDir
from hpcssl.signals import Requeue
from slurm import attempts, records, sched, shape, start

ATTEMPT, LOCAL_JOB = "HPCSSL_ATTEMPT", "HPCSSL_LOCAL_JOB"
"""What the local supervisor tells its tasks."""
EARLY_S = 75
"""How much earlier than its lead the warning of the time limit may have come: SLURM's minute, and time to save."""
SUCCESSOR_S = 120


def after_stop(run: RunDir, what: str, attempt: dict, signals: list[str]) -> Requeue:
    """Why these signals came to the attempt, and whether another one was granted."""
    job = attempt["job"]
    if LOCAL_JOB in os.environ:
        cause = "cancelled" if records.cancelled(run, job) else _noted(run, attempt) or "stopped"
        # the supervisor starts the next attempt when all have left with 75
        return Requeue(cause, "the job was cancelled" if cause == "cancelled" else None)
    for patience_s in (0, 1):  # the signal may be faster than what SLURM says of it (seen without a grace time)
        time.sleep(patience_s)
        now = sched.ask_quietly(job)
        cause = explain(run, what, attempt, now, signals, int(os.environ.get("SLURM_JOB_NUM_NODES", 1)))
        if cause != "stopped":
            break
    return Requeue(cause, ask(run, what, attempt, now, cause))


def explain(run: RunDir, what: str, attempt: dict, now: sched.State, signals: list[str], nodes: int = 0) -> str:
    """One of ``cancelled preempted node_fail timeout stopped``. ``now``: the job as SLURM sees it; ``nodes``: see
    ``sched.cause``."""
    if records.cancelled(run, attempt["job"]):
        return "cancelled"
    told = sched.cause(now, attempt["restart"], nodes) or _noted(run, attempt)
    if told:
        return told
    mine = records.submitted(run).get(what)
    name, lead = shape.signal(mine.options if mine else {})
    warned = any(s == f"SIG{name}" for s in signals) and now.left_s is not None and now.left_s <= lead + EARLY_S
    return "timeout" if warned else "stopped"


def ask(run: RunDir, what: str, attempt: dict, now: sched.State, cause: str) -> str | None:
    """Ask SLURM for another attempt: None if there will be one, else why not."""
    job = attempt["job"]
    if cause == "cancelled":
        return "the job was cancelled"
    if now.restarts > attempt["restart"]:
        return None  # SLURM requeued it by itself, perhaps long ago: to ask again would end what runs now
    refused = sched.requeue(job) if now.requeue else sched.DISABLED
    if refused is None or sched.DISABLED not in refused:
        return refused
    words = [sys.executable, "-m", "slurm.successor", str(run.root), what, job]
    start.hold()  # a mask outlives fork and exec: signals come more than once, and to every process of a step
    try:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   text=True)
    finally:
        start.release()
    try:
        said = process.communicate(timeout=SUCCESSOR_S)[1]
    except subprocess.TimeoutExpired:
        return f"no job could take over within {SUCCESSOR_S} s, and SLURM requeues none: {refused}"
    sys.stderr.write(said)
    return None if process.returncode == EXIT_DONE else " ".join(said.split())[-300:] or "no job could take over"


def explain_before(run: RunDir, what: str, attempt: dict) -> None:
    """Before an attempt begins on SLURM: whether the one before it ended because a node was lost, which nobody could
    write down, or which looked like a crash to the ranks that were left."""
    past = [a for a in attempts.history(run, what) if a.number < attempt["attempt"]]
    mine = records.submitted(run).get(what)
    ours = (attempt["job"], mine.follows if mine else None)
    if LOCAL_JOB in os.environ or not past or past[-1].job not in ours or not past[-1].time:
        return
    if past[-1].cause is None or past[-1].crashed:
        lost = sched.lost_nodes(past[-1].host, past[-1].time)
        if lost:
            attempts.end(run, what, {"attempt": past[-1].number}, "node_fail", f"lost {' and '.join(lost)}")
        elif past[-1].cause is None:
            attempts.end(run, what, {"attempt": past[-1].number}, "lost", "no word from it, and its nodes live")


def _noted(run: RunDir, attempt: dict) -> str | None:
    """What a person or the local supervisor noted before signalling this attempt."""
    sent = [x["cause"] for x in records.of(run, "signal", attempt["job"]) if x["restart"] == attempt["restart"]]
    return sent[-1] if sent else None
