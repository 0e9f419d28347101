"""What a checkpoint costs the training: ``python -m benchmarks saving [--recipe NAME] [--batch N] [--out FILE]``.

The full state of a run on one process is saved as the training loop saves it, on the disk of ``--folder``. By default
it is MSF's pair of ResNet-50 with its optimizer and a full bank of 128,000 rows (``msf_r50_ep200_128k``).

A periodic save blocks the training twice: while the state is copied (``journal.sync`` and ``begin``), and while the
ranks agree that all parts are written and rank 0 writes the manifest (``finish``). In between, training steps run
while the parts are written; how much slower they are is reported too. After a signal nothing runs at the same time:
the time is measured from the flag to the manifest on the disk.

Goals: the training is blocked for at most the time of one step, and the state is durable within 5 s of the flag. A step
on a CPU is a step of ``--batch`` images (the recipe's own batch would take minutes) on the cores of the processor; a
step of the whole batch on a GPU takes another time. Two more figures help to interpret them: the time to write and
fsync the same bytes as a plain copy, which is what the disk allows, and CPU seconds, which other programs on the
machine disturb least. Run it on a machine without other load: the report has the load average from before.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import common
from hpcssl import rng
from hpcssl.checkpoint.manager import CheckpointManager
from hpcssl.checkpoint.reader import latest_valid
from hpcssl.data.batch import Batch
from hpcssl.distributed.world import World
from hpcssl.journal import Journal
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState

MAX_DURABLE_S = 5.0
IMAGES, MIB = 160_000, 2**20


def build_training(name: str, batch: int) -> TrainState:
    """Build the training of a recipe, and take its first step, which creates the optimizer's state.

    The bank is full from the start with random rows, as in the official code.

    Args:
        name: The recipe.
        batch: Images per step.
    """
    composed = recipe.compose(
        name,
        [
            f"optim.batch={batch}",
            "optim.precision=fp32",
            "model.norm=sync",
            "model.norm_group_size=0",
            "machine.devices=cpu",
            "machine.accumulation_steps=1",
        ],
    )
    training = TrainState(
        composed,
        World.single_process(),
        steps_per_epoch=IMAGES // batch,
        labels=np.full(IMAGES, -1),
        data_digest="given",
    )
    pictures = torch.randn(batch, 3, 7, 7, generator=rng.generator(0))
    images = [F.interpolate(pictures, view.size, mode="bicubic") for view in training.plan.views]
    setattr(training, "images", lambda *_: list(images))  # noqa: B010 - in place of a method
    take_step(training)
    return training


def take_step(training: TrainState) -> float:
    """Take one step on fixed images. Returns its duration in seconds."""
    size = training.recipe.optim.batch
    index = rng.permutation(rng.key(0, "batch", training.step), IMAGES)[:size]
    start = time.perf_counter()
    report = train_step(training, Batch(training.step, 1, index, np.full(size, -1), [], []))
    if not report.taken:
        raise SystemExit("benchmarks.saving: the step was not taken: its loss is not finite")
    return time.perf_counter() - start


class PeakMemory:
    """The largest resident memory within a ``with`` block, beyond that at its start. Sampled every 5 ms.

    Attributes:
        bytes: The peak in bytes.
    """

    def __enter__(self) -> PeakMemory:
        self._base, self.bytes, self._over = _resident_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, _resident_bytes() - self._base)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def time_periodic_save(training: TrainState, checkpoints: CheckpointManager, journal: Journal) -> dict[str, float]:
    """Save while the training goes on, as the training loop does it.

    Returns:
        Seconds: ``sync``, ``begin`` and ``finish`` (which block the training), ``cpu`` (CPU time of these three) and
        ``step`` (median of the steps in between).
    """
    journal.write(training.step, loss=0.0)
    start, cpu = time.perf_counter(), time.thread_time()
    journal.sync()
    synced = time.perf_counter()
    checkpoints.begin(training.state())
    begun, cpu = time.perf_counter(), time.thread_time() - cpu
    steps = [take_step(training)]
    while checkpoints.busy:
        steps.append(take_step(training))
    written, cpu_before_finish = time.perf_counter(), time.thread_time()
    problem = checkpoints.finish()
    if problem:
        raise SystemExit(f"benchmarks.saving: {problem}")
    return {
        "cpu": cpu + time.thread_time() - cpu_before_finish,
        "sync": synced - start,
        "begin": begun - synced,
        "finish": time.perf_counter() - written,
        "step": statistics.median(steps),
    }


def time_save_after_signal(
    training: TrainState, checkpoints: CheckpointManager, journal: Journal
) -> tuple[float, float]:
    """Save as the training loop does it after a signal.

    Returns:
        Seconds from the flag at the end of a step to the manifest on the disk, and CPU seconds of all threads.
    """
    take_step(training)
    journal.write(training.step, loss=0.0)
    start, cpu = time.perf_counter(), time.process_time()
    journal.sync()
    problem = checkpoints.save(training.state())
    if problem:
        raise SystemExit(f"benchmarks.saving: {problem}")
    return time.perf_counter() - start, time.process_time() - cpu


def time_plain_copy(source: Path, target: Path) -> float:
    """Copy a file from the page cache to the disk, with fsync, and remove the copy. Returns the seconds."""
    start = time.perf_counter()
    shutil.copyfile(source, target)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def measure(name: str, batch: int, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Measure saves of one recipe.

    Args:
        name: The recipe.
        batch: Images per step.
        folder: A folder on the disk to measure.
        rounds: How many saves of each kind.
        threads: CPU threads, for the report.

    Returns:
        The sections of the report.
    """
    load = os.getloadavg()[0]
    training = build_training(name, batch)
    run = RunDir(folder / "run")
    checkpoints = CheckpointManager(run, training.world)
    journal = Journal(run, training.world, first_step=0, last_step=10**9, every=10**9, batch=batch)
    with PeakMemory() as first_peak:  # the first save allocates the host copy, which the later ones use again
        first = time_periodic_save(training, checkpoints, journal)
    saves, stops, copies = [], [], []
    steps = [take_step(training) for _ in range(rounds)]
    with PeakMemory() as later_peak:
        for turn in range(rounds):
            saves.append(time_periodic_save(training, checkpoints, journal))
            stops.append(time_save_after_signal(training, checkpoints, journal))
            saved, _ = latest_valid(run)
            assert saved is not None  # it was saved right before
            part = saved.folder / "part-0.safetensors"
            copies.append(time_plain_copy(part, folder / f"copy-{turn}"))
    journal.close()
    size = part.stat().st_size
    step_s = statistics.median(steps)
    return {
        "machine": {"load average before": round(load, 2)},
        "state": {
            "bytes": size,
            "tensors": len(training.state().tensors),
            "bank rows": training.bank.size if training.bank is not None else 0,
        },
        "a periodic save": _summarize_saves(
            first, saves, step_s, f"one step of {batch} images alone, {threads} threads"
        ),
        "a signal": {
            "flag to durable, s": _compare(statistics.median(wall for wall, _ in stops), MAX_DURABLE_S),
            "worst, s": round(max(wall for wall, _ in stops), 3),
            "CPU s of all threads": round(statistics.median(cpu for _, cpu in stops), 3),
            "plain copy and fsync of the same bytes, s": round(statistics.median(copies), 3),
        },
        "memory": {
            "peak of the first save, MiB": round(first_peak.bytes / MIB),
            "of which host copy, MiB": round(size / MIB),
            "peak of later saves, MiB": round(later_peak.bytes / MIB),
        },
    }


