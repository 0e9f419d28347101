"""Measurements that need a GPU: ``python -m benchmarks.gpu [--only PIECE …] [--out FILE]``.

    correct    neighbors of the bank and augmentations of the device against float64 and the CPU: runs before any timing
    bank       search + loss of 256 × N × 512, push of 256 rows, and the way of MSF, at N = 131,072 and 1,048,576
    augment    2 × 256 views of 224 from uint8 to normalized floats (MSF strong and weak)
    ema        the moving average of the target encoder, ResNet-50 with its heads
    step       the MSF step of ResNet-50 (bf16, channels_last, batch 256, bank 1 M) against its forward and backward
               passes alone, and against the plain fp32 loop of the official script on the same images in memory
    loader     JPEG shards to the GPU: images/s of the loader alone, and the share of a training step spent waiting
    cifar      ResNet-18 on images of CIFAR-10 size as in recipe cifar10_msf: images/s of the whole step

Each piece takes less than ten minutes. ``--device cpu --small`` runs all of them on small sizes, as a check.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.common import versions
from data_prep.cli import app as shard_app
from hpcssl import cli_runner, rng
from hpcssl.data.batch import Batch
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec
from hpcssl.methods import equations
from hpcssl.nets import norm
from hpcssl.train import recipe as recipes
from hpcssl.train.main import set_up_torch
from hpcssl.train.options import MachineOptions
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState
from hpcssl.views.augment import AUGMENTATIONS, augment_batch, draw_params


class Bench:
    """The device, the sizes, and a clock that waits for the device."""

    def __init__(self, device: str, small: bool, data: Path | None):
        self.world, self.small, self.data = World.single_process(device), small, data
        self.device = self.world.device
        self.queries, self.width, self.k = (16, 64, 5) if small else (256, 512, 5)
        self.rows = (8192,) if small else (131_072, 1_048_576)
        self.batch, self.side = (8, 64) if small else (256, 224)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, work, rounds: int = 20) -> float:
        """Return the median milliseconds of a call, including the work of the device; three calls warm up."""
        times = []
        for turn in range(rounds + 3):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            if turn >= 3:
                times.append((time.perf_counter() - start) * 1e3)
        return round(statistics.median(times), 4)

    def extra_mib(self, work) -> float | None:
        """Return the peak memory of a call above that before it, in MiB; None without a GPU."""
        if self.device.type != "cuda":
            return None
        work()
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.sync()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def unit_rows(self, rows: int, name: str) -> torch.Tensor:
        rows_BD = torch.randn(
            rows, self.width, generator=rng.generator(rng.key(0, name), self.device), device=self.device
        )
        return F.normalize(rows_BD, dim=1)

    def bank(self, rows: int, prefilter: str) -> Bank:
        bank = Bank(rows, {"key": ColumnSpec(self.width)}, self.world, key=1, prefilter=prefilter)
        for first in range(0, rows, 65_536):
            bank.push(key=self.unit_rows(min(65_536, rows - first), f"rows-{first}"))
        return bank

    def rounds(self) -> int:
        return 3 if self.small else 20


def correct(b: Bench) -> dict:
    """Compare neighbors with a float64 product on the CPU, and augmentations with those of the CPU."""
    results = {}
    bank_rows, query = b.rows[0], b.unit_rows(b.queries, "query")
    for prefilter in ("fp32", "bf16"):
        bank = b.bank(bank_rows, prefilter)
        every = bank.get("key", torch.arange(bank_rows, device=b.device)).double().cpu()
        truth = (query.double().cpu() @ every.T).topk(b.k, dim=1).indices
        ours = bank.nearest(query, b.k).slot.cpu()
        same = [len(set(a.tolist()) & set(t.tolist())) for a, t in zip(ours, truth, strict=True)]
        results[f"recall_{prefilter}"] = round(sum(same) / (b.k * b.queries), 6)
    images, params = smooth_images(b, 16, "strong")
    one, other = (
        augment_batch(images.to(d), params, AUGMENTATIONS["strong"]).cpu() for d in (b.device, torch.device("cpu"))
    )
    results["augment_largest_difference_in_levels"] = round(float((one - other).abs().max()) * 0.225 * 255, 4)
    return results


def bank(b: Bench) -> dict:
    """Measure ms and extra MiB of search + loss, and of a push; ``naive`` is the way of the official code."""
    return {str(rows): _bank(b, rows) for rows in b.rows}


def _bank(b: Bench, rows: int) -> dict:
    query, online, batch = (
        b.unit_rows(b.queries, "query"),
        b.unit_rows(b.queries, "online"),
        b.unit_rows(b.queries, "push"),
    )
    entry = {}
    for prefilter in ("fp32", "bf16"):
        filled = b.bank(rows, prefilter)

        def ours(filled=filled):
            neighbors = filled.nearest(query, b.k)
            return equations.mean_shift(online, neighbors.rows, neighbors.valid).mean()

        entry[f"search_{prefilter}_ms"] = b.ms(ours, b.rounds())
        entry[f"search_{prefilter}_extra_mib"] = b.extra_mib(ours)
    entry["push_ms"] = b.ms(lambda: filled.push(key=batch), b.rounds())
    every = filled.get("key", torch.arange(rows, device=b.device))

    def naive():
        targets = every.clone()
        near = (2 - 2 * query @ targets.T).topk(b.k, dim=1, largest=False).indices
        return (2 - 2 * online @ targets.T).gather(1, near).sum(1).div(b.k).mean()

    entry["naive_ms"], entry["naive_extra_mib"] = b.ms(naive, b.rounds()), b.extra_mib(naive)
    entry["of_naive"] = round(min(entry["search_fp32_ms"], entry["search_bf16_ms"]) / entry["naive_ms"], 4)
    return entry


def smooth_images(b: Bench, count: int, augment: str) -> tuple[torch.Tensor, np.ndarray]:
    """Return uint8 views [count, S, S, 3] as the loader delivers them, and drawn parameters."""
    generator = rng.generator(rng.key(0, "pictures"))
    coarse = torch.rand(count, 3, 16, 16, generator=generator)
    smooth = F.interpolate(coarse, (b.side, b.side), mode="bicubic").clamp(0, 1).mul(255).byte()
    params = np.stack([draw_params(AUGMENTATIONS[augment], rng.key(0, augment, i), 400, 500) for i in range(count)])
    return smooth.permute(0, 2, 3, 1).contiguous(), params


def augment(b: Bench) -> dict:
    views = [(smooth_images(b, b.batch, name), AUGMENTATIONS[name]) for name in ("strong", "weak")]
    on_device = [(images.to(b.device), params, named) for (images, params), named in views]
    ms = b.ms(lambda: [augment_batch(images, params, named) for images, params, named in on_device], b.rounds())
    return {"views": 2 * b.batch, "ms": ms}


def training(b: Bench, name: str, *more: str) -> TrainState:
    """Return the training of a recipe on this device, without data; with small sizes for --small."""
    shrink = (
        [
            "model.arch=resnet18",
            f"views.size={b.side}",
            f"optim.batch={b.batch}",
            "model.norm_group_size=4",
            "bank.size=4096",
        ]
        if b.small
        else []
    )
    recipe = recipes.compose(name, [*shrink, *more])
    return TrainState(
        recipe, b.world, steps_per_epoch=5000, labels=np.zeros(1_281_167, np.int64), data_digest="benchmark"
    )


def batch_of(b: Bench, t: TrainState) -> Batch:
    size = t.recipe.optim.batch
    views = [noise_images(view.augment, view.size, size) for view in t.method.plan.views]
    return Batch(
        0,
        0,
        np.arange(size),
        np.arange(size) % 10,
        [images.pin_memory() if b.device.type == "cuda" else images for images, _ in views],
        [params for _, params in views],
    )


def noise_images(augment: str, side: int, count: int) -> tuple[torch.Tensor, np.ndarray]:
    noise = rng.generator(rng.key(0, augment))
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=noise)
    return images, np.stack(
        [draw_params(AUGMENTATIONS[augment], rng.key(0, augment, i), 400, 500) for i in range(count)]
    )


def ema(b: Bench) -> dict:
    pair = training(b, "msf_r50_ep200_128k").pair
    count = sum(p.numel() for p in pair.target.parameters())
    return {"parameters": count, "ms": b.ms(lambda: pair.update_ema(0.99), b.rounds())}


def step(b: Bench) -> dict:
    """Compare the step with its forward and backward passes alone, and with the plain script."""
    rounds = 3 if b.small else 15
    t = training(b, "msf_r50_ep200_128k", f"bank.size={b.rows[-1]}", "model.norm=local", "model.shuffle_bn=false")
    batch = batch_of(b, t)
    views = [x.detach() for x in t.images(batch)]

    def bare():
        t.pair.embed_target([views[1]])
        ((_, u),) = t.pair.embed([views[0]])
        u.sum().backward()
        t.optimizer.zero_grad()
        norm.discard_pending(t.norms)

    ratios, ours_ms, bare_ms = [], [], []
    for _ in range(3):  # in turns, since the clock of a GPU varies
        ours_ms.append(b.ms(lambda: train_step(t, batch), rounds))
        bare_ms.append(b.ms(bare, rounds))
        ratios.append(ours_ms[-1] / bare_ms[-1])
    results = {
        "batch": t.recipe.optim.batch,
        "bank": t.recipe.bank.size,
        "ours_ms": statistics.median(ours_ms),
        "bare_ms": statistics.median(bare_ms),
        "ours_over_bare": round(statistics.median(ratios), 4),
        "images_per_s": round(t.recipe.optim.batch / statistics.median(ours_ms) * 1e3, 1),
    }
    if b.device.type == "cuda":
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    plain = b.ms(plain_script(b, views), max(3, rounds // 3))
    return results | {"plain_fp32_ms": plain, "plain_over_ours": round(plain / statistics.median(ours_ms), 3)}


def plain_script(b: Bench, views: list[torch.Tensor]):
    """Return the step of the official script, in fp32: EMA in a Python loop, cloned bank, two full products, SGD."""
    t = training(
        b,
        "msf_r50_ep200_128k",
        "optim.precision=fp32",
        "model.norm=local",
        "model.shuffle_bn=false",
        "machine.channels_last=false",
    )
    online, target = t.pair.online, copy.deepcopy(t.pair.target)
    online_parameters = dict(online.named_parameters())
    optimizer = torch.optim.SGD(online.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=False)
    rows, query, other = b.unit_rows(b.rows[-1], "plain"), *[x.contiguous() for x in views]
    width = t.recipe.model.projector.out
    rows = F.normalize(torch.randn(b.rows[-1], width, device=b.device), dim=1)

    def one():
        with torch.no_grad():
            for name, p in target.named_parameters():
                p.data = p.data * 0.99 + online_parameters[name].data * 0.01
            z = F.normalize(target.projector(target.backbone(other)), dim=1)
            rows[: len(z)] = z
        u = F.normalize(online.predictor(online.projector(online.backbone(query))), dim=1)
        targets = rows.clone().detach()
        near = (2 - 2 * z @ targets.T).topk(b.k, dim=1, largest=False).indices
        loss = (2 - 2 * u @ targets.T).gather(1, near).sum(1).div(b.k).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norm.discard_pending(t.norms)

    return one


def loader(b: Bench) -> dict:
    """Measure the loader alone on JPEG shards, and the time that a training waits for it."""
    with tempfile.TemporaryDirectory() as scratch:
        shards, kind = _open_shards(b, Path(scratch))
        t = training(b, "msf_r50_ep200_128k", *([f"optim.batch={len(shards)}"] if len(shards) < b.batch else []))
        order = Order([s.samples for s in shards.shards], seed=0, global_batch=t.recipe.optim.batch, window="all")
        threads = len(os.sched_getaffinity(0))
        source = Loader(
            Reader(shards), order, t.view_specs, seed=0, threads=threads, ring=6, pin=b.device.type == "cuda"
        )
        steps = 4 if b.small else 40
        start, count = time.perf_counter(), 0
        for batch in source.iterate(0, steps):
            for image in batch.images:
                image.to(b.device, non_blocking=True)
            count += len(batch.index)
        b.sync()
        alone = count / (time.perf_counter() - start)
        waited = 0.0
        batches = source.iterate(0, steps)
        start = time.perf_counter()
        for _ in range(steps):
            wait_start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - wait_start
            train_step(t, batch)
        b.sync()
        total = time.perf_counter() - start
        source.close()
    return {
        "images": kind,
        "threads": threads,
        "loader_images_per_s": round(alone, 1),
        "training_images_per_s": round(steps * t.recipe.optim.batch / total, 1),
        "waited_share": round(waited / total, 4),
    }


def _open_shards(b: Bench, scratch: Path) -> tuple[ShardSet, str]:
    """Return the shards of --data, or generated images of the size of ImageNet (noise over gradients, about 100 kB)."""
    if b.data is not None:
        return ShardSet.open(b.data), "given shards"
    for i in range(16 if b.small else 512):
        drawn = np.random.Generator(np.random.Philox(key=rng.key(0, "jpeg", i)))
        coarse = Image.fromarray(drawn.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        grain = drawn.integers(-12, 13, (375, 500, 1))
        folder = scratch / "images" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        body = np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(body).save(folder / f"{i}.jpg", quality=90)
    if cli_runner.run(shard_app, ["images", str(scratch / "images"), str(scratch / "shards")], "hpcssl-shard"):
        raise SystemExit(1)
    return ShardSet.open(scratch / "shards"), "generated, 500 x 375"


def cifar(b: Bench) -> dict:
    small = ["optim.batch=16", "model.norm_group_size=8", "model.arch=resnet18"] if b.small else []
    recipe = recipes.compose("cifar10_msf", small + (["bank.size=256"] if b.small else []))
    t = TrainState(recipe, b.world, steps_per_epoch=97, labels=np.zeros(50_000, np.int64), data_digest="benchmark")
    batch = batch_of(b, t)
    ms = b.ms(lambda: train_step(t, batch), 3 if b.small else 30)
    return {
        "batch": recipe.optim.batch,
        "ms": ms,
        "images_per_s": round(recipe.optim.batch / ms * 1e3, 1),
        "minutes_for_200_epochs": round(200 * 50_000 / recipe.optim.batch * ms / 60_000, 1),
    }


PIECES = {f.__name__: f for f in (correct, bank, augment, ema, step, loader, cifar)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--data", type=Path, help="a folder of JPEG shards for the piece loader")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.gpu: no CUDA device (expected one). Fix: run it on a machine with a GPU, "
            "or try it with --device cpu --small"
        )
    set_up_torch(MachineOptions(devices="cpu" if args.device == "cpu" else "gpu"), torch.device(args.device))
    b = Bench(args.device, args.small, args.data)
    body: dict = {"benchmark": "gpu", "small": args.small, "versions": versions()}
    if b.device.type == "cuda":
        body["gpu"] = torch.cuda.get_device_name()
        body["cuda"] = torch.version.cuda
    for name in args.only:
        start = time.perf_counter()
        body[name] = PIECES[name](b)
        body[name]["seconds"] = round(time.perf_counter() - start, 1)
        print(name, json.dumps(body[name]), flush=True)
        if args.out is not None:  # after each piece, so that a run that is stopped keeps its measurements
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
