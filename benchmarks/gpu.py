"""Everything that needs a GPU to be measured: ``python -m benchmarks.gpu [--only PIECE …] [--out FILE]``.

    correct    the bank's neighbours and the device's augmentations against float64 and the CPU: run before any timing
    bank       search + loss of 256 × N × 512, push of 256 rows, and MSF's own way, at N = 131,072 and 1,048,576
    augment    2 × 256 views of 224 from uint8 to normalised floats (MSF strong and weak)
    ema        the target's moving average of ResNet-50 with its heads
    step       the MSF step of ResNet-50 (bf16, channels_last, batch 256, bank 1 M) against its forwards and backward
               alone, and against the plain fp32 loop of the official script with the same images in memory
    loader     JPEG shards to the GPU: images/s of the loader alone, and the share of a training step spent waiting
    cifar      CIFAR-10-sized ResNet-18 as in recipe cifar10_msf: images/s of the whole step

Each piece stays under ten minutes. ``--device cpu --small`` runs all of it on small sizes, to see that it works.
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
from hpcssl import door, rng
from hpcssl.data.loader import Batch, Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.memory.bank import Bank, ColumnSpec
from hpcssl.methods import equations
from hpcssl.nets import norm
from hpcssl.train import recipe as recipes
from hpcssl.train.main import prepare
from hpcssl.train.state import Training
from hpcssl.train.step import train_step
from hpcssl.views.augment import NAMED, apply, draw
from hpcssl.world import World


class Bench:
    """The device, the sizes, and a clock that waits for the device."""

    def __init__(self, device: str, small: bool, data: Path | None):
        self.world, self.small, self.data = World.alone(device), small, data
        self.device = self.world.device
        self.queries, self.width, self.k = (16, 64, 5) if small else (256, 512, 5)
        self.rows = (8192,) if small else (131_072, 1_048_576)
        self.batch, self.side = (8, 64) if small else (256, 224)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, work, rounds: int = 20) -> float:
        """Median milliseconds of a call, the device's work included; three calls warm up."""
        found = []
        for turn in range(rounds + 3):
            self.sync()
            start = time.perf_counter()
            work()
            self.sync()
            if turn >= 3:
                found.append((time.perf_counter() - start) * 1e3)
        return round(statistics.median(found), 4)

    def extra_mib(self, work) -> float | None:
        """Peak memory of a call above what was held before, in MiB; None without a GPU."""
        if self.device.type != "cuda":
            return None
        work()
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        self.sync()
        return round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)

    def unit(self, rows: int, at: str) -> torch.Tensor:
        made = torch.randn(rows, self.width, generator=rng.generator(rng.key(0, at), self.device), device=self.device)
        return F.normalize(made, dim=1)

    def bank(self, rows: int, prefilter: str) -> Bank:
        made = Bank(rows, {"key": ColumnSpec(self.width)}, self.world, key=1, prefilter=prefilter)
        for first in range(0, rows, 65_536):
            made.push(key=self.unit(min(65_536, rows - first), f"rows-{first}"))
        return made

    def rounds(self) -> int:
        return 3 if self.small else 20


def correct(b: Bench) -> dict:
    """Neighbours against a float64 product on the CPU; augmentations against the CPU's."""
    found = {}
    bank_rows, query = b.rows[0], b.unit(b.queries, "query")
    for prefilter in ("fp32", "bf16"):
        bank = b.bank(bank_rows, prefilter)
        every = bank.get("key", torch.arange(bank_rows, device=b.device)).double().cpu()
        truth = (query.double().cpu() @ every.T).topk(b.k, dim=1).indices
        ours = bank.nearest(query, b.k).slot.cpu()
        same = [len(set(a.tolist()) & set(t.tolist())) for a, t in zip(ours, truth, strict=True)]
        found[f"recall_{prefilter}"] = round(sum(same) / (b.k * b.queries), 6)
    images, params = pictures(b, 16, "strong")
    one, other = (apply(images.to(d), params, NAMED["strong"]).cpu() for d in (b.device, torch.device("cpu")))
    found["augment_largest_difference_in_levels"] = round(float((one - other).abs().max()) * 0.225 * 255, 4)
    return found


def bank(b: Bench) -> dict:
    """ms and extra MiB of search + loss, and of a push; ``naive`` is the official code's way."""
    return {str(rows): _bank(b, rows) for rows in b.rows}


