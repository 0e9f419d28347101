"""The local twin of SLURM, seen from the doors: start a supervisor, ask after it, signal its tasks, cancel it.

The supervisor (``supervise``) leads a process session of its own and outlives the terminal; what it is doing is read
from ``jobs.jsonl`` and from /proc, never from a file that could go stale.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

from hpcssl import config
from hpcssl import launch as places
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, SubmitError
from hpcssl.files import RunDir
from slurm import procs, records, sched, shape, trust
from slurm.script import outside_any_job

START_S = 10
"""Between the note of a job and that of its supervisor."""
LOST = "LOST"
"""State of a local job whose supervisor died before its end: nobody starts another attempt."""


def launch(run: RunDir, wanted: dict[str, dict], gpus: str | None = None) -> list[records.Job]:
    """Start one supervisor for these jobs, in order, and return at once. ``gpus``: the only ones they may see."""
    base = f"local-{time.time_ns() // 1_000_000}"
    jobs = [note(run, base, what, sbatch) for what, sbatch in wanted.items()]
    with outside_any_job():
        environ = {k: v for k, v in os.environ.items() if k not in (*places.TORCHRUN, places.TOKEN)}
    environ |= {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if gpus is not None:
        environ["CUDA_VISIBLE_DEVICES"] = gpus
    with trust.ours_alone(), open(run.logs / f"{base}_supervisor.log", "ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "slurm.supervise", str(run.root), base], env=environ,
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    found = procs.look(process.pid)
    records.note(run, "supervisor", base, pid=process.pid, started=found.started if found else 0,
                 host=os.uname().nodename)
    return jobs


def note(run: RunDir, base: str, what: str, sbatch: dict) -> records.Job:
    """Note a job for the supervisor ``base``: its id is short, and no other job's."""
    name = what.partition(":")[0]
    same = sum(job.what.partition(":")[0] == name for job in of_base(run, base))
    job = records.Job(base if what == records.TRAIN else f"{base}.{name}" + f"-{same + 1}" * bool(same), what, "local",
                      sbatch)
    records.note(run, "submit", job.job, what=what, kind="local", options=sbatch)
    return job


def of_base(run: RunDir, base: str) -> list[records.Job]:
    """The jobs of one supervisor, in order."""
    return [job for job in records.submitted(run).values() if job.job.partition(".")[0] == base]


def ask(run: RunDir, job: records.Job) -> sched.State:
    """The state of a local job, in SLURM's words."""
    ended = records.of(run, "ended", job.job)
    if ended:
        code, why = ended[-1]["code"], ended[-1].get("why", "")
        name = {EXIT_DONE: "COMPLETED", EXIT_STOPPED: "CANCELLED"}.get(code, "FAILED")
        return sched.State(name, why, exit_code=code)
    holder = supervisor(run, job)
    if holder is None:
        asked = datetime.fromisoformat(records.of(run, "submit", job.job)[-1]["time"])
        if (datetime.now(UTC) - asked).total_seconds() < START_S:
            return sched.State("PENDING")
        return sched.State(LOST, "no supervisor", note="it never started: submit again")
    if holder["host"] != os.uname().nodename:
        return sched.State("RUNNING", note=f"on {holder['host']}: ask there")
    if procs.same(holder["pid"], holder["started"]):
        begun = records.of(run, "controller", job.job)
        if begun:
            return sched.State("RUNNING", restarts=begun[-1]["attempt"] - 1)
        return sched.State("PENDING", "Dependency" if "." in job.job else "")
    if procs.session(holder["pid"]):
        return sched.State("RUNNING", note=f"its supervisor died, its tasks live on: hpcssl-submit cancel {run.root}")
    return sched.State(LOST, "its supervisor died", note="submit again with the same command: it goes on")


def supervised(run: RunDir, job: records.Job) -> bool:
    """Whether the job's supervisor lives, as far as this machine knows."""
    holder = supervisor(run, job)
    return holder is not None and (holder["host"] != os.uname().nodename or procs.same(holder["pid"],
                                                                                         holder["started"]))


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


def spare_gpus(run: RunDir, sbatch: dict) -> str | None:
    """What CUDA_VISIBLE_DEVICES may be for one process beside a training with these options; None: there is no room.

    A training that names no number may take every GPU that it sees.
    """
    count = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = [str(k) for k in range(count)] if seen is None else [k for k in seen.split(",") if k]
    if not listed or (config.read_yaml(run.config).get("machine") or {}).get("devices") == "cpu":
        return ""
    spare = listed[shape.gpus_per_node(sbatch) or len(listed):]
    return spare[0] if spare else None
