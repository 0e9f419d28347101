"""A training on the loopback cluster as the soak sees it: its job, its tasks, how far it is, and how it comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import loopback
from hpcssl.files import RunDir
from slurm import attempts, procs, records

PERIOD = 5
"""Steps between two checkpoints."""
RECIPE = ["digits_msf", "optim.batch=32", "bank.size=256", "machine.devices=cpu", "machine.log_steps=1",
          f"machine.checkpoint_steps={PERIOD}", "machine.checkpoint_minutes=0", "machine.hang_minutes=0.5"]
FOUR = ["-N2", "--ntasks-per-node=2", "--time=60"]
POLL_S = 0.2
PATIENCE = 3
"""How often somebody submits again what has ended, until something else is done about it."""
FAR = 50
"""After so many steps nobody takes notice any more of what has struck."""
REFUSED_S = 2.0
"""A node that has just ended a job refuses to start it again ("already killed") for a moment."""


class Stuck(Exception):
    """The training did not come back by itself."""


@dataclass
class Trainer:
    """How a training of ``steps`` steps is submitted, and what it has come to. Both are the doors' own commands."""

    data: Path
    steps: int

    def words(self, run: RunDir) -> list[str]:
        return [*RECIPE[:1], "--run", str(run.root), *RECIPE[1:], f"schedule.steps={self.steps}",
                f"data.train={self.data}"]

    def submit(self, run: RunDir) -> str:
        """The id of the job; the same command again goes on with what is there."""
        words = self.words(run)
        return say("slurm", *words[:3], *FOUR, *words[3:]).splitlines()[0].split()[-1]

    def digest(self, run: RunDir) -> str:
        return say("hpcssl", "digest", str(run.root)).strip()