def _bank(b: Bench, rows: int) -> dict:
    query, online, batch = b.unit(b.queries, "query"), b.unit(b.queries, "online"), b.unit(b.queries, "push")
    entry = {}
    for prefilter in ("fp32", "bf16"):
        held = b.bank(rows, prefilter)

        def ours(held=held):
            hits = held.nearest(query, b.k)
            return equations.mean_shift(online, hits.rows, hits.valid).mean()

        entry[f"search_{prefilter}_ms"] = b.ms(ours, b.rounds())
        entry[f"search_{prefilter}_extra_mib"] = b.extra_mib(ours)
    entry["push_ms"] = b.ms(lambda: held.push(key=batch), b.rounds())
    every = held.get("key", torch.arange(rows, device=b.device))

    def naive():
        targets = every.clone()
        near = (2 - 2 * query @ targets.T).topk(b.k, dim=1, largest=False).indices
        return (2 - 2 * online @ targets.T).gather(1, near).sum(1).div(b.k).mean()

    entry["naive_ms"], entry["naive_extra_mib"] = b.ms(naive, b.rounds()), b.extra_mib(naive)
    entry["of_naive"] = round(min(entry["search_fp32_ms"], entry["search_bf16_ms"]) / entry["naive_ms"], 4)
    return entry


def pictures(b: Bench, count: int, augment: str) -> tuple[torch.Tensor, np.ndarray]:
    """uint8 views [count, S, S, 3] as the loader leaves them, and drawn parameters."""
    generator = rng.generator(rng.key(0, "pictures"))
    coarse = torch.rand(count, 3, 16, 16, generator=generator)
    smooth = F.interpolate(coarse, (b.side, b.side), mode="bicubic").clamp(0, 1).mul(255).byte()
    params = np.stack([draw(NAMED[augment], rng.key(0, augment, i), 400, 500) for i in range(count)])
    return smooth.permute(0, 2, 3, 1).contiguous(), params


def augment(b: Bench) -> dict:
    views = [(pictures(b, b.batch, name), NAMED[name]) for name in ("strong", "weak")]
    held = [(images.to(b.device), params, named) for (images, params), named in views]
    ms = b.ms(lambda: [apply(images, params, named) for images, params, named in held], b.rounds())
    return {"views": 2 * b.batch, "ms": ms}


def training(b: Bench, name: str, *more: str) -> Training:
    """A recipe's training on this device, without data; small sizes where asked for."""
    shrink = ["model.arch=resnet18", f"views.size={b.side}", f"optim.batch={b.batch}", "model.norm_group=4",
              "bank.size=4096"] if b.small else []
    recipe = recipes.compose(name, [*shrink, *more])
    return Training(recipe, b.world, steps_per_epoch=5000, labels=np.zeros(1_281_167, np.int64),
                    data_digest="benchmark")


def batch_of(b: Bench, t: Training) -> Batch:
    size = t.recipe.optim.batch
    made = [pictures_of(view.augment, view.size, size) for view in t.method.plan.views]
    return Batch(0, 0, np.arange(size), np.arange(size) % 10,
                 [images.pin_memory() if b.device.type == "cuda" else images for images, _ in made],
                 [params for _, params in made])


def pictures_of(augment: str, side: int, count: int) -> tuple[torch.Tensor, np.ndarray]:
    noise = rng.generator(rng.key(0, augment))
    made = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=noise)
    return made, np.stack([draw(NAMED[augment], rng.key(0, augment, i), 400, 500) for i in range(count)])


def ema(b: Bench) -> dict:
    pair = training(b, "msf_r50_ep200_128k").pair
    count = sum(p.numel() for p in pair.target.parameters())
    return {"parameters": count, "ms": b.ms(lambda: pair.follow(0.99), b.rounds())}


