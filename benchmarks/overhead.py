"""Cost of a training step outside of the encoders: ``python -m benchmarks overhead [--recipes NAME …] [--out FILE]``.

One process with one thread takes steps of a recipe with ResNet-50 at 224 pixels and batch 8, on images in memory, with
a full bank of 131,072 rows. The time within ``EncoderPair.embed``, ``EncoderPair.embed_target`` and the backward pass
belongs to the encoders; the rest (search, loss, optimizer, moving average, statistics, bank, embedding table) is
overhead. The figure is the median over steps of rest / encoders, in CPU time, which other processes disturb least.
Goal: 6 %.
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
from hpcssl.data.batch import Batch
from hpcssl.distributed.world import World
from hpcssl.nets.pair import EncoderPair
from hpcssl.train import recipe
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState

GOAL = 6.0
BATCH, ROWS, IMAGES, CLASSES, CHUNK = 8, 131_072, 160_000, 1000, 1024
COMMON = [
    f"optim.batch={BATCH}",
    "optim.precision=fp32",
    "model.norm=sync",
    "model.norm_group_size=0",
    "machine.devices=cpu",
    "machine.accumulation_steps=1",
]
BANK = f"bank.size={ROWS}"
# every method, and its options that add work to a step; not the "present encoder" of NNCLR, which embeds the bank again
# with the encoder
RECIPES = {
    "msf_r50_ep200_128k": [BANK],
    "cmsf_2q_r50_ep200_128k": [BANK],
    "cmsf_km_r50_ep200_128k": [BANK],
    "cmsf_sup_r50_ep200": [BANK],
    "cmsf_sup_all_r50_ep200": [BANK],
    "cmsf_semi_r50_ep200": [
        BANK,
        "method.pseudo_labels.threshold=0",
    ],  # so that the predictions of the untrained head are used
    "byol_r50_ep200": [],
    "simsiam_r50_ep200": [],
    "moco_v2_r50_ep200": [BANK],
    "simclr_r50_ep200": [],
    "nnclr_r50_ep1000": [BANK],
    "nnclr_r50_ep1000_soft": [BANK],
    "nnsiam_r50_ep1000": [BANK],
    "swav_r50_ep200_mc_b256": ["method.queue_start_epoch=0", "method.freeze_steps=0"],  # its own queue of 3,840
    "moco_v2_r50_ep200_bsim": [BANK],
    "byol_r50_ep200_wbsim": [],
}


class Stopwatch:
    """CPU seconds spent inside wrapped calls."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, call: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        return timed


@contextmanager
def time_encoders() -> Iterator[Stopwatch]:
    """Measure the time inside the encoders and the backward pass."""
    watch = Stopwatch()
    with ExitStack() as stack:
        for owner, name in ((EncoderPair, "embed"), (EncoderPair, "embed_target"), (Tensor, "backward")):
            stack.enter_context(mock.patch.object(owner, name, watch.wrap(getattr(owner, name))))
        yield watch


def prepare_run(name: str, overrides: list[str]) -> TrainState:
    """Return a run in its second epoch: bank, embedding table and clusters are full."""
    labels = np.arange(IMAGES) % CLASSES
    resolved = recipe.compose(name, [*COMMON, *overrides])
    training = TrainState(
        resolved, World.single_process(), steps_per_epoch=IMAGES // BATCH, labels=labels, data_digest="benchmark"
    )
    training.step = training.steps_per_epoch + 1  # not the first step of an epoch, which clusters or trains a head
    memories, width = training.memories, resolved.model.projector.out
    if "clusters" in memories:
        groups = torch.from_numpy(rng.permutation(0, IMAGES) % max(1, round(IMAGES / 25.6))).int()
        memories["clusters"].load({"images": IMAGES}, lambda _, start, count: groups[start : start + count])
    for index in torch.arange(IMAGES).split(CHUNK):
        draw = rng.generator(rng.key(0, "rows", int(index[0])))
        rows = F.normalize(torch.randn(len(index), width, generator=draw), dim=1)
        for memory in memories.keys() & {"embedding_table", "labeled"}:
            memories[memory].write(index, rows)
        if training.bank is not None and len(index) <= training.bank.size:
            label = torch.from_numpy(labels)[index]
            columns = {key: rows if spec.dim else label for key, spec in training.bank.columns.items()}
            if "clusters" in memories:
                columns["group"] = memories["clusters"].cluster_of(index)
            elif "embedding_table" in memories:
                columns["group"] = torch.zeros_like(index)
            training.bank.push(**columns | {"index": index})
    return training


def measure(name: str, overrides: list[str], steps: int) -> dict[str, float]:
    training = prepare_run(name, overrides)
    coarse = torch.randn(BATCH, 3, 7, 7, generator=rng.generator(0))
    # smooth images instead of noise: an untrained network embeds all noise alike, and equal rows are searched twice
    images = [F.interpolate(coarse, view.size, mode="bicubic") for view in training.plan.views]
    training.images = lambda batch: list(images)
    times = []
    with time_encoders() as watch:
        for turn in range(steps + 1):
            index = rng.permutation(rng.key(0, "batch", turn), IMAGES)[:BATCH]
            batch = Batch(training.step, 1, index, index % CLASSES, [], [])
            watch.seconds, start = 0.0, time.process_time()
            report = train_step(training, batch)
            total = time.process_time() - start
            if not report.taken:
                raise SystemExit(f"benchmarks.overhead: {name}: the step was skipped because its loss is not finite")
            if turn:  # the first one warms up
                times.append((watch.seconds, total - watch.seconds))
    del training
    gc.collect()
    percent = round(statistics.median(100 * rest / encoders for encoders, rest in times), 2)
    return {
        "outside, % of the encoders": percent,
        "goal": "met" if percent <= GOAL else "missed",
        "encoders, s": round(statistics.median(e for e, _ in times), 3),
        "outside, s": round(statistics.median(r for _, r in times), 3),
    }


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
    common.report(
        "overhead",
        f"cost of a step outside of the encoders: ResNet-50 at 224, batch {BATCH}, {ROWS} bank rows, "
        f"1 thread, CPU time, median of {options.steps} steps; goal {GOAL} %",
        body,
        options.out,
    )
    return int(any(row["goal"] != "met" for row in body.values()))


if __name__ == "__main__":
    sys.exit(main())