def say(*words: str) -> str:
    """Output of one of the doors, as a person would call it."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Stuck(f"`{' '.join(words[:3])}`: exit code {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


@dataclass
class Before:
    """What the training was when a bout began."""

    attempt: int
    step: int


@dataclass
class After:
    """How it came back. ``peak``: the last step that was finished before. ``first``: where the attempt that goes on has
    begun; the peak itself where none had to. ``causes``: ends of the attempts between. ``resubmitted``: why SLURM no
    longer had the job, each time that the same command had to be typed again."""

    peak: int
    first: int
    causes: list[str]
    saving: bool = False
    resubmitted: list[str] = field(default_factory=list)


class Scene:
    """One training and the cluster it runs on."""

    def __init__(self, cluster: loopback.Cluster, run: RunDir, trainer: Trainer, say: Callable[[str], None] = print):
        self.cluster, self.run, self.trainer, self.say = cluster, run, trainer, say
        self.job = trainer.submit(run)
        self.resubmitted: list[str] = []
        self.struck: set[int] = set()
        """The tasks that the present bout has met first."""
        self.left_over: list[subprocess.Popen] = []
        self._requeued_at: float | None = None

    # -- what is -------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.run.done.exists()

    def step(self) -> int:
        """The last step that the journal knows."""
        return int(attempts.newest(self.run.journal).get("step") or 0)

    def attempt(self) -> attempts.Attempt | None:
        return next(iter(attempts.history(self.run)[-1:]), None)

    def now(self) -> Before:
        newest = self.attempt()
        return Before(newest.number if newest else 0, self.step())

    def tasks(self) -> dict[int, int]:
        return loopback.tasks_of(self.job)

    def processes(self, *words: str) -> list[int]:
        """Pids of the job's living processes whose command line has one of the words: ``slurm_script``, ``srun``."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                pid = int(folder.name)
                mine = f"[{self.job}." in line or procs.environment(pid).get("SLURM_JOB_ID") == self.job
                state = procs.look(pid)
                if mine and any(word in line for word in words) and state is not None and state.alive:
                    found.append(pid)
        return sorted(found)

    # -- what is done ---------------------------------------------------------------------------------------------

    def kill(self, *pids: int, number: int = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def tend(self) -> None:
        """What a day on a cluster brings by itself: a requeued job starts (without SLURM's two minutes of waiting), a
        held one is released, and a person submits again what SLURM no longer has."""
        about = self.cluster("scontrol", "show", "job", "-o", self.job)
        if not about:
            return  # no controller just now
        fields = dict(w.split("=", 1) for w in about.split() if "=" in w)
        state, reason = fields.get("JobState", ""), fields.get("Reason", "")
        if state == "PENDING" and reason == "BeginTime":
            self._requeued_at = self._requeued_at or time.monotonic()
            if time.monotonic() - self._requeued_at > REFUSED_S:
                self.cluster("scontrol", "update", f"jobid={self.job}", "StartTime=now")
            return
        self._requeued_at = None
        if state == "PENDING" and "held" in reason.lower():
            self.say(f"  {reason}: released")
            self.cluster("scontrol", "release", self.job)
        elif state in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "COMPLETED", "PREEMPTED", "BOOT_FAIL") \
                and not self.done:
            later = records.submitted(self.run)[records.TRAIN].job
            if later != self.job:
                self.say(f"  job {later} takes over from job {self.job}")
                self.job = later
                return
            why = attempts.verdict(attempts.history(self.run))
            code = f"{state}, exit code {fields.get('ExitCode')}"
            self.resubmitted.append(code if why.again else f"{code}: {why.why}")
            self.say(f"  job {self.job} is {self.resubmitted[-1]}; submitted again")
            self.job = self.trainer.submit(self.run)

    def until(self, true: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
        """Tend the training until something is so, or it is finished. Raises ``Stuck``."""
        limit, submitted = time.monotonic() + seconds, len(self.resubmitted)
        while not true() and not self.done:
            if time.monotonic() > limit or len(self.resubmitted) > submitted + PATIENCE:
                raise Stuck(f"no {what} within {seconds:g} s; {'; '.join(self.resubmitted[submitted:])}")
            self.tend()
            time.sleep(POLL_S)

    def starting(self, old: set[int]) -> None:
        """Wait until the tasks of the next attempt are there, and none of the old ones."""
        self.until(lambda: len(now := set(self.tasks().values())) == 4 and not now & old, "next attempt's tasks")

    def back(self, before: Before, restarts: bool) -> After:
        """Wait until the training goes on: in another attempt where it ``restarts``, unless it has gone far without."""
        goal = before.step + (FAR if restarts else 0)
        peak, saving, told = before.step, False, len(self.resubmitted)

        def goes_on() -> bool:
            nonlocal peak, saving
            newest, step = self.attempt(), self.step()
            if newest is None or newest.number <= before.attempt:  # the next one will cut the journal back
                peak = max(peak, step)
                saving = peak // PERIOD * PERIOD > self.sealed()
                return step > goal and newest is not None and newest.cause is None
            # a line that was written after the start of the attempt was said is this attempt's
            own = _written(self.run.journal) > _written(self.run.attempts)
            return newest.cause is None and own and step > newest.first_step
        self.until(goes_on, "further step")
        passed = [a for a in attempts.history(self.run) if a.number >= before.attempt]
        ended = [a for a in passed if a.cause is not None]
        first = passed[-1].first_step if passed and passed[-1].number > before.attempt else peak
        return After(peak, first, [a.cause for a in ended], saving, self.resubmitted[told:])

    def sealed(self) -> int:
        """Step of the newest checkpoint that has a manifest; 0 before there is one."""
        steps = [int(f.name[5:]) for f in self.checkpoints() if (f / "manifest.json").exists()]
        return max(steps, default=0)

    def saving(self) -> bool:
        """Whether a periodic save has begun that has no manifest yet."""
        steps = [int(f.name[5:]) for f in self.checkpoints()]
        return any(step % PERIOD == 0 and step > self.sealed() for step in steps)

    def checkpoints(self) -> list[Path]:
        """Folders of checkpoints, oldest first."""
        return sorted(self.run.checkpoints.glob("step-*")) if self.run.checkpoints.is_dir() else []

    def finish(self) -> str:
        """Wait for the end of the training; the digest of what it has come to."""
        self.until(lambda: False, "end of the training", 900)
        return self.trainer.digest(self.run)

    def about(self) -> str:
        """What a person would want to see of a training that is stuck."""
        lines = [json.dumps(vars(a)) for a in attempts.history(self.run)[-3:]]
        logs = sorted(self.run.logs.glob(f"{self.job}_*.err"))
        return "\n".join([self.cluster("scontrol", "show", "job", self.job), *lines,
                          *(f"== {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-12:])
                            for p in logs)])


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