def step(b: Bench) -> dict:
    """The whole step beside its two forwards and its backward on the same tensors, and beside the plain script."""
    rounds = 3 if b.small else 15
    t = training(b, "msf_r50_ep200_128k", f"bank.size={b.rows[-1]}", "model.norm=local", "model.shuffle=false")
    batch = batch_of(b, t)
    views = [x.detach() for x in t.images(batch)]

    def bare():
        t.pair.embed_target([views[1]])
        (_, u), = t.pair.embed([views[0]])
        u.sum().backward()
        t.optimizer.zero_grad()
        norm.discard(t.norms)

    ratios, ours_ms, bare_ms = [], [], []
    for _ in range(3):  # in turns: the clocks of a GPU move
        ours_ms.append(b.ms(lambda: train_step(t, batch), rounds))
        bare_ms.append(b.ms(bare, rounds))
        ratios.append(ours_ms[-1] / bare_ms[-1])
    found = {"batch": t.recipe.optim.batch, "bank": t.recipe.bank.size, "ours_ms": statistics.median(ours_ms),
             "bare_ms": statistics.median(bare_ms), "ours_over_bare": round(statistics.median(ratios), 4),
             "images_per_s": round(t.recipe.optim.batch / statistics.median(ours_ms) * 1e3, 1)}
    if b.device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    plain = b.ms(plain_script(b, views), max(3, rounds // 3))
    return found | {"plain_fp32_ms": plain, "plain_over_ours": round(plain / statistics.median(ours_ms), 3)}


def plain_script(b: Bench, views: list[torch.Tensor]):
    """What the official script does per step, in fp32: EMA by a Python loop, cloned bank, two full products, SGD."""
    t = training(b, "msf_r50_ep200_128k", "optim.precision=fp32", "model.norm=local", "model.shuffle=false",
                 "machine.channels_last=false")
    online, target = t.pair.online, copy.deepcopy(t.pair.target)
    follows = dict(online.named_parameters())
    optimizer = torch.optim.SGD(online.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=False)
    rows, query, other = b.unit(b.rows[-1], "plain"), *[x.contiguous() for x in views]
    width = t.recipe.model.projector.out
    rows = F.normalize(torch.randn(b.rows[-1], width, device=b.device), dim=1)

    def one():
        with torch.no_grad():
            for name, p in target.named_parameters():
                p.data = p.data * 0.99 + follows[name].data * 0.01
            z = F.normalize(target.projector(target.backbone(other)), dim=1)
            rows[:len(z)] = z
        u = F.normalize(online.predictor(online.projector(online.backbone(query))), dim=1)
        targets = rows.clone().detach()
        near = (2 - 2 * z @ targets.T).topk(b.k, dim=1, largest=False).indices
        loss = (2 - 2 * u @ targets.T).gather(1, near).sum(1).div(b.k).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norm.discard(t.norms)

    return one


def loader(b: Bench) -> dict:
    """From JPEG shards: the loader alone, and the wait of a training that it feeds."""
    with tempfile.TemporaryDirectory() as room:
        shards, kind = _shards(b, Path(room))
        t = training(b, "msf_r50_ep200_128k", *([f"optim.batch={len(shards)}"] if len(shards) < b.batch else []))
        order = Order([s.samples for s in shards.shards], seed=0, global_batch=t.recipe.optim.batch, window="all")
        threads = len(os.sched_getaffinity(0))
        source = Loader(Reader(shards), order, t.view_specs, seed=0, threads=threads, ring=6,
                        pin=b.device.type == "cuda")
        steps = 4 if b.small else 40
        start, count = time.perf_counter(), 0
        for batch in source.run(0, steps):
            for image in batch.images:
                image.to(b.device, non_blocking=True)
            count += len(batch.index)
        b.sync()
        alone = count / (time.perf_counter() - start)
        waited = 0.0
        batches = source.run(0, steps)
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            train_step(t, batch)
        b.sync()
        whole = time.perf_counter() - start
        source.close()
    return {"images": kind, "threads": threads, "loader_images_per_s": round(alone, 1),
            "training_images_per_s": round(steps * t.recipe.optim.batch / whole, 1),
            "waited_share": round(waited / whole, 4)}


def _shards(b: Bench, room: Path) -> tuple[ShardSet, str]:
    """The given shards; else generated photographs of ImageNet's size (noise over gradients, about 100 kB)."""
    if b.data is not None:
        return ShardSet.open(b.data), "given shards"
    for i in range(16 if b.small else 512):
        drawn = np.random.Generator(np.random.Philox(key=rng.key(0, "jpeg", i)))
        coarse = Image.fromarray(drawn.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        grain = drawn.integers(-12, 13, (375, 500, 1))
        folder = room / "images" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        body = np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(body).save(folder / f"{i}.jpg", quality=90)
    if door.run(shard_app, ["images", str(room / "images"), str(room / "shards")], "hpcssl-shard"):
        raise SystemExit(1)
    return ShardSet.open(room / "shards"), "generated, 500 x 375"


def cifar(b: Bench) -> dict:
    small = ["optim.batch=16", "model.norm_group=8", "model.arch=resnet18"] if b.small else []
    recipe = recipes.compose("cifar10_msf", small + (["bank.size=256"] if b.small else []))
    t = Training(recipe, b.world, steps_per_epoch=97, labels=np.zeros(50_000, np.int64), data_digest="benchmark")
    batch = batch_of(b, t)
    ms = b.ms(lambda: train_step(t, batch), 3 if b.small else 30)
    return {"batch": recipe.optim.batch, "ms": ms, "images_per_s": round(recipe.optim.batch / ms * 1e3, 1),
            "minutes_for_200_epochs": round(200 * 50_000 / recipe.optim.batch * ms / 60_000, 1)}


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
        raise SystemExit("benchmarks.gpu: got no CUDA device; expected one; to mend: run it on a machine with a GPU, "
                         "or try it with --device cpu --small")
    prepare(recipes.MachineOptions(devices="cpu" if args.device == "cpu" else "gpu"))
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
        if args.out is not None:  # after each piece: a call that runs out of time keeps what it measured
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