def _summarize_saves(
    first: dict[str, float], saves: list[dict[str, float]], step_s: float, step_name: str
) -> dict[str, Any]:
    """The section about periodic saves. ``step_s``: seconds of a step without a save."""

    def blocked(save: dict[str, float]) -> float:
        return save["sync"] + save["begin"] + save["finish"]

    def median(name: str) -> float:
        return statistics.median(save[name] for save in saves)

    return {
        "blocked, s (goal: one step)": _compare(statistics.median(map(blocked, saves)), step_s),
        "worst of the saves, s": round(max(map(blocked, saves)), 3),
        "blocked, CPU s": round(median("cpu"), 3),
        "the first save, which makes the host copy, s": round(blocked(first), 3),
        "journal.sync, s": round(median("sync"), 4),
        "begin, s": round(median("begin"), 3),
        "finish, s": round(median("finish"), 3),
        f"{step_name}, s": round(step_s, 3),
        "one step during the writing, s": round(median("step"), 3),
    }


def _compare(value: float, limit: float) -> str:
    return f"{value:.3f} (goal {limit:.3f}: {'met' if value <= limit else 'missed'})"


def main() -> int:
    """Run the command line. Returns 1 if a goal was missed, else 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.saving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="msf_r50_ep200_128k", help="the recipe whose state is saved")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        body = measure(options.recipe, options.batch, Path(folder), options.rounds, options.threads)
    common.report(
        "saving",
        f"{options.recipe} on one process: a checkpoint during the training and at a stop; medians of {options.rounds}",
        body,
        options.out,
    )
    return int("missed" in str(body))


if __name__ == "__main__":
    sys.exit(main())
