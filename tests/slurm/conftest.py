"""A real SLURM for the tests, and a trainer without torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import loopback


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A private SLURM of two nodes with four CPUs each; partitions ``main`` (preemptable), ``cancel`` (preempted
    jobs are cancelled, without grace) and ``high``. Jobs are requeued only where they ask for it themselves."""
    if why := loopback.missing():
        pytest.skip(why)
    made = loopback.Cluster(tmp_path_factory.mktemp("cluster"))
    before = os.environ.get("SLURM_CONF")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


STAND_IN = '''
"""Instead of the trainer: counts steps, stops, crashes and finishes as RUN/told.json says. Starts in no time."""

import json, os, time
from hpcssl.files import append_line, atomic_write

def train(run, *, stop, requeue, attempt, **_):
    told = json.loads((run.root / "told.json").read_text())
    rank = int(os.environ.get("RANK", "0"))
    state = run.root / f"state-{rank}"
    step = int(state.read_text()) if state.exists() else 0
    place = {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "HPCSSL_TOKEN")}
    append_line(run.root / "places.jsonl", {"attempt": attempt["attempt"], **place})
    if rank == 0:
        append_line(run.attempts, {**attempt, "event": "start", "first_step": step, "time": time.time()})
    def end(cause, **more):
        if rank == 0:
            append_line(run.attempts, {**attempt, "event": "end", "cause": cause, "last_step": step, **more})
    while step < told["steps"]:
        if stop.is_set():
            atomic_write(state, str(step))
            if rank == 0:
                cause, answer = requeue([stop.reason])
                end(cause, signals=[stop.reason])
                append_line(run.root / "answers.jsonl", {"answer": answer})
            return 75
        if step == told.get("crash_at") and rank == told.get("crash_rank", 0):
            end("error", why="the stand-in was told to crash")
            raise RuntimeError("told to crash")
        step += 1
        if rank == 0:
            append_line(run.journal, {"step": step})
            if step in told.get("export", []):
                atomic_write(run.weights_at(step), "weights")
        time.sleep(told.get("step_s", 0.02))
    end("done")
    atomic_write(state, str(step))
    if rank == 0:
        atomic_write(run.done, json.dumps({"step": step, "weights": ""}))
    return 0
'''

STAND_IN_EVALUATION = '''
import json, os, time
from dataclasses import replace
from hpcssl.files import append_line, read_lines
from slurm import attempts, chain

def evaluate(run, what, *, stop, requeue, attempt):
    attempts.begin(run, what, attempt)
    asked = chain.entry(what)
    if what in json.loads((run.root / "told.json").read_text()).get("crash", []):
        raise RuntimeError("the stand-in was told to crash")
    for _ in range(10):
        if stop.is_set():
            cause, _ = requeue([stop.reason])
            attempts.end(run, what, attempt, cause)
            return 75
        time.sleep(0.02)
    for name in (what, *(str(replace(asked, step=step)) for step in chain.left_over(run, asked))):
        if not any(row["eval"] == name for row in read_lines(run.eval_rows(asked.name))):
            append_line(run.eval_rows(asked.name), {"eval": name, "trained": run.done.exists()})
    attempts.end(run, what, attempt, "done")
    return 0
'''


@pytest.fixture
def stand_in(tmp_path):
    """A run folder whose frozen code has a trainer and an evaluation without torch: seconds become tenths."""
    from hpcssl.files import RunDir
    from slurm import freeze

    def make(**told) -> RunDir:
        run = RunDir(tmp_path / "run")
        freeze.freeze(run)
        run.logs.mkdir()
        (run.code / "hpcssl" / "run.py").write_text(STAND_IN)
        (run.code / "slurm" / "evaluate.py").write_text(STAND_IN_EVALUATION)
        (run.root / "told.json").write_text(json.dumps({"steps": 30, **told}))
        return run

    return make


