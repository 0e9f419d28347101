"""Faults of the environment of a job: its limits, its nodes' states, its priority, memory, and slow processes.

Each function injects one fault, and returns what was hit.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.chaos.commands import StuckError
from benchmarks.chaos.faults import require_tasks
from benchmarks.chaos.plan import Fault
from benchmarks.chaos.session import TargetMissing, TrainingSession
from slurm.log import job_log

PTRACE_ATTACH, PTRACE_DETACH = 16, 17
LATE_S = 12.0
"""How long a rank is late; less than the 30 s after which the soak's training counts as hung."""
SUSPENDED_S = 35.0
"""How long a job is suspended; more than the 30 s after which the soak's training counts as hung."""
SUBMISSIONS = 4
"""Submissions at the same time; each of them imports torch."""


def change_time_limit(session: TrainingSession, fault: Fault) -> str:
    """Shorten the time limit to some value that is still far away, and extend it again."""
    require_tasks(session)
    session.cluster("scontrol", "update", f"jobid={session.job}", f"TimeLimit={30 + int(20 * fault.share)}")
    session.cluster("scontrol", "update", f"jobid={session.job}", "TimeLimit=60")
    return "the job"


def hold_requeued_job(session: TrainingSession, fault: Fault) -> str:
    """Requeue the job into the held state, and release it some seconds later."""
    require_tasks(session)
    session.cluster("scontrol", "requeuehold", session.job)
    session.cluster.wait_until(lambda: session.cluster.field(session.job, "JobState") == "PENDING", "held job", 120)
    time.sleep(1 + fault.share)
    session.cluster("scontrol", "release", session.job)
    return "the job"


def restart_controller_during_requeue(session: TrainingSession, fault: Fault) -> str:
    """Stop all ranks by a signal, and kill the controller before they can request the requeue."""
    pids = require_tasks(session)
    session.cluster.processes["slurmctld"].kill()
    session.send_signal(*pids.values(), number=signal.SIGTERM)
    time.sleep(1 + fault.share)
    session.cluster.restart("slurmctld")
    return "the controller"


def delay_one_rank(session: TrainingSession, fault: Fault) -> str:
    """Stop one rank for a while."""
    pid = require_tasks(session)[fault.rank]
    session.send_signal(pid, number=signal.SIGSTOP)
    time.sleep(LATE_S)
    session.send_signal(pid, number=signal.SIGCONT)
    return f"rank {fault.rank}"


def trace_one_rank(session: TrainingSession, fault: Fault) -> str:
    """Attach to one rank as a debugger does, and let it go again after some seconds.

    Raises:
        StuckError: The kernel does not allow it.
    """
    pid = require_tasks(session)[fault.rank]
    library = ctypes.CDLL(None, use_errno=True)
    if library.ptrace(PTRACE_ATTACH, pid, None, None):
        raise StuckError(f"ptrace of rank {fault.rank}: {os.strerror(ctypes.get_errno())}")
    os.waitpid(pid, 0x40000000)  # __WALL
    time.sleep(1 + fault.share)
    library.ptrace(PTRACE_DETACH, pid, None, None)
    return f"rank {fault.rank}"


def limit_memory(session: TrainingSession, fault: Fault) -> str:
    """Allow one rank no more address space than it has now, so that its next large allocation fails."""
    pid = require_tasks(session)[fault.rank]
    used = re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert used is not None  # a running process has a size
    resource.prlimit(pid, resource.RLIMIT_AS, (int(used[1]) * 1024, resource.RLIM_INFINITY))
    return f"rank {fault.rank}"


def submit_many_times(session: TrainingSession, _fault: Fault) -> str:
    """Submit the running training several times at once. None of them may submit a second job.

    Raises:
        StuckError: One of them did.
    """
    require_tasks(session)
    before = len(job_log.all_jobs(session.run))
    words = session.commands.submission(session.run)
    submissions = [
        subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(SUBMISSIONS)
    ]
    output = [process.communicate(timeout=300)[0] for process in submissions]
    if len(job_log.all_jobs(session.run)) > before and not session.is_finished:
        raise StuckError(f"a running training was submitted again: {' '.join(output)[-300:]}")
    return f"{SUBMISSIONS} submissions"


def suspend_job(session: TrainingSession, fault: Fault) -> str:
    """Suspend the job for longer than its ranks may be without progress, and resume it.

    Raises:
        StuckError: SLURM does not suspend it.
    """
    require_tasks(session)
    session.cluster("scontrol", "suspend", session.job)
    try:
        if session.cluster.field(session.job, "JobState") != "SUSPENDED":
            raise StuckError("the job was not suspended")
        time.sleep(SUSPENDED_S + fault.share)
    finally:
        session.cluster("scontrol", "resume", session.job)
    return "the job"


def cancel_step(session: TrainingSession, _fault: Fault) -> str:
    """Cancel the step that runs the tasks, and not its job."""
    require_tasks(session)
    steps = session.cluster("squeue", "-h", "-s", "-j", session.job, "-o", "%i").split()
    numbered = [step for step in steps if step.partition(".")[2].isdigit()]
    if not numbered:
        raise TargetMissing
    session.cluster("scancel", numbered[-1])
    return f"step {numbered[-1]}"


def use_copied_folder(session: TrainingSession, _fault: Fault) -> str:
    """Copy the run folder, and preempt and cancel the run that the copy holds. The job is not that of the copy.

    Raises:
        StuckError: A command was accepted.
    """
    require_tasks(session)
    copy = session.run.root.with_name(f"{session.run.root.name}-copy")
    try:
        shutil.copytree(session.run.root, copy, ignore=shutil.ignore_patterns("checkpoints", "code"))
        for command in ("preempt", "cancel"):
            words = [sys.executable, "-m", "slurm", command, str(copy)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300)
            if done.returncode == 0 or "Fix:" not in done.stderr:
                raise StuckError(f"{command} of a copied run folder: {done.stdout}{done.stderr.strip()[-300:]}")
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return "a copy of the run folder"
