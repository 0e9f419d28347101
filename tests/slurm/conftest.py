"""A real SLURM for the tests, and a trainer without torch."""

from __future__ import annotations

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

def train(run, *, stop, requeue, attempt):
    told = json.loads((run.root / "told.json").read_text())
    rank = int(os.environ.get("RANK", "0"))
    state = run.root / f"state-{rank}"
    step = int(state.read_text()) if state.exists() else 0
    place = {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "HPCSSL_TOKEN")}
    append_line(run.root / "places.jsonl", {"attempt": attempt["attempt"], **place})
    if rank == 0:
        append_line(run.attempts, {**attempt, "event": "start", "first_step": step})
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
