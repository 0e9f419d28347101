"""The local twin of SLURM, seen from the doors: start a supervisor, ask after it, signal its tasks, cancel it.

The supervisor (``supervise``) leads a process session of its own and outlives the terminal; what it is doing is read
from ``jobs.jsonl`` and from /proc, never from a file that could go stale.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

from hpcssl import launch as places
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, SubmitError
from hpcssl.files import RunDir
from slurm import procs, records, sched, shape, start
from slurm.script import outside_any_job

LOST = "LOST"
"""State of a local job whose supervisor died before its end: nobody starts another attempt."""


def launch(run: RunDir, wanted: dict[str, dict], commit: str) -> list[records.Job]:
    """Start one supervisor for these jobs, in order, and return at once."""
    base = f"local-{time.time_ns() // 1_000_000}"
    jobs = []
    for what, sbatch in wanted.items():
        job = records.Job(base if what == records.TRAIN else f"{base}.{what}", what, "local", sbatch)
        records.note(run, "submit", job.job, what=what, kind="local", options=sbatch, commit=commit)
        jobs.append(job)
    with outside_any_job():
        environ = {k: v for k, v in os.environ.items() if k not in (*places.TORCHRUN, places.TOKEN)}
    environ |= {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    with open(run.logs / f"{base}_supervisor.log", "ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "slurm.supervise", str(run.root), base], env=environ,
                                   cwd=run.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   start_new_session=True)
    found = procs.look(process.pid)
    records.note(run, "supervisor", base, pid=process.pid, started=found.started if found else 0,
                 host=os.uname().nodename)
    return jobs


def ask(run: RunDir, job: records.Job) -> sched.State:
    """The state of a local job, in SLURM's words."""
    ended = records.of(run, "ended", job.job)
    if ended:
        code, why = ended[-1]["code"], ended[-1].get("why", "")
        name = {EXIT_DONE: "COMPLETED", EXIT_STOPPED: "CANCELLED"}.get(code, "FAILED")
        return sched.State(name, why, exit_code=code)
    holder = supervisor(run, job)
    if holder is None:
        return sched.State(LOST, "no supervisor", note="it never started: submit again")
    if holder["host"] != os.uname().nodename:
        return sched.State("RUNNING", note=f"on {holder['host']}: ask there")
    if procs.same(holder["pid"], holder["started"]):
        begun = bool(records.of(run, "controller", job.job))
        return sched.State("RUNNING") if begun else sched.State("PENDING", "Dependency" if "." in job.job else "")
    if procs.session(holder["pid"]):
        return sched.State("RUNNING", note=f"its supervisor died, its tasks live on: hpcssl-submit cancel {run.root}")
    return sched.State(LOST, "its supervisor died", note="submit again with the same command: it goes on")


def supervisor(run: RunDir, job: records.Job) -> dict | None:
    found = records.of(run, "supervisor", job.job.partition(".")[0])
    return found[-1] if found else None


def preempt(run: RunDir, job: records.Job) -> int:
    """CONT, then TERM, to the living tasks, as a preemption brings them; how many took it."""
    holder = supervisor(run, job)
    tasks = procs.tasks(holder["pid"]) if holder and holder["host"] == os.uname().nodename else []
    if not tasks:
        raise SubmitError(f"run {run.root}", got="no running task on this machine", expected="a task to preempt",
                          mend=f"see `hpcssl-submit status {run.root}`, and preempt it while it runs")
    return procs.send(tasks, signal.SIGCONT, signal.SIGTERM)


def cancel(run: RunDir, job: records.Job) -> None:
    """Let the tasks save, then end the job for good. The supervisor sees it through; without one, this does."""
    holder = supervisor(run, job)
    if holder is None or holder["host"] != os.uname().nodename:
        where = holder["host"] if holder else "nowhere"
        raise SubmitError(f"job {job.job}", got=f"a job that runs on {where}", expected="one on this machine",
                          mend="cancel it there")
    if not procs.same(holder["pid"], holder["started"]):
        procs.send(procs.tasks(holder["pid"]), signal.SIGCONT, signal.SIGTERM)
        procs.clear(holder["pid"], patience_s=30)


def gpus(sbatch: dict) -> str:
    """What CUDA_VISIBLE_DEVICES becomes in the tasks: ``all`` leaves it unset."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    asked = shape.gpus_per_node(sbatch)
    if not asked:
        return "all" if seen is None else seen
    listed = [str(k) for k in range(asked)] if seen is None else seen.split(",")
    return ",".join(listed[:asked])


def python() -> str:
    return f"{shlex.quote(sys.executable)} -m {start.__name__}"
