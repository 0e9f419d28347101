"""What a step costs beside its networks: ``python -m benchmarks overhead [--recipes NAME …] [--out FILE]``.

One process and one thread take steps of a recipe with ResNet-50 at 224 pixels, batch 8, on images that are given, with
a bank of 131,072 rows that is full. Of each step's time that within ``Pair.embed``, ``Pair.embed_target`` and the
backward pass is the encoders'; the rest (search, loss, optimiser, moving average, statistics, bank, ledger) is ours.
The figure is the median over steps of rest / encoders, in CPU time, which other processes disturb least. Goal: 6 %.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from hpcssl import rng
from hpcssl.data.loader import Batch
from hpcssl.nets.pair import Pair
from hpcssl.train import recipe
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.world import World

GOAL = 6.0
BATCH, ROWS, IMAGES, CLASSES, CHUNK = 8, 131_072, 160_000, 1000, 1024
COMMON = [f"optim.batch={BATCH}", "optim.precision=fp32", "model.norm=whole", "model.norm_group=0",
          "machine.devices=cpu", "machine.accumulate=1"]
BANK = f"bank.size={ROWS}"
# every method, and those of its options that add work to a step; not NNCLR's "present encoder", whose bank is passes of
# the encoder anew
RECIPES = {
    "msf_r50_ep200_128k": [BANK],
    "cmsf_2q_r50_ep200_128k": [BANK],
    "cmsf_km_r50_ep200_128k": [BANK],
    "cmsf_sup_r50_ep200": [BANK],
    "cmsf_sup_all_r50_ep200": [BANK],
    "cmsf_semi_r50_ep200": [BANK, "method.pseudo.threshold=0"],  # so that the untrained head's guesses constrain
    "byol_r50_ep200": [],
    "simsiam_r50_ep200": [],
    "moco_v2_r50_ep200": [BANK],
    "simclr_r50_ep200": [],
    "nnclr_r50_ep1000": [BANK],
    "nnclr_r50_ep1000_soft": [BANK],
    "nnsiam_r50_ep1000": [BANK],
    "swav_r50_ep200_mc_b256": ["method.queue_epoch=0", "method.freeze_steps=0"],  # its own queue of 3,840
    "moco_v2_r50_ep200_bsim": [BANK],
    "byol_r50_ep200_wbsim": [],
}


class Stopwatch:
    """CPU seconds spent inside given calls."""

    def __init__(self):
        self.seconds = 0.0

    def around(self, call: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start
        return timed


@contextmanager
def watched() -> Iterator[Stopwatch]:
    watch = Stopwatch()
    with ExitStack() as stack:
        for owner, name in ((Pair, "embed"), (Pair, "embed_target"), (Tensor, "backward")):
            stack.enter_context(mock.patch.object(owner, name, watch.around(getattr(owner, name))))
        yield watch


def prepared(name: str, overrides: list[str]) -> Training:
    """A run in its second epoch: bank, ledger and clusters are full."""
    labels = np.arange(IMAGES) % CLASSES
    made = recipe.compose(name, [*COMMON, *overrides])
    training = Training(made, World.alone(), steps_per_epoch=IMAGES // BATCH, labels=labels, data_digest="given")
    training.step = training.steps_per_epoch + 1  # no step of an epoch's border, which clusters or trains a head
    memories, width = training.memories, made.model.projector.out
    if "groups" in memories:
        groups = torch.from_numpy(rng.permutation(0, IMAGES) % max(1, round(IMAGES / 25.6))).int()
        memories["groups"].load({"images": IMAGES}, lambda _, start, count: groups[start:start + count])
    for index in torch.arange(IMAGES).split(CHUNK):
        draw = rng.generator(rng.key(0, "rows", int(index[0])))
        rows = F.normalize(torch.randn(len(index), width, generator=draw), dim=1)
        for memory in memories.keys() & {"ledger", "labelled"}:
            memories[memory].write(index, rows)
        if training.bank is not None and len(index) <= training.bank.size:
            label = torch.from_numpy(labels)[index]
            columns = {key: rows if spec.dim else label for key, spec in training.bank.columns.items()}
            if "groups" in memories:
                columns["group"] = memories["groups"].of(index)
            elif "ledger" in memories:
                columns["group"] = torch.zeros_like(index)
            training.bank.push(**columns | {"index": index})
    return training


def measure(name: str, overrides: list[str], steps: int) -> dict[str, float]:
    training = prepared(name, overrides)
    pictures = torch.randn(BATCH, 3, 7, 7, generator=rng.generator(0))
    # pictures, and not noise: an untrained network cannot tell noise from noise, and equal rows are searched twice
    images = [F.interpolate(pictures, view.size, mode="bicubic") for view in training.plan.views]
    training.images = lambda batch: list(images)
    found = []
    with watched() as watch:
        for turn in range(steps + 1):
            index = rng.permutation(rng.key(0, "batch", turn), IMAGES)[:BATCH]
            batch = Batch(training.step, 1, index, index % CLASSES, [], [])
            watch.seconds, start = 0.0, time.process_time()
            report = train_step(training, batch)
            whole = time.process_time() - start
            if not report.taken:
                raise SystemExit(f"benchmarks.overhead: {name}: the step was refused: its loss is not finite")
            if turn:  # the first one warms up
                found.append((watch.seconds, whole - watch.seconds))
    del training
    gc.collect()
    percent = round(statistics.median(100 * rest / encoders for encoders, rest in found), 2)
    return {"outside, % of the encoders": percent, "goal": "met" if percent <= GOAL else "missed",
            "encoders, s": round(statistics.median(e for e, _ in found), 3),
            "outside, s": round(statistics.median(r for _, r in found), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", choices=RECIPES, nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    body = {}
    for name in options.recipes:
        body[name] = measure(name, RECIPES[name], options.steps)
        print(f"{name}: {body[name]['outside, % of the encoders']} %", file=sys.stderr)
    common.report("overhead", f"a step beside its networks: ResNet-50 at 224, batch {BATCH}, {ROWS} bank rows, "
                  f"1 thread, CPU time, median of {options.steps} steps; goal {GOAL} %", body, options.out)
    return int(any(row["goal"] != "met" for row in body.values()))


if __name__ == "__main__":
    sys.exit(main())
