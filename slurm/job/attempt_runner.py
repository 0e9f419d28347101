"""One attempt of a local job: its tasks, from their start to their end."""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import sys
import time

from submitit.local.local import start_controller

from hpcssl.distributed import launch
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, HpcsslError
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from slurm.backend import batch_script, local, processes, resources
from slurm.backend.processes import Process
from slurm.job import bootstrap, concurrent_evals
from slurm.job.requeue import ATTEMPT_VARIABLE, LOCAL_JOB_VARIABLE
from slurm.log import job_log
from slurm.log.job_log import Job

LOG = logging.getLogger("hpcssl")
POLL_S = 0.2
KILL_WAIT_S = 30.0
"""Seconds that tasks have to save after a cancel or the end of their time, like SLURM's KillWait."""
CRASH_WAIT_S = 5.0
"""Seconds that the other tasks have to notice that one of them has crashed."""
NO_TIMEOUT_MIN = 60.0 * 24 * 3650


class AttemptRunner:
    """Starts the tasks of one attempt, watches them, and enforces the time limit.

    submitit's local controller starts the tasks. What it does not do is done here: the warning before the time limit,
    the end of an attempt of which one task has crashed, and the removal of leftover processes.

    Args:
        run: The run folder.
        job: The job.
        number: Number of the attempt, from 1.
        stop: The flag of the supervisor; when it is set, the attempt is ended.

    Attributes:
        info: ``attempt``, ``job``, ``restart`` and ``host``, for the records of the attempt.
        dead_ranks: Ranks that died without an exit code before the supervisor killed any: those are not the cause.
        stop_cause: Why the supervisor ended the attempt: ``cancelled``, ``timeout`` or ``stopped``; None if it did not.
    """

    def __init__(self, run: RunDir, job: Job, number: int, stop: StopFlag):
        self.run, self.job, self.number, self.stop = run, job, number, stop
        self.size = resources.count_local_tasks(job.options)
        self.info = {"attempt": number, "job": job.id, "restart": number - 1, "host": os.uname().nodename}
        self.dead_ranks: list[int] = []
        self.stop_cause: str | None = None
        self._crash_time: float | None = None
        self._stop_time: float | None = None
        self._first_stop_time: float | None = None
        self._has_passed_stop_on = False
        self._limit = resources.get_time_limit(job.options)
        self._signal, self._lead = resources.get_warning_signal(job.options)
        self._warned = False
        self._polled_evals_at = -math.inf
        self._started_ranks: set[int] = set()
        self._first_task_time: float | None = None
        self._has_killed = False

    def start(self) -> None:
        """Start the tasks, and record the controller that did it."""
        os.environ.update(
            {
                ATTEMPT_VARIABLE: str(self.number),
                LOCAL_JOB_VARIABLE: self.job.id,
                launch.TOKEN: f"{self.job.id}.{self.number}",
                bootstrap.GPUS_VARIABLE: local.select_gpus(self.job.options),
            }
        )
        command = batch_script.task_command(shlex.quote(sys.executable), self.run, self.job.what)
        # the tasks inherit the blocked signals, so that none arrives while their interpreter starts
        bootstrap.block_signals()
        try:  # the time limit is enforced here, by SLURM's rules, and not by the controller
            self._controller = start_controller(self.run.logs, command, self.size, timeout_min=NO_TIMEOUT_MIN)
        finally:
            bootstrap.unblock_signals()
        self._start_time = time.monotonic()
        logs, number = str(self._controller.pid), self.number
        job_log.record_event(self.run, "controller", self.job.id, attempt=number, logs=logs, tasks=self.size)

    def wait(self) -> list[int | None]:
        """Wait for the end of every task. Return the exit codes by rank, None for a task that died without one."""
        while self._controller.poll() is None:
            time.sleep(POLL_S)
            tasks = processes.find_tasks(os.getpid())
            self._warn_of_time_limit(tasks)
            self._stop_if_requested(tasks)
            self._stop_after_crash(tasks)
            self._submit_evaluations()
        # a controller that was killed leaves its tasks running
        self._has_killed = self._has_killed or bool(processes.find_session_members(os.getpid()))
        processes.kill_session(os.getpid())
        codes = [self._read_exit_codes().get(rank) for rank in range(self.size)]
        if not self._has_killed:  # a task may have died between two looks
            self.dead_ranks = [rank for rank, code in enumerate(codes) if code is None]
        return codes

    def _submit_evaluations(self) -> None:
        is_due = time.monotonic() - self._polled_evals_at >= concurrent_evals.LOCAL_POLL_S
        if self.job.what != job_log.TRAIN or not is_due:
            return
        self._polled_evals_at = time.monotonic()
        try:
            concurrent_evals.launch_due(self.run, self.job)
        except (HpcsslError, OSError, ValueError):  # a failed submission must not end the training
            LOG.exception("concurrent evaluations are postponed to the end of the training")
            self._polled_evals_at = math.inf

    def _warn_of_time_limit(self, tasks: list[Process]) -> None:
        """Send the signal that SLURM sends before the time limit."""
        if self._limit is None or self._warned or time.monotonic() - self._start_time < self._limit - self._lead:
            return
        self._warned = True
        job_log.record_event(self.run, "signal", self.job.id, restart=self.number - 1, cause="timeout")
        processes.send_signals(tasks, signal.SIGCONT, signal.Signals[f"SIG{self._signal}"])

    def _stop_if_requested(self, tasks: list[Process]) -> None:
        """End the tasks after a cancel, at the time limit, and when the supervisor itself is stopped."""
        if self._stop_time is None:
            is_over = self._limit is not None and time.monotonic() - self._start_time > self._limit
            is_cancelled = job_log.is_cancelled(self.run, self.job.id)
            if is_over or self.stop.is_set() or is_cancelled:
                self._stop_time = time.monotonic()
                self.stop_cause = "cancelled" if is_cancelled else "timeout" if is_over else "stopped"
                processes.send_signals(tasks, signal.SIGCONT, signal.SIGTERM)
        elif time.monotonic() - self._stop_time > KILL_WAIT_S:
            self._kill(tasks)

    def _stop_after_crash(self, tasks: list[Process]) -> None:
        """Kill the tasks that still run some seconds after another one has crashed."""
        codes = self._read_exit_codes()  # read after `tasks`: a task that is missing there has written its code by now
        running = {int(processes.read_environment(p.pid).get("SUBMITIT_LOCAL_GLOBALID", -1)) for p in tasks}
        started = self._find_started_ranks(running)
        if not tasks or len(tasks) == self.size:
            return
        dead = sorted(started - running - codes.keys())
        if not dead and all(code in (EXIT_DONE, EXIT_STOPPED) for code in codes.values()):
            if EXIT_STOPPED in codes.values():
                self._pass_stop_on(tasks)
            return
        if self._crash_time is None:
            self._crash_time, self.dead_ranks = time.monotonic(), dead
        elif time.monotonic() - self._crash_time > CRASH_WAIT_S:
            self._kill(tasks)

    def _pass_stop_on(self, tasks: list[Process]) -> None:
        """Stop the tasks that still run some seconds after another one has stopped, as srun does.

        A task that is stopped before rank 0 has come to the rendezvous leaves, and nothing tells rank 0 so.
        """
        if self._first_stop_time is None:
            self._first_stop_time = time.monotonic()
        elif not self._has_passed_stop_on and time.monotonic() - self._first_stop_time > CRASH_WAIT_S:
            self._has_passed_stop_on = True
            processes.send_signals(tasks, signal.SIGCONT, signal.SIGTERM)

    def _find_started_ranks(self, running: set[int]) -> set[int]:
        """Ranks that the controller has started by now. It starts them in order, in far less than ``CRASH_WAIT_S``."""
        now = time.monotonic()
        if self._first_task_time is None and running:
            self._first_task_time = now
        self._started_ranks |= running
        if self._first_task_time is not None and now - self._first_task_time > CRASH_WAIT_S:
            return set(range(self.size))
        return set(range(max(self._started_ranks, default=-1) + 1))

    def _kill(self, tasks: list[Process]) -> None:
        self._has_killed = True
        processes.send_signals(tasks, signal.SIGKILL)

    def _read_exit_codes(self) -> dict[int, int]:
        events = job_log.read_events(self.run, "exit", self.job.id)
        return {event["rank"]: event["code"] for event in events if event["attempt"] == self.number}
