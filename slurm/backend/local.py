"""Local jobs: start a supervisor in place of SLURM, query its jobs, signal their tasks, cancel them.

The supervisor (``slurm.job.local_supervisor``) leads a process session of its own and outlives the terminal. What it
does is read from ``jobs.jsonl`` and from /proc, never from a file that could go stale.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

from hpcssl import config
from hpcssl.distributed import launch as launcher
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, SubmitError
from hpcssl.run_dir import RunDir
from hpcssl.timing.uptime import to_unix_time
from slurm.backend import permissions, processes, resources
from slurm.backend.batch_script import without_job_environment
from slurm.backend.scheduler import JobState
from slurm.log import job_log
from slurm.log.job_log import Job, SbatchOptions

START_TIMEOUT_S = 10
"""Seconds between the record of a job and that of its supervisor, after which the supervisor is considered lost."""
LOST = "LOST"
"""State of a local job whose supervisor died before its end. It gets no further attempt."""


def launch(run: RunDir, options: dict[str, SbatchOptions], gpus: str | None = None) -> list[Job]:
    """Start one supervisor that runs jobs one after the other, and return at once.

    Args:
        run: The run folder.
        options: Options of sbatch by ``what`` (``train``, or an evaluation), in the order in which the jobs run.
        gpus: ``CUDA_VISIBLE_DEVICES`` of the supervisor; None to inherit it.

    Returns:
        The jobs, as they were recorded.
    """
    supervisor_id = f"local-{time.time_ns() // 1_000_000}"
    jobs = [record_submission(run, supervisor_id, what, sbatch) for what, sbatch in options.items()]
    with without_job_environment():
        environ = {k: v for k, v in os.environ.items() if k not in (*launcher.TORCHRUN, launcher.TOKEN)}
    environ |= {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if gpus is not None:
        environ["CUDA_VISIBLE_DEVICES"] = gpus
    with permissions.private_umask(), open(run.logs / f"{supervisor_id}_supervisor.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "slurm.job.local_supervisor", str(run.root), supervisor_id],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    state = processes.read_process(process.pid)
    started = state.start_ticks if state else 0
    about: dict[str, Any] = {"pid": process.pid, "started": started, "host": os.uname().nodename}
    about["folder"] = _identify(run)
    job_log.record_event(run, "supervisor", supervisor_id, **about | ({} if gpus is None else {"gpus": gpus}))
    return jobs


def record_submission(run: RunDir, supervisor_id: str, what: str, sbatch: SbatchOptions) -> Job:
    """Record a job for a supervisor under a short, unique id.

    Args:
        run: The run folder.
        supervisor_id: Id of the supervisor, which is also that of its training job.
        what: ``train``, or an evaluation.
        sbatch: Options of sbatch.
    """
    name = what.partition(":")[0]
    same_name = sum(job.what.partition(":")[0] == name for job in jobs_of_supervisor(run, supervisor_id))
    suffix = f"-{same_name + 1}" if same_name else ""
    job_id = supervisor_id if what == job_log.TRAIN else f"{supervisor_id}.{name}{suffix}"
    job_log.record_event(run, "submit", job_id, what=what, kind="local", options=sbatch)
    return Job(job_id, what, "local", sbatch)


def jobs_of_supervisor(run: RunDir, supervisor_id: str) -> list[Job]:
    """Return the jobs of a supervisor, in the order in which it runs them."""
    return [job for job in job_log.latest_jobs(run).values() if job.id.partition(".")[0] == supervisor_id]


def has_active_job(run: RunDir, supervisor_id: str) -> bool:
    """Return whether a job of a supervisor is queued or running; concurrent evaluations do not count."""
    jobs = jobs_of_supervisor(run, supervisor_id)
    return any(not job.is_concurrent and query_job(run, job).is_active for job in jobs)


def query_job(run: RunDir, job: Job) -> JobState:
    """Return the state of a local job, with the names of states that SLURM has."""
    ended = job_log.read_events(run, "ended", job.id)
    if ended:
        code, reason = ended[-1]["code"], ended[-1].get("why", "")
        name = {EXIT_DONE: "COMPLETED", EXIT_STOPPED: "CANCELLED"}.get(code, "FAILED")
        return JobState(name, reason, exit_code=code)
    supervisor = find_supervisor(run, job)
    if supervisor is None and _is_copied(run, job):
        hint = "it is a job of the run that this folder is a copy of: submit again to continue the copy"
        return JobState(LOST, "copied", hint=hint)
    if supervisor is None:
        submitted = to_unix_time(job_log.read_events(run, "submit", job.id)[-1]["time"])
        if 0 <= time.time() - submitted < START_TIMEOUT_S:  # a clock that was set back must not keep it pending
            return JobState("PENDING")
        return JobState(LOST, "no supervisor", hint="it never started: submit again")
    if supervisor["host"] != os.uname().nodename:
        return JobState("RUNNING", hint=f"it runs on {supervisor['host']}: query it there")
    if processes.is_running(supervisor["pid"], supervisor["started"]):
        attempts = job_log.read_events(run, "controller", job.id)
        if attempts:
            return JobState("RUNNING", restarts=attempts[-1]["attempt"] - 1)
        return JobState("PENDING", "Dependency" if "." in job.id or "dependency" in job.options else "")
    if processes.find_session_members(supervisor["pid"]):
        return JobState(
            "RUNNING", hint=f"its supervisor died, its tasks still run: hpcssl-submit cancel {run.root} ends them"
        )
    return JobState(LOST, "its supervisor died", hint="submit again with the same command to continue")


def has_running_supervisor(run: RunDir, job: Job) -> bool:
    """Return whether the supervisor of a job runs. One on another machine, which cannot be checked, counts."""
    supervisor = find_supervisor(run, job)
    return supervisor is not None and (
        supervisor["host"] != os.uname().nodename or processes.is_running(supervisor["pid"], supervisor["started"])
    )


def find_supervisor(run: RunDir, job: Job) -> dict[str, Any] | None:
    """Return the record of a job's supervisor (``pid``, ``started`` in clock ticks, ``host``), or None.

    The supervisor of the run that this folder is a copy of is not the one of its jobs.
    """
    events = job_log.read_events(run, "supervisor", job.id.partition(".")[0])
    return events[-1] if events and not _is_copied(run, job) else None


def _is_copied(run: RunDir, job: Job) -> bool:
    """Whether a job was started in another folder, of which this one is a copy: on this machine a move is none."""
    events = job_log.read_events(run, "supervisor", job.id.partition(".")[0])
    is_here = bool(events) and events[-1]["host"] == os.uname().nodename
    return is_here and events[-1].get("folder", _identify(run)) != _identify(run)


def _identify(run: RunDir) -> str:
    """Device and inode: what tells a folder of this machine from its copies."""
    status = run.root.stat()
    return f"{status.st_dev}:{status.st_ino}"


def preempt(run: RunDir, job: Job) -> int:
    """Send CONT, then TERM, to the running tasks of a job, as a preemption by SLURM does.

    Returns:
        The number of tasks that got the signals.

    Raises:
        SubmitError: No task of the job runs on this machine.
    """
    supervisor = find_supervisor(run, job)
    is_here = supervisor is not None and supervisor["host"] == os.uname().nodename
    tasks = processes.find_tasks(supervisor["pid"]) if supervisor is not None and is_here else []
    if not tasks:
        raise SubmitError(
            f"run {run.root}",
            got="no running task on this machine",
            expected="a running task to preempt",
            fix=f"run `hpcssl-submit status {run.root}`, and preempt the run while it is running",
        )
    return processes.send_signals(tasks, signal.SIGCONT, signal.SIGTERM)


def cancel(run: RunDir, job: Job) -> None:
    """Let the tasks of a job save their state, and end the job for good.

    The supervisor does it, since the cancellation was recorded before. If the supervisor has died, this function does
    it, and waits up to 30 seconds for the tasks.

    Raises:
        SubmitError: The job runs on another machine.
    """
    supervisor = find_supervisor(run, job)
    if supervisor is None or supervisor["host"] != os.uname().nodename:
        where = f"a job on {supervisor['host']}" if supervisor else "a job without a supervisor"
        raise SubmitError(
            f"job {job.id}", got=where, expected="a job on this machine", fix="cancel it on the machine where it runs"
        )
    if not processes.is_running(supervisor["pid"], supervisor["started"]):
        processes.send_signals(processes.find_tasks(supervisor["pid"]), signal.SIGCONT, signal.SIGTERM)
        processes.kill_session(supervisor["pid"], patience_s=30)


def select_gpus(sbatch: SbatchOptions) -> str:
    """Return ``CUDA_VISIBLE_DEVICES`` for the tasks of a local job; ``all`` if it is to be unset.

    Args:
        sbatch: Options of sbatch. If they request no GPUs, the tasks see all that this process sees.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = resources.count_gpus_per_node(sbatch)
    if not count:
        return "all" if visible is None else visible
    names = [str(k) for k in range(count)] if visible is None else visible.split(",")
    return ",".join(names[:count])


def list_gpus() -> list[str]:
    """Return the names of the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(k) for k in range(sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev")))]


def find_spare_gpu(run: RunDir, sbatch: SbatchOptions) -> str | None:
    """Return ``CUDA_VISIBLE_DEVICES`` for an evaluation during a local training.

    Args:
        run: The run folder.
        sbatch: The options of the training. A training that requests no number of GPUs may use all of them.

    Returns:
        A GPU that the training does not use; an empty string if there is no GPU or the recipe uses the CPU; None if the
        training uses every GPU.
    """
    names = list_gpus()
    if not names or (config.read_yaml(run.config).get("machine") or {}).get("devices") == "cpu":
        return ""
    spare = names[resources.count_gpus_per_node(sbatch) or len(names) :]
    return spare[0] if spare else None
