"""One job on SLURM or on this machine, so that the same test can run on both."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import loopback
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, local, processes
from slurm.backend.profiles import Profile
from slurm.log import attempts, job_log
from slurm.manage import status

JOB_TIMEOUT_S = 300.0
"""Limit in seconds of the waits for jobs, which go through queues, start-ups and requeues. Only a hang reaches it."""


def skip_requeue_delay(cluster: loopback.LoopbackCluster, *jobs: str) -> None:
    """Start requeued jobs now. SLURM would wait for two minutes.

    Args:
        cluster: The cluster.
        jobs: Ids of jobs, which need not be requeued; none for all jobs.
    """
    words = ["-j", ",".join(jobs)] if jobs else []
    for line in cluster("squeue", "-h", "-t", "PD", *words, "-o", "%i %r").splitlines():
        job, reason = line.split(maxsplit=1)
        if reason == "BeginTime":
            time.sleep(2)  # a node that has just ended a job refuses to start it at once ("already killed")
            cluster("scontrol", "update", f"jobid={job}", "StartTime=now")


class JobRunner:
    """Submits one job of two ranks to SLURM or to a local supervisor, signals its processes, and waits for it.

    Args:
        cluster: The cluster; None for jobs on this machine.

    Attributes:
        run: The run folder of the submitted job.
        job: Id of the submitted job.
    """

    def __init__(self, cluster: loopback.LoopbackCluster | None):
        self.cluster, self.run, self.job = cluster, None, ""

    def submit(self, run: RunDir, what: str = "train", **sbatch: str) -> str:
        """Submit a run of the stubs, with options of sbatch; its job id."""
        self.run, options = run, {"ntasks-per-node": "2", **sbatch}
        if self.cluster is None:
            self.job = local.launch(run, {what: options})[0].id
        else:
            self.job = batch_script.submit(run, what, {"nodes": "2", **options, "ntasks-per-node": "1"}, Profile())
        return self.job

    def submit_training(self, run: RunDir, *overrides: str) -> None:
        """Submit a real training by the command line."""
        size = ["--local", "--ntasks-per-node=2"] if self.cluster is None else ["-N2", "--ntasks-per-node=1"]
        command = [sys.executable, "-m", "slurm", "digits_msf", "--run", str(run.root), *size, *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.run, self.job = run, job_log.latest_jobs(run)["train"].id

    @property
    def causes(self) -> list[str | None]:
        """Cause of each attempt of the training; None while it runs."""
        return [attempt.cause for attempt in attempts.read_attempts(self.run)]

    @property
    def step(self) -> int:
        """The last known step of the training."""
        return attempts.last_known_step(self.run)

    @property
    def tasks(self) -> dict[int, int]:
        """Process ids of the running tasks, by rank."""
        return loopback.find_task_pids(self.job)

    def signal(self, target: int | str, *numbers: int) -> None:
        """Send signals to a rank, to ``all`` ranks, or to another process of the job (see ``find_process``)."""
        if target == "all":
            pids = list(self.tasks.values())
        else:
            pids = [self.tasks[target] if isinstance(target, int) else self.find_process(target)]
        for number in numbers:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def find_process(self, name: str) -> int:
        """Process id of ``batch`` or ``srun`` of a SLURM job, or of ``supervisor`` or ``controller`` of a local one."""
        if self.cluster is None:
            supervisor = local.find_supervisor(self.run, job_log.latest_jobs(self.run)["train"])["pid"]
            if name == "supervisor":
                return supervisor
            members = processes.find_session_members(supervisor)
            return next(p.pid for p in members if b"submitit.local._local" in _read_command(p.pid))
        suffix = {"batch": b"/slurm_script", "srun": b"srun"}[name]
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return min(  # the lowest one: srun has a helper process
            pid
            for pid in pids
            if (environ := processes.read_environment(pid)).get("SLURM_JOB_ID") == self.job
            and loopback.is_of_this_cluster(environ)
            and any(word.endswith(suffix) for word in _read_command(pid)[:2])
        )

    def wait_until(self, condition, message: str, timeout: float = JOB_TIMEOUT_S) -> None:
        """Wait until a condition holds, and meanwhile start requeued jobs without SLURM's delay.

        Raises:
            AssertionError: It does not hold in time, or the local job has ended before; the message has the logs.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            is_over = time.monotonic() > deadline or job_log.read_events(self.run, "ended", self.job)
            assert not is_over or condition(), f"no {message} within {timeout:g} s: {self.causes}" + self._read_logs()
            if self.cluster is not None:
                skip_requeue_delay(self.cluster)
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        """Wait until the training has made this step."""
        self.wait_until(lambda: self.step >= step, f"step {step}")

    def wait_for_end(self) -> str:
        """Wait for the end of the training's newest job; the name of its state."""
        states = []

        def has_ended() -> bool:
            states.append(status.query_job(self.run, job_log.latest_jobs(self.run)["train"]))
            return not states[-1].is_active

        self.wait_until(has_ended, "end")
        return states[-1].name

    def _read_logs(self) -> str:
        paths = [path for path in sorted(self.run.logs.iterdir()) if path.suffix in (".out", ".err", ".log")]
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in paths)


def _read_command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