@pytest.fixture(scope="session")
def until():
    """Wait for something to become true, and fail with its name."""
    def wait(true, what: str, seconds: float = 30):
        limit = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < limit, f"no {what} within {seconds} s"
            time.sleep(0.05)
        return found

    return wait


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of the scanned digits, made once per test session."""
    root = tmp_path_factory.getbasetemp() / "digits"
    if not root.exists():
        subprocess.run([sys.executable, "-m", "data_prep", "digits", str(root)], check=True, capture_output=True)
    return root


class Runner:
    """A job of the stand-in on SLURM or on this machine: the same scenario is played on both."""

    def __init__(self, cluster: loopback.Cluster | None):
        self.cluster, self.run, self.job = cluster, None, ""

    def submit(self, run, what: str = "train", **sbatch) -> str:
        from slurm import local, script
        from slurm.cluster import Profile

        self.run, options = run, {"ntasks-per-node": "2", **sbatch}
        if self.cluster is None:
            self.job = local.launch(run, {what: options})[0].job
        else:
            self.job = script.submit(run, what, {"nodes": "2", **options, "ntasks-per-node": "1"}, Profile())
        return self.job

    def submit_training(self, run, *words: str) -> None:
        """A real training of two ranks, by the command line."""
        from slurm import records

        size = ["--local", "--ntasks-per-node=2"] if self.cluster is None else ["-N2", "--ntasks-per-node=1"]
        done = subprocess.run([sys.executable, "-m", "slurm", "digits_msf", "--run", str(run.root), *size, *words],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.run, self.job = run, records.submitted(run)["train"].job

    @property
    def causes(self) -> list[str | None]:
        from slurm import attempts

        return [a.cause for a in attempts.history(self.run)]

    @property
    def step(self) -> int:
        from slurm import attempts

        return attempts.reached(self.run)

    @property
    def tasks(self) -> dict[int, int]:
        return loopback.tasks_of(self.job)

    def signal(self, who: int | str, *numbers: int) -> None:
        """To one rank, to ``all``, or to another process of the job: ``batch``, ``srun``, ``supervisor``,
        ``controller``."""
        pids = list(self.tasks.values()) if who == "all" else [self.tasks[who]] if isinstance(who, int) else \
            [self._other(who)]
        for number in numbers:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _other(self, who: str) -> int:
        from slurm import local, procs, records

        if self.cluster is None:
            leader = local.supervisor(self.run, records.submitted(self.run)["train"])["pid"]
            if who == "supervisor":
                return leader
            return next(p.pid for p in procs.session(leader) if b"submitit.local._local" in _command(p.pid))
        mark = {"batch": b"/slurm_script", "srun": b"srun"}[who]
        mine = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()
                and procs.environment(int(p.name)).get("SLURM_JOB_ID") == self.job
                and any(word.endswith(mark) for word in _command(int(p.name))[:2])]
        return min(mine)  # srun has a helper process

    def until(self, true, what: str, seconds: float = 60) -> None:
        """Wait, and let requeued jobs go on without SLURM's two minutes of waiting."""
        from slurm import records

        limit = time.monotonic() + seconds
        while not true():
            over = time.monotonic() > limit or records.of(self.run, "ended", self.job)
            assert not over or true(), f"no {what} within {seconds} s: {self.causes}" + self._story()
            if self.cluster is not None:
                self._push()
            time.sleep(0.1)

    def _push(self) -> None:
        for line in self.cluster("squeue", "-h", "-t", "PD", "-o", "%i %r").splitlines():
            job, reason = line.split(maxsplit=1)
            if reason == "BeginTime":  # a node that has just ended a job refuses to start it: "already killed"
                time.sleep(2)
                self.cluster("scontrol", "update", f"jobid={job}", "StartTime=now")

    def reach(self, step: int) -> None:
        self.until(lambda: self.step >= step, f"step {step}")

    def end(self) -> str:
        """Wait for the end of the run's job, whatever its number is then; its state."""
        from slurm import records, watch

        found = []

        def ended() -> bool:
            state = watch.state_of(self.run, records.submitted(self.run)["train"])
            found[:] = [state.name]
            return not state.live
        self.until(ended, "end", 180)
        return found[0]

    def _story(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-1500:] for p in sorted(self.run.logs.glob("*.[oel][ur][tgr]")))


def _command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.fixture(scope="session")
def make_runner():
    return Runner


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slurm)])
def runner(request) -> Runner:
    return Runner(request.getfixturevalue("cluster") if request.param == "slurm" else None)


@pytest.fixture
def on_slurm(cluster) -> Runner:
    return Runner(cluster)
