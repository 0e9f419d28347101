"""The local supervisor: ``python -m slurm.supervise RUN JOB`` runs the attempts of a job and of what is chained on it.

One controller of submitit's per attempt starts the tasks; the attempts, the requeues and the chain are ours, by
the same rules as on SLURM (``attempts``). What submitit's controller does not do is done here: it ends an attempt of
which one task has crashed, and clears what an attempt left behind.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import sys
import time

from submitit.local.local import start_controller

from hpcssl import launch
from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, HpcsslError
from hpcssl.files import RunDir
from hpcssl.signals import StopFlag
from slurm import attempts, beside, local, procs, records, sched, script, shape, start, trust, watch
from slurm.again import ATTEMPT, LOCAL_JOB

LOG = logging.getLogger("hpcssl")
POLL_S = 0.2
KILL_WAIT_S = 30.0
"""How long tasks may take to save after a cancel or the end of their time, as SLURM's KillWait."""
CRASH_WAIT_S = 5.0
"""How long the others may take to notice that one of them has crashed."""
FOREVER_MIN = 60.0 * 24 * 3650


class Attempt:
    """One attempt of one job: submitit's tasks, watched to their end."""

    def __init__(self, run: RunDir, job: records.Job, number: int, stop: StopFlag):
        self.run, self.job, self.number, self.stop = run, job, number, stop
        self.size = shape.local_tasks(job.options)
        self.about = {"attempt": number, "job": job.job, "restart": number - 1, "host": os.uname().nodename}
        self.dead: list[int] = []
        """Ranks that died without a word, as first seen: those that we end after them are not the cause."""
        self.asked: str | None = None
        """Why we told it to end, if we did."""
        self._bad_since = self._ended_at = None
        self._limit, (self._signal, self._lead) = shape.limit(job.options), shape.signal(job.options)
        self._warned = False
        self._looked_at = -math.inf
        self._seen: set[int] = set()

    def start(self) -> None:
        os.environ.update({ATTEMPT: str(self.number), LOCAL_JOB: self.job.job,
                           launch.TOKEN: f"{self.job.job}.{self.number}", start.GPUS: local.gpus(self.job.options)})
        command = script.command(shlex.quote(sys.executable), self.run, self.job.what)
        start.hold()  # a mask outlives fork and exec: not even the interpreter's own start is open to a signal
        try:  # the time limit is watched here, by the rules of SLURM, and not there
            self._controller = start_controller(self.run.logs, command, self.size, timeout_min=FOREVER_MIN)
        finally:
            start.release()
        self._began = time.monotonic()
        records.note(self.run, "controller", self.job.job, attempt=self.number, logs=str(self._controller.pid),
                     tasks=self.size)

    def wait(self) -> list[int | None]:
        """Exit codes by rank once every task is gone; None for a task that died without a word."""
        while self._controller.poll() is None:
            time.sleep(POLL_S)
            alive = procs.tasks(os.getpid())
            self._warn_in_time(alive)
            self._end_if_asked(alive)
            self._end_if_crashed(alive)
            self._evaluate_beside()
        procs.clear(os.getpid())  # a controller that was killed leaves its tasks behind
        codes = self._codes()
        return [codes.get(rank) for rank in range(self.size)]

    def _evaluate_beside(self) -> None:
        if self.job.what != records.TRAIN or time.monotonic() - self._looked_at < beside.LOCAL_POLL_S:
            return
        self._looked_at = time.monotonic()
        try:
            beside.launch_due(self.run, self.job)
        except (HpcsslError, OSError, ValueError):  # a training never ends for want of an evaluation
            LOG.exception("evaluations beside the training wait for its end")
            self._looked_at = math.inf

    def _warn_in_time(self, alive: list[procs.Process]) -> None:
        """The signal that SLURM would send before the time limit."""
        if self._limit is None or self._warned or time.monotonic() - self._began < self._limit - self._lead:
            return
        self._warned = True
        records.note(self.run, "signal", self.job.job, restart=self.number - 1, cause="timeout")
        procs.send(alive, signal.SIGCONT, signal.Signals[f"SIG{self._signal}"])

    def _end_if_asked(self, alive: list[procs.Process]) -> None:
        if self._ended_at is None:
            over = self._limit is not None and time.monotonic() - self._began > self._limit
            cancelled = records.cancelled(self.run, self.job.job)
            if over or self.stop.is_set() or cancelled:
                self._ended_at = time.monotonic()
                self.asked = "cancelled" if cancelled else "timeout" if over else "stopped"
                procs.send(alive, signal.SIGCONT, signal.SIGTERM)
        elif time.monotonic() - self._ended_at > KILL_WAIT_S:
            procs.send(alive, signal.SIGKILL)

    def _end_if_crashed(self, alive: list[procs.Process]) -> None:
        codes = self._codes()  # after ``alive`` was read: who is missing there has written its code, or never will
        living = {int(procs.environment(p.pid).get("SUBMITIT_LOCAL_GLOBALID", -1)) for p in alive}
        self._seen |= living
        if not alive or len(alive) == self.size:
            return
        dead = [k for k in range(self.size) if k in self._seen and k not in living and k not in codes]
        if not dead and all(code in (EXIT_DONE, EXIT_STOPPED) for code in codes.values()):
            return
        if self._bad_since is None:
            self._bad_since, self.dead = time.monotonic(), dead
        elif time.monotonic() - self._bad_since > CRASH_WAIT_S:
            procs.send(alive, signal.SIGKILL)

    def _codes(self) -> dict[int, int]:
        return {x["rank"]: x["code"] for x in records.of(self.run, "exit", self.job.job)
                if x["attempt"] == self.number}


