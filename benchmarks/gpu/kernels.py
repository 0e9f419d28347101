"""Pieces of a step: search and push, augmentation, moving average, norms, copies, and k-means."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench
from hpcssl.distributed.world import World
from hpcssl.methods import equations
from hpcssl.methods.cmsf.split_kmeans import split_kmeans
from hpcssl.nets import norm, resnet
from hpcssl.nets.kernels import selection as norm_selection
from hpcssl.nets.resnet import Arch
from hpcssl.views.augment import AUGMENTATIONS, augment_batch
from hpcssl.views.kernels import selection as view_selection


def correct(b: Bench) -> dict[str, Any]:
    """Compare the device with float64 and with the CPU. What is wrong is listed in ``failures``, and fails the run."""
    results: dict[str, Any] = {"failures": []}

    def check(name: str, value: float, holds: bool) -> None:
        results[name] = round(value, 6)
        if not holds:
            results["failures"].append(f"{name}: {value:g}")

    rows, query = b.rows[0], b.unit_rows(b.queries, "query")
    for prefilter, exact in (("fp32", None), ("bf16", None), ("fp32", True), ("bf16", True)):
        bank = b.bank(rows, prefilter, exact)
        every = bank.get("key", torch.arange(rows, device=b.device)).double().cpu()
        truth = (query.double().cpu() @ every.T).topk(b.k, dim=1).indices
        ours = bank.nearest(query, b.k).slot.cpu()
        same = sum(len(set(a.tolist()) & set(t.tolist())) for a, t in zip(ours, truth, strict=True))
        recall = same / (b.k * b.queries)
        check(f"recall_{prefilter}{'_exact' if exact else ''}", recall, recall == 1 if exact else recall >= 0.999)
    for name in ("strong", "weak", "byol_2"):
        images, params = b.smooth(16, name)
        pair = [augment_batch(images.to(d), params, AUGMENTATIONS[name]).cpu() for d in (b.device, torch.device("cpu"))]
        levels = float((pair[0] - pair[1]).abs().max()) * 0.225 * 255
        check(f"augment_{name}_levels", levels, levels <= 1)
    for group in (16, 4):
        ours, theirs = _norm_outputs(b, group)
        error = float((ours - theirs).abs().max())
        check(f"norm_of_{group}_error", error, error <= 1e-3)
    if b.on_gpu:
        for name, fault in list_kernel_faults(b).items():
            results[f"fast_{name}"] = fault or "agree"
            results["failures"] += [fault] * bool(fault)
    return results


def list_kernel_faults(b: Bench) -> dict[str, str]:
    """What a training finds wrong with the fast kernels before it uses them: a clause, or nothing, by their kind."""
    found = {"norms": norm_selection.find_fault, "views": view_selection.find_fault}
    return {name: find(b.device) for name, find in found.items()}


def list_kernels(b: Bench, kind: str) -> tuple[str, ...]:
    """Return the settings of ``machine.kernels`` to time: ``plain``, and ``fast`` where these kernels agree with it."""
    return ("plain", "fast") if b.on_gpu and not list_kernel_faults(b)[kind] else ("plain",)


def _norm_outputs(b: Bench, group: int) -> tuple[Tensor, Tensor]:
    """Output and gradient of our norm in float32, and of the formula in float64."""
    x = torch.randn(16, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    layer = norm.BatchNorm(8, group=group, world=b.world).to(b.device)
    ours_x = x.to(b.device).to(memory_format=torch.channels_last).requires_grad_()
    ours = layer(ours_x)
    (ours * torch.linspace(0, 1, ours.numel(), device=b.device).view_as(ours)).sum().backward()
    exact_x = x.double().requires_grad_()
    parts = exact_x.split(group)
    exact = torch.cat([nn.functional.batch_norm(part, None, None, training=True) for part in parts])
    (exact * torch.linspace(0, 1, exact.numel(), dtype=torch.float64).view_as(exact)).sum().backward()
    assert ours_x.grad is not None and exact_x.grad is not None
    pairs = [(ours, exact), (ours_x.grad, exact_x.grad)]
    flat = [torch.cat([pair[i].detach().double().cpu().flatten() for pair in pairs]) for i in range(2)]
    return flat[0], flat[1]


def bank(b: Bench) -> dict[str, Any]:
    """Search with loss, and push; ``naive`` is the way of the official code."""
    return {str(rows): _bank(b, rows) for rows in b.rows}


def _bank(b: Bench, rows: int) -> dict[str, Any]:
    query, online, batch = (b.unit_rows(b.queries, name) for name in ("query", "online", "push"))
    entry: dict[str, Any] = {}
    for prefilter in ("fp32", "bf16"):
        filled = b.bank(rows, prefilter)

        def ours(filled: Any = filled) -> Tensor:
            neighbors = filled.nearest(query, b.k)
            return equations.mean_shift(online, neighbors.rows, neighbors.valid).mean()

        entry[f"search_{prefilter}"] = b.time(ours).to_json()
        entry[f"search_{prefilter}_extra_mib"] = b.extra_mib(ours)
    entry["push"] = b.time(lambda: filled.push(key=batch)).to_json()
    every = filled.get("key", torch.arange(rows, device=b.device))

    def naive() -> Tensor:
        targets = every.clone()
        near = (2 - 2 * query @ targets.T).topk(b.k, dim=1, largest=False).indices
        return (2 - 2 * online @ targets.T).gather(1, near).sum(1).div(b.k).mean()

    entry["naive"], entry["naive_extra_mib"] = b.time(naive).to_json(), b.extra_mib(naive)
    best = min(entry["search_fp32"]["ms"], entry["search_bf16"]["ms"])
    return entry | {"of_naive": round(best / entry["naive"]["ms"], 4)}


def augment(b: Bench) -> dict[str, Any]:
    """From uint8 to normalized floats, two views of a batch."""
    views = [(b.smooth(b.batch, name), AUGMENTATIONS[name]) for name in ("strong", "weak")]
    on_device = [(images.to(b.device), params, named) for (images, params), named in views]
    results: dict[str, Any] = {"views": 2 * b.batch}
    for kernels in list_kernels(b, "views"):
        for dtype in (torch.float32, torch.bfloat16):  # a training with autocast has the fast kernels write bfloat16
            one = partial(augment_batch, dtype=dtype, fast=kernels == "fast")
            timing = b.time(partial(lambda one: [one(*view) for view in on_device], one))
            results[f"{kernels}_{str(dtype).removeprefix('torch.')}"] = timing.to_json()
    if "fast_bfloat16" in results:
        results["fast_of_plain"] = round(results["fast_bfloat16"]["ms"] / results["plain_float32"]["ms"], 3)
    return results


def ema(b: Bench) -> dict[str, Any]:
    """The moving average of the target encoder."""
    pair = b.training("msf_r50_ep200_128k").pair
    assert pair.target is not None
    count = sum(p.numel() for p in pair.target.parameters())
    return {"parameters": count, **b.time(lambda: pair.update_ema(0.99)).to_json()}


def norms(b: Bench) -> dict[str, Any]:
    """A ResNet forward and backward with our norm in groups, beside ``nn.BatchNorm2d``."""
    arch = Arch(arch="resnet18" if b.tiny else "resnet50")
    x = torch.randn(b.batch, 3, b.side, b.side, device=b.device).to(memory_format=torch.channels_last)
    kinds: dict[str, Any] = {"nn.BatchNorm2d": nn.BatchNorm2d}
    for name, group in (("local", b.batch), ("ghost", max(2, b.batch // 4))):
        for kernels in list_kernels(b, "norms"):
            fast = kernels == "fast"
            kinds[f"{name}_{kernels}"] = partial(norm.BatchNorm, group=group, world=b.world, fast=fast)
    results: dict[str, Any] = {"batch": b.batch}
    for name, kind in kinds.items():
        network = resnet.build(arch, kind).to(b.device).to(memory_format=torch.channels_last)
        layers = norm.find_norms([network])

        def work(network: nn.Module = network, layers: list[norm.BatchNorm] = layers) -> None:
            with torch.autocast(b.device.type, dtype=torch.bfloat16, enabled=b.on_gpu):
                network(x).sum().backward()
            network.zero_grad()
            norm.discard_pending(layers)

        results[name] = b.time(work).to_json()
        results[f"{name}_of_torch"] = round(results[name]["ms"] / results["nn.BatchNorm2d"]["ms"], 3)
    return results


def copies(b: Bench) -> dict[str, Any]:
    """The two views of a batch from the host to the device."""
    pinned = [b.noise(b.batch, b.side) for _ in range(2)]
    pageable = [torch.empty_like(x, pin_memory=False).copy_(x) for x in pinned]
    megabytes = sum(x.numel() for x in pinned) / 1e6
    results: dict[str, Any] = {"megabytes": round(megabytes, 2)}
    for name, images in (("pinned", pinned), ("pageable", pageable)):
        timing = b.time(partial(lambda xs: [x.to(b.device, non_blocking=True) for x in xs], images))
        results[name] = timing.to_json() | {"gb_per_s": round(megabytes / 1e3 / max(timing.ms, 1e-6) * 1e3, 2)}
    return results


def kmeans(b: Bench) -> dict[str, Any]:
    """K-means of CMSF-KM as GPUs compute it, on fewer rows and clusters than ImageNet's; seconds of one call."""
    world = World(0, 1, 0, b.device)
    rows, count = (512, 8) if b.tiny else (131_072, 5_000)
    x = b.unit_rows(rows, "kmeans")
    start = time.perf_counter()
    split_kmeans(x, count, iterations=5, seed=0, world=world).cpu()  # waits for the result
    return {"rows": rows, "clusters": count, "iterations": 5, "call_s": round(time.perf_counter() - start, 3)}
