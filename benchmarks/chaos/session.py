"""One training on the loopback cluster: its job, its tasks, its progress, and how it recovers from a fault."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import loopback
from benchmarks.chaos.commands import PERIOD, StuckError, TrainingCommands
from hpcssl.run_dir import RunDir
from slurm.backend import processes
from slurm.backend.scheduler import GONE
from slurm.log import attempts, job_log, retry
from slurm.log.attempts import Attempt
from slurm.manage import status

POLL_S = 0.2
MAX_RESUBMISSIONS = 3
"""How often a job that ended is submitted again before the training counts as stuck."""
UNAFFECTED_STEPS = 50
"""A training that made this many steps after a fault has not been affected by it."""
REFUSAL_S = 2.0
"""Seconds during which a node that has just ended a job refuses to start it again ("already killed")."""

ENDED_STATES = ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "COMPLETED", "PREEMPTED", "BOOT_FAIL", GONE)


class TargetMissing(Exception):
    """The target of a fault does not exist: the training has just ended, or is between two attempts."""


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        attempt: Number of the newest attempt; 0 before the first.
        step: The last step in the journal.
    """

    attempt: int
    step: int


@dataclass
class Recovery:
    """How a training recovered from a group of faults.

    Attributes:
        peak: The last step that was finished before.
        first: The first step of the attempt that continues; ``peak`` if no other attempt was needed.
        causes: Causes of the attempts that ended in between.
        saving: Whether a checkpoint had begun that had no manifest yet.
        resubmissions: Each time that the job had to be submitted again, why.
    """

    peak: int
    first: int
    causes: list[str]
    saving: bool = False
    resubmissions: list[str] = field(default_factory=list)