def work(run: RunDir, job: records.Job, stop: StopFlag) -> int:
    """Attempts of one job until it is done or nobody asks for another one; its exit code."""
    while True:
        if records.cancelled(run, job.job) or stop.is_set():
            return _ended(run, job, EXIT_STOPPED, "cancelled" if not stop.is_set() else "the supervisor was stopped")
        attempt = Attempt(run, job, attempts.next_number(run, job.what), stop)
        try:
            trust.check(run.root)
        except (HpcsslError, OSError) as error:
            return _ended(run, job, EXIT_FAILED, str(error))
        attempt.start()
        codes = attempt.wait()
        LOG.info("%s: attempt %d ended with %s", job.job, attempt.number, codes)
        mine = [a for a in attempts.history(run, job.what) if a.number == attempt.number]
        if all(code == EXIT_DONE for code in codes) or (mine and mine[0].cause == "done"):
            return _ended(run, job, EXIT_DONE, "")  # whatever ended a task after that
        if all(code == EXIT_STOPPED for code in codes):
            continue  # every rank saved and left by itself
        if attempt.asked and not any(a.cause for a in mine):
            attempts.end(run, job.what, attempt.about, attempt.asked, f"had not saved within {KILL_WAIT_S:g} s")
            continue
        verdict = attempts.settle(run, job.what, attempt.about, _epitaph(codes, attempt.dead), sure=bool(attempt.dead))
        LOG.info("%s: %s", job.job, verdict.why)
        if not verdict.again and not records.cancelled(run, job.job):
            worst = next((c for c in codes if c not in (None, EXIT_DONE, EXIT_STOPPED)), EXIT_FAILED)
            return _ended(run, job, worst, verdict.why)


def supervise(run: RunDir, base: str) -> int:
    """The jobs of this supervisor, in order; an evaluation of the last weights once the training has succeeded."""
    stop, code = StopFlag().install(signal.SIGINT), EXIT_DONE
    jobs = local.of_base(run, base)
    if all(job.beside for job in jobs):
        os.nice(10)  # a training uses the same cores
    while jobs:
        for job in jobs:
            parent = EXIT_DONE if job.what == records.TRAIN or job.beside else _training_ended(run, job, stop)
            if parent == EXIT_DONE:
                code = work(run, job, stop) or code
            else:
                code = _ended(run, job, parent, "DependencyNeverSatisfied: the training did not succeed")
        jobs = beside.more(run, base) if jobs[0].beside and not stop.is_set() else []
    return code


def _training_ended(run: RunDir, job: records.Job, stop: StopFlag) -> int:
    """How the training ended that an evaluation waits for, which may have another supervisor."""
    while not run.finished:
        train = records.submitted(run).get(records.TRAIN)
        state = watch.state_of(run, train) if train else sched.State(sched.GONE)
        if not state.live:
            return EXIT_STOPPED if state.name == "CANCELLED" else EXIT_FAILED
        if stop.is_set() or records.cancelled(run, job.job):
            return EXIT_STOPPED
        time.sleep(POLL_S)
    return EXIT_DONE


def _ended(run: RunDir, job: records.Job, code: int, why: str) -> int:
    records.note(run, "ended", job.job, code=code, why=why)
    return code


def _epitaph(codes: list[int | None], first: list[int]) -> str:
    dead = first or [rank for rank, code in enumerate(codes) if code is None]
    if not dead:
        return f"exit codes {codes}"
    return f"rank {', '.join(map(str, dead))} died without a word: killed, perhaps for want of memory"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    sys.exit(supervise(RunDir(sys.argv[1]), sys.argv[2]))
