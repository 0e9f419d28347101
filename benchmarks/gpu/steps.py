"""Whole steps: recipes as shipped, small batches, the loader, deterministic mode, and a checkpoint that is written."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.gpu.bench import Bench
from data_prep.cli import app as shard_app
from hpcssl import cli_runner, rng
from hpcssl.checkpoint.manager import CheckpointManager
from hpcssl.data.batch import Batch
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.nets import norm
from hpcssl.run_dir import RunDir
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState

# the recipe as shipped, with the rows of one GPU of those that its paper used
SHIPPED = {
    "msf_r50_ep200_128k": 256,
    "nnclr_r50_ep1000": 512,
    "swav_r50_ep200_mc": 64,
    "byol_r50_ep200": 512,
    "moco_v2_r50_ep200": 256,
}


def _take(t: TrainState, batch: Batch) -> None:
    report = train_step(t, batch)
    if not report.taken:
        raise SystemExit(f"benchmarks.gpu: a step was not taken: {report.reason}")


def _compare(b: Bench, name: str, *changes: str) -> dict[str, Any]:
    """A step beside the forward and backward passes of its own encoders, in turns: the clock of a GPU varies."""
    t = b.training(name, *changes)
    batch = b.batch_of(t)
    images = t.images(batch)
    views = [images[source].detach() for source in t.plan.sources]
    queries = t.plan.online_views(has_target_encoder=t.pair.target is not None)

    def bare() -> None:
        if t.pair.target is not None:
            t.pair.embed_target([views[v] for v in t.plan.targets], None, t.second_modality(t.plan.targets))
        embedded = t.pair.embed([views[v] for v in queries], t.second_modality(queries))
        torch.stack([(z if u is None else u).sum() for z, u in embedded]).sum().backward()
        t.optimizer.zero_grad()
        norm.discard_pending(t.norms)

    ratios, ours, alone = [], [], []
    for _ in range(1 if b.tiny else 3):
        ours.append(b.time(lambda: _take(t, batch)))
        alone.append(b.time(bare))
        ratios.append(ours[-1].ms / alone[-1].ms)
    results: dict[str, Any] = {
        "batch": t.recipe.optim.batch,
        "step": ours[-1].to_json(),
        "bare": alone[-1].to_json(),
        "step_of_bare": round(statistics.median(ratios), 4),
        "images_per_s": round(t.recipe.optim.batch / statistics.median(x.ms for x in ours) * 1e3, 1),
    }
    if b.on_gpu:
        results["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
    return results


def step(b: Bench) -> dict[str, Any]:
    """MSF as shipped (ghost norms, shuffle) with a bank of 1 M, its parts switched off, and the official script."""
    bank = f"bank.size={b.rows[-1]}"
    results = {"shipped": _compare(b, "msf_r50_ep200_128k", bank)}
    results["local_norm"] = _compare(b, "msf_r50_ep200_128k", bank, "model.norm=local", "model.shuffle_bn=false")
    t = b.training("msf_r50_ep200_128k")
    views = [x.detach() for x in t.images(b.batch_of(t))]
    results["plain_fp32"] = b.time(plain_script(b, views)).to_json()
    return results


def shipped(b: Bench) -> dict[str, Any]:
    """Recipes as shipped, with the images that one GPU has."""
    names = list(SHIPPED)[1:2] if b.tiny else list(SHIPPED)
    return {name: _compare(b, name, f"optim.batch={SHIPPED[name]}") for name in names}


def choices(b: Bench) -> dict[str, Any]:
    """The step of MSF with the kernels and the compiler that ``machine.kernels`` and ``machine.compile`` choose.

    Rates are relative to plain kernels that are not compiled. Nothing is compiled at small sizes.
    """
    settings = {"plain": ["machine.kernels=plain"], "auto": ["machine.kernels=auto"]}
    if not b.tiny:
        settings |= {f"{name}_compiled": [*keys, "machine.compile=true"] for name, keys in settings.items()}
    results = {name: _compare(b, "msf_r50_ep200_128k", *keys) for name, keys in settings.items()}
    plain = results["plain"]["images_per_s"]
    return results | {f"{name}_of_plain": round(results[name]["images_per_s"] / plain, 3) for name in results}


def small_batches(b: Bench) -> dict[str, Any]:
    """The step of MSF with few images, which is where launches show: 32 and 64 are the rows of 8 and 4 GPUs."""
    sizes = (b.batch,) if b.tiny else (32, 64)
    changes = ["model.norm=local"]
    return {str(n): _compare(b, "msf_r50_ep200_128k", f"optim.batch={n}", *changes) for n in sizes}


def deterministic(b: Bench) -> dict[str, Any]:
    """The step of MSF with deterministic algorithms beside one without."""
    results: dict[str, Any] = {}
    for name in ("fast", "deterministic"):
        torch.use_deterministic_algorithms(name == "deterministic")
        torch.backends.cudnn.benchmark = name == "fast" and b.on_gpu
        t = b.training("msf_r50_ep200_128k", f"machine.deterministic={str(name == 'deterministic').lower()}")
        batch = b.batch_of(t)
        results[name] = b.time(lambda t=t, batch=batch: _take(t, batch)).to_json()  # type: ignore[misc]
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = b.on_gpu
    return results | {"of_fast": round(results["deterministic"]["ms"] / results["fast"]["ms"], 3)}


def checkpoint(b: Bench) -> dict[str, Any]:
    """How long a periodic save blocks the training, and the steps while it is written."""
    t = b.training("msf_r50_ep200_128k")
    batch = b.batch_of(t)
    quiet = b.time(lambda: _take(t, batch))
    begin, finish, steps = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(RunDir(Path(folder) / "run"), b.world)
        for _ in range(2 if b.tiny else 4):
            _take(t, batch)
            b.sync()
            start = time.perf_counter()
            manager.begin(t.state())
            b.sync()
            begin.append(time.perf_counter() - start)
            while manager.busy:
                start = time.perf_counter()
                _take(t, batch)
                b.sync()
                steps.append(time.perf_counter() - start)
            start = time.perf_counter()
            problem = manager.finish()
            finish.append(time.perf_counter() - start)
            if problem:
                raise SystemExit(f"benchmarks.gpu: {problem}")
    ms = {name: round(statistics.median(values) * 1e3, 2) for name, values in (("begin", begin), ("finish", finish))}
    during = round(statistics.median(steps) * 1e3, 2) if steps else None
    return {"begin_ms": ms["begin"], "finish_ms": ms["finish"], "step_during_ms": during, "quiet": quiet.to_json()}


def plain_script(b: Bench, views: list[torch.Tensor]) -> Callable[[], None]:
    """Return the step of the official script, in fp32: EMA in a Python loop, cloned bank, two full products, SGD."""
    t = b.training(
        "msf_r50_ep200_128k",
        "optim.precision=fp32",
        "model.norm=local",
        "model.shuffle_bn=false",
        "machine.channels_last=false",
    )
    online, target = t.pair.online, copy.deepcopy(t.pair.target)
    online_parameters = dict(online.named_parameters())
    optimizer = torch.optim.SGD(online.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, foreach=False)
    query, other = (x.contiguous() for x in views)
    width = t.recipe.model.projector.out
    rows = F.normalize(torch.randn(b.rows[-1], width, device=b.device), dim=1)

    def one() -> None:
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


def loader(b: Bench) -> dict[str, Any]:
    """The loader alone on JPEG shards, and the time that a training waits for it, after a warm-up of both."""
    with tempfile.TemporaryDirectory() as scratch:
        shards, kind = _open_shards(b, Path(scratch))
        t = b.training("msf_r50_ep200_128k", *([f"optim.batch={len(shards)}"] if len(shards) < b.batch else []))
        order = Order([s.samples for s in shards.shards], seed=0, global_batch=t.recipe.optim.batch, window="all")
        threads = len(os.sched_getaffinity(0))
        source = Loader(Reader(shards), order, t.view_specs, seed=0, threads=threads, ring=6, pin=b.on_gpu)
        steps, warm = (4, 1) if b.tiny else (60, 20)
        alone = _rate_alone(b, source, steps, warm)
        waited = 0.0
        batches = source.iterate(0, steps)
        for number in range(steps):
            if number == warm:
                b.sync()
                start, waited = time.perf_counter(), 0.0
            wait_start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - wait_start
            _take(t, batch)
        b.sync()
        total = time.perf_counter() - start
        source.close()
        memory = b.batch_of(t)
        in_memory = b.time(lambda: _take(t, memory))
    size = t.recipe.optim.batch
    return {
        "images": kind,
        "threads": threads,
        "loader_images_per_s": round(alone, 1),
        "training_images_per_s": round((steps - warm) * size / total, 1),
        "waited_share": round(waited / total, 4),
        "in_memory_images_per_s": round(size / in_memory.ms * 1e3, 1),
    }


def _rate_alone(b: Bench, source: Loader, steps: int, warm: int) -> float:
    count, start = 0, 0.0
    for number, batch in enumerate(source.iterate(0, steps)):
        if number == warm:
            b.sync()
            start, count = time.perf_counter(), 0
        for image in batch.images:
            image.to(b.device, non_blocking=True)
        count += len(batch.index)
    b.sync()
    return count / (time.perf_counter() - start)


def _open_shards(b: Bench, scratch: Path) -> tuple[ShardSet, str]:
    """Return the shards of --data, or generated images of the size of ImageNet (noise over gradients, about 100 kB)."""
    if b.data is not None:
        return ShardSet.open(b.data), "given shards"
    for i in range(16 if b.tiny else 512):
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


def cifar(b: Bench) -> dict[str, Any]:
    """ResNet-18 on images of CIFAR-10's size."""
    results = _compare(b, "cifar10_msf")
    return results | {"minutes_for_200_epochs": round(200 * 50_000 / results["images_per_s"] / 60, 1)}