class TrainingSession:
    """One training, and the cluster that it runs on.

    Args:
        cluster: The cluster.
        run: The run folder.
        commands: How to submit the training.
        write: Called with lines for the log.

    Attributes:
        job: Id of the current job.
        resubmissions: Each time that the job had to be submitted again, why.
        initial_tasks: Pids of the tasks at the first fault of the current group.
        strangers: Ids of jobs that are not ours, and that must keep running until the training has recovered.
        stale_ranks: Processes that ``faults.start_stale_rank`` started.
        held_ports: Sockets that ``faults.hold_port`` opened.
    """

    def __init__(
        self,
        cluster: loopback.LoopbackCluster,
        run: RunDir,
        commands: TrainingCommands,
        write: Callable[[str], None] = print,
    ):
        self.cluster, self.run, self.commands, self.write = cluster, run, commands, write
        self.job = commands.submit(run)
        self.resubmissions: list[str] = []
        self.initial_tasks: set[int] = set()
        self.strangers: list[str] = []
        self.stale_ranks: list[subprocess.Popen[str]] = []
        self.held_ports: list[socket.socket] = []
        self._requeued_at: float | None = None

    # -- queries -------------------------------------------------------------------------------------------------

    @property
    def is_finished(self) -> bool:
        """Whether the training has reached its last step."""
        return self.run.done.exists()

    def last_step(self) -> int:
        """Return the last step in the journal."""
        return int(attempts.read_last_record(self.run.journal).get("step") or 0)

    def latest_attempt(self) -> Attempt | None:
        """Return the newest attempt, or None."""
        return next(iter(attempts.read_attempts(self.run)[-1:]), None)

    def progress(self) -> Progress:
        """Return how far the training is."""
        latest = self.latest_attempt()
        return Progress(latest.number if latest else 0, self.last_step())

    def task_pids(self) -> dict[int, int]:
        """Return the pids of the running tasks, by rank."""
        return loopback.find_task_pids(self.job)

    def find_processes(self, *words: str) -> list[int]:
        """Return the pids of the job's running processes whose command line has one of the words, such as ``srun``."""
        pids = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                pid = int(folder.name)
                environ = processes.read_environment(pid)
                of_job = f"[{self.job}." in line or environ.get("SLURM_JOB_ID") == self.job
                of_job = of_job and loopback.is_of_this_cluster(environ)
                process = processes.read_process(pid)
                if of_job and any(word in line for word in words) and process is not None and process.is_alive:
                    pids.append(pid)
        return sorted(pids)

    def checkpoints(self) -> list[Path]:
        """Return the folders of checkpoints, oldest first."""
        return sorted(self.run.checkpoints.glob("step-*")) if self.run.checkpoints.is_dir() else []

    def last_sealed_step(self) -> int:
        """Return the step of the newest checkpoint with a manifest; 0 if there is none."""
        steps = [int(folder.name[5:]) for folder in self.checkpoints() if (folder / "manifest.json").exists()]
        return max(steps, default=0)

    def is_saving(self) -> bool:
        """Return whether a periodic save has begun that has no manifest yet."""
        steps = [int(folder.name[5:]) for folder in self.checkpoints()]
        return any(step % PERIOD == 0 and step > self.last_sealed_step() for step in steps)

    def describe(self) -> str:
        """Return the job, the last attempts and the ends of the logs, for a training that did not do as expected."""
        lines = [json.dumps(vars(attempt)) for attempt in attempts.read_attempts(self.run)[-3:]]
        logs = sorted(self.run.logs.glob(f"{self.job}_*.err"))
        daemons = sorted(self.cluster.root.glob("slurm*.log"))
        return "\n".join(
            [
                self.cluster("scontrol", "show", "job", self.job),
                *lines,
                *(f"== {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-12:]) for p in logs),
                # a daemon that was slow to answer gets a copy of an old request a minute later
                *(f"== {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-60:]) for p in daemons),
            ]
        )

    # -- actions -------------------------------------------------------------------------------------------------

    def send_signal(self, *pids: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to processes; those that have ended are ignored."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def maintain(self) -> None:
        """Do what happens on a cluster in the course of a day.

        A requeued job starts (without SLURM's two minutes of waiting), a held job is released, and a job that SLURM
        has ended is submitted again.
        """
        text = self.cluster("scontrol", "show", "job", "-o", self.job)
        if not text:
            return  # the controller does not answer at the moment
        fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
        state, reason = fields.get("JobState", ""), fields.get("Reason", "")
        if self.job in self.strangers:
            state = status.query_job(self.run, job_log.latest_jobs(self.run)[job_log.TRAIN]).name
        if state == "PENDING" and reason == "BeginTime":
            self._requeued_at = self._requeued_at or time.monotonic()
            if time.monotonic() - self._requeued_at > REFUSAL_S:
                self.cluster("scontrol", "update", f"jobid={self.job}", "StartTime=now")
            return
        self._requeued_at = None
        if state == "PENDING" and "held" in reason.lower():
            self.write(f"  {reason}: released")
            self.cluster("scontrol", "release", self.job)
        elif state in ENDED_STATES and not self.is_finished:
            self._continue_after(state, fields.get("ExitCode", ""))

    def _continue_after(self, state: str, exit_code: str) -> None:
        """Follow the successor of a job that has ended, or submit the training again."""
        latest = job_log.latest_jobs(self.run)[job_log.TRAIN].id
        if latest != self.job:
            self.write(f"  job {latest} continues job {self.job}")
            self.job = latest
            return
        decision = retry.decide_retry(attempts.read_attempts(self.run))
        description = f"{state}, exit code {exit_code}"
        self.resubmissions.append(description if decision.retry else f"{description}: {decision.reason}")
        self.write(f"  job {self.job} is {self.resubmissions[-1]}; submitted again")
        self.job = self.commands.submit(self.run)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
        """Maintain the training until a condition holds, or the training is finished.

        Args:
            condition: The condition.
            what: What is waited for, for the error.
            seconds: Time limit.

        Raises:
            StuckError: The time is over, or the job was submitted again too often.
        """
        deadline, count = time.monotonic() + seconds, len(self.resubmissions)
        while not condition() and not self.is_finished:
            if time.monotonic() > deadline or len(self.resubmissions) > count + MAX_RESUBMISSIONS:
                raise StuckError(f"no {what} within {seconds:g} s; {'; '.join(self.resubmissions[count:])}")
            self.maintain()
            time.sleep(POLL_S)

    def wait_for_start(self, old: set[int]) -> None:
        """Wait until all tasks of the next attempt run, and none of the pids ``old`` does."""
        self.wait_until(
            lambda: len(pids := set(self.task_pids().values())) == 4 and not pids & old, "next attempt's tasks"
        )

    def wait_for_recovery(self, before: Progress, restarts: bool) -> Recovery:
        """Wait until the training makes steps again.

        Args:
            before: The progress before the faults.
            restarts: Whether another attempt is expected. Without one, the training must make
                ``UNAFFECTED_STEPS`` steps to count as unaffected.

        Raises:
            StuckError: It does not recover.
        """
        goal = before.step + (UNAFFECTED_STEPS if restarts else 0)
        peak, saving, count = before.step, False, len(self.resubmissions)

        def continues() -> bool:
            nonlocal peak, saving
            latest, step = self.latest_attempt(), self.last_step()
            if latest is None or latest.number <= before.attempt:  # the next attempt will cut the journal back
                peak = max(peak, step)
                saving = peak // PERIOD * PERIOD > self.last_sealed_step()
                return step > goal and latest is not None and latest.cause is None
            # a line of the journal that was written after the start of the attempt belongs to this attempt
            is_own_line = _modified_ns(self.run.journal) > _modified_ns(self.run.attempts)
            return latest.cause is None and is_own_line and step > latest.first_step

        self.wait_until(continues, "further step")
        for job in self.strangers:
            if (self.cluster.field(job, "JobState"), self.cluster.field(job, "Restarts")) != ("RUNNING", "0"):
                raise StuckError(f"job {job}, which is not ours, was cancelled or requeued")
            self.cluster("scancel", job)
        self.strangers.clear()
        recent = [a for a in attempts.read_attempts(self.run) if a.number >= before.attempt]
        causes = [a.cause for a in recent if a.cause is not None]
        first = recent[-1].first_step if recent and recent[-1].number > before.attempt else peak
        return Recovery(peak, first, causes, saving, self.resubmissions[count:])

    def finish(self) -> str:
        """Wait for the end of the training. Return its digest."""
        self.wait_until(lambda: False, "end of the training", 900)
        return self.commands.digest(self.run)


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
