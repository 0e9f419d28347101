"""The part ``runs`` of ``benchmarks/size.py``: what it takes to look at many long runs.

A short training of the scanned digits with an evaluation is copied, and every copy gets a journal of many steps and
many attempts. The commands run as a person types them. What one run takes is mostly their imports.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.whole_set import write_journal

RUNS, ATTEMPTS = 40, 100


def _run(*words: str) -> tuple[float, float]:
    """Run a command, and return its wall and CPU seconds."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"benchmarks.size: `{' '.join(words)}` failed: {errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def write_runs(folder: Path, steps: int) -> list[str]:
    """Write run folders that share the bytes of one journal, and return their paths."""
    _run("data_prep", "digits", str(folder / "digits"))
    first = folder / "runs" / "run-00"
    data = [f"data.{part}={folder / 'digits' / part}" for part in ("train", "val")]
    options = ["machine.devices=cpu", "schedule.steps=6", "schedule.warmup_epochs=0", "optim.batch=64"]
    _run("hpcssl", "train", "digits_msf", "--run", str(first), *data, *options)
    _run("hpcssl", "eval", "knn", "--run", str(first))
    attempts = (first / "attempts.jsonl").read_text()
    (first / "attempts.jsonl").write_text(attempts * ATTEMPTS)
    write_journal(folder / "journal.jsonl", steps)
    (first / "journal.jsonl").unlink()
    paths = [first, *(folder / "runs" / f"run-{number:02d}" for number in range(1, RUNS))]
    for path in paths[1:]:
        shutil.copytree(first, path)
    for path in paths:
        os.link(folder / "journal.jsonl", path / "journal.jsonl")
    return [str(path) for path in paths]


def measure_runs(folder: Path, quick: bool) -> dict[str, Any]:
    """Status, tables and curves of many long runs."""
    steps = 5000 if quick else 300_000
    paths = write_runs(folder, steps)
    result = {}
    commands = {
        "hpcssl-submit status": ("slurm", "status"),
        "hpcssl-submit status --time": ("slurm", "status", "--time"),
        "hpcssl results": ("hpcssl", "results"),
        "hpcssl results --plots": ("hpcssl", "results", "--plots", str(folder / "plots")),
    }
    for name, words in commands.items():
        one, many = _run(*words, paths[0]), _run(*words, *paths)
        result[f"{RUNS} runs of {steps} steps and {ATTEMPTS} attempts: {name}"] = (
            f"{many[0]:.2f} s ({many[1]:.2f} s of CPU); one run {one[0]:.2f} s ({one[1]:.2f} s of CPU)"
        )
    return result
