"""What a checkpoint costs the training: ``python -m benchmarks saving [--recipe NAME] [--batch N] [--out FILE]``.

The real state of a run on one process: by default MSF's ResNet-50 pair with its optimiser and a full bank of 128,000
rows (``msf_r50_ep200_128k``), saved as the loop saves it, on the disk of ``--folder``. A periodic save blocks the
training twice: while the state is copied (``journal.sync`` and ``begin``), and while the ranks agree that all parts are
written and the manifest is sealed (``finish``); between the two, training steps run beside the writing, and what they
lose by that is reported too. On a signal nothing runs beside it: from the flag to the manifest on the disk.

Goals: blocked for at most the time of one step, and durable within 5 s of the flag. A step on a CPU is a step of
``--batch`` images (the recipe's own batch would take minutes), with the processor's cores; the figure of the whole
batch on a GPU is not this one's. Beside them: the same bytes written and fsynced by one plain copy of a file, which is
what the disk allows, and CPU seconds, which other programs on the machine disturb least. Run it on a machine that has
nothing else to do: the load average before it is in the report.
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

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import common
from hpcssl import rng
from hpcssl.data.loader import Batch
from hpcssl.files import RunDir
from hpcssl.journal import Journal
from hpcssl.train import recipe
from hpcssl.train.checkpoint import Store, newest_valid
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.world import World

DURABLE_S = 5.0
IMAGES, MIB = 160_000, 2**20


def prepared(name: str, batch: int) -> Training:
    """The training of a recipe after its first step, which makes the optimiser's state; the bank is full from the start
    with random rows, as in the official code."""
    made = recipe.compose(name, [f"optim.batch={batch}", "optim.precision=fp32", "model.norm=whole",
                                 "model.norm_group=0", "machine.devices=cpu", "machine.accumulate=1"])
    training = Training(made, World.alone(), steps_per_epoch=IMAGES // batch, labels=np.full(IMAGES, -1),
                        data_digest="given")
    pictures = torch.randn(batch, 3, 7, 7, generator=rng.generator(0))
    images = [F.interpolate(pictures, view.size, mode="bicubic") for view in training.plan.views]
    training.images = lambda _: list(images)
    step(training)
    return training


def step(training: Training) -> float:
    """Seconds of one step on given images."""
    size = training.recipe.optim.batch
    index = rng.permutation(rng.key(0, "batch", training.step), IMAGES)[:size]
    start = time.perf_counter()
    report = train_step(training, Batch(training.step, 1, index, np.full(size, -1), [], []))
    if not report.taken:
        raise SystemExit("benchmarks.saving: the step was refused: its loss is not finite")
    return time.perf_counter() - start


class Peak:
    """The most resident memory above what there was at the start, in bytes, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self._base, self.bytes, self._over = _resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, _resident() - self._base)

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def periodic(training: Training, store: Store, journal: Journal) -> dict[str, float]:
    """One save beside the training, as ``Loop`` does it: seconds by what they went into."""
    journal.write(training.step, loss=0.0)
    started, cpu = time.perf_counter(), time.thread_time()
    journal.sync()
    synced = time.perf_counter()
    store.begin(training.state())
    begun, cpu = time.perf_counter(), time.thread_time() - cpu
    beside = [step(training)]
    while store.busy:
        beside.append(step(training))
    busy, late = time.perf_counter(), time.thread_time()
    failed = store.finish()
    if failed:
        raise SystemExit(f"benchmarks.saving: {failed}")
    return {"cpu": cpu + time.thread_time() - late,
            "sync": synced - started, "begin": begun - synced, "finish": time.perf_counter() - busy,
            "beside": statistics.median(beside)}


def signalled(training: Training, store: Store, journal: Journal) -> tuple[float, float]:
    """Seconds from the flag at a step's end to the manifest on the disk, as ``Loop._stop``; and CPU seconds of it."""
    step(training)
    journal.write(training.step, loss=0.0)
    started, cpu = time.perf_counter(), time.process_time()
    journal.sync()
    failed = store.save(training.state())
    if failed:
        raise SystemExit(f"benchmarks.saving: {failed}")
    return time.perf_counter() - started, time.process_time() - cpu


def plain_copy(source: Path, target: Path) -> float:
    """Seconds that the same bytes take to the same disk, read from the cache, written and fsynced."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    took = time.perf_counter() - started
    target.unlink()
    return took


def measure(name: str, batch: int, folder: Path, rounds: int, threads: int) -> dict:
    load = os.getloadavg()[0]
    training = prepared(name, batch)
    run = RunDir(folder / "run")
    store = Store(run, training.world)
    journal = Journal(run, training.world, first_step=0, last_step=10**9, every=10**9, batch=batch)
    with Peak() as peak:
        first = periodic(training, store, journal)  # makes the host copy, whose memory the later ones take again
    saves, stops, copies, steps = [], [], [], [step(training) for _ in range(rounds)]
    with Peak() as later:
        for turn in range(rounds):
            saves.append(periodic(training, store, journal))
            stops.append(signalled(training, store, journal))
            part = newest_valid(run)[0].folder / "part-0.safetensors"
            copies.append(plain_copy(part, folder / f"copy-{turn}"))
    journal.close()
    blocked = [s["sync"] + s["begin"] + s["finish"] for s in saves]
    alone, durable = statistics.median(steps), statistics.median(wall for wall, _ in stops)
    size = part.stat().st_size

    def met(value: float, limit: float) -> str:
        return f"{value:.3f} (goal {limit:.3f}: {'met' if value <= limit else 'missed'})"

    return {
        "machine": {"load average before": round(load, 2)},
        "state": {"bytes": size, "tensors": len(training.state().tensors), "bank rows": training.bank.size},
        "a periodic save": {
            "blocked, s (goal: one step)": met(statistics.median(blocked), alone),
            "worst of the saves, s": round(max(blocked), 3),
            "blocked, CPU s": round(statistics.median(s["cpu"] for s in saves), 3),
            "the first save, which makes the host copy, s": round(first["sync"] + first["begin"] + first["finish"], 3),
            "journal.sync, s": round(statistics.median(s["sync"] for s in saves), 4),
            "begin, s": round(statistics.median(s["begin"] for s in saves), 3),
            "finish, s": round(statistics.median(s["finish"] for s in saves), 3),
            f"one step of {batch} images alone, {threads} threads, s": round(alone, 3),
            "one step beside the writing, s": round(statistics.median(s["beside"] for s in saves), 3)},
        "a signal": {"flag to durable, s": met(durable, DURABLE_S),
                     "worst, s": round(max(wall for wall, _ in stops), 3),
                     "CPU s of all threads": round(statistics.median(cpu for _, cpu in stops), 3),
                     "plain copy and fsync of the same bytes, s": round(statistics.median(copies), 3)},
        "memory": {"peak of the first save, MiB": round(peak.bytes / MIB), "of which host copy, MiB": round(size / MIB),
                   "peak of later saves, MiB": round(later.bytes / MIB)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.saving", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="msf_r50_ep200_128k")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        body = measure(options.recipe, options.batch, Path(folder), options.rounds, options.threads)
    common.report("saving", f"{options.recipe} on one process: a checkpoint beside the training and at a stop; medians "
                  f"of {options.rounds}", body, options.out)
    return int("missed" in str(body))


if __name__ == "__main__":
    sys.exit(main())
