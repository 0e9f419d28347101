"""What more GPUs would give, without one: ``python -m benchmarks scale [--recipes NAME …] [--ranks N …] [--out FILE]``.

For each number of GPUs a step of the recipe is taken on a fake one (``fake_gpu.py``). Its floating-point operations,
its launches and each of its collectives are counted, and priced with rates that you state; none of the rates is
measured here. All of them are printed with the result:

    step = max(FLOP / rate, operations * launch) + waits for collectives
    all-reduce of b bytes       2 (W - 1) / W * b / bandwidth + latency
    all-gather to b bytes           (W - 1) / W * b / bandwidth + latency       (others likewise)

W is the number of ranks that take part, which may be fewer than all. Bandwidth and latency are those within a node up
to one node, and those between nodes beyond. Of the all-reduce of the gradients, a stated share hides behind the
backward pass, but never more than half of the arithmetic takes. A batch that does not give every GPU the stated number
of images grows until it does; the recipe's result then no longer holds, and the row says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fake_gpu import Collective
from benchmarks.fake_step import IMAGES, Measured, measure
from hpcssl.train import gpu_memory, world_sizes
from hpcssl.train import recipe as recipes

RECIPES = ("msf_r50_ep200_128k", "nnclr_r50_ep1000")
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


MEANING = {
    "tflops": "sustained rate of forward and backward passes, TFLOP/s per GPU",
    "launch_us": "host time per operation, µs",
    "node_gb_s": "bandwidth of a collective per GPU within a node, GB/s",
    "network_gb_s": "bandwidth of a collective per GPU between nodes, GB/s",
    "node_latency_us": "time of an empty collective within a node, µs",
    "network_latency_us": "time of an empty collective between nodes, µs, and again for each doubling of the nodes",
    "gpus_per_node": "GPUs per node",
    "overlap": "share of the gradients' all-reduce that the backward pass hides",
}


@dataclass(frozen=True)
class Rates:
    """What the counts are priced with. The defaults are assumptions for H200 GPUs, NVLink and 400 Gbit/s per GPU."""

    tflops: float = 87.0
    launch_us: float = 5.0
    node_gb_s: float = 360.0
    network_gb_s: float = 40.0
    node_latency_us: float = 20.0
    network_latency_us: float = 40.0
    gpus_per_node: int = 8
    overlap: float = 0.8


def seconds_of(c: Collective, rates: Rates) -> float:
    """The time of one collective.

    The ranks of a group have consecutive numbers: a group of at most ``gpus_per_node`` ranks is taken to lie within one
    node.
    """
    ranks = c.ranks
    if ranks <= rates.gpus_per_node:
        bandwidth, latency = rates.node_gb_s * 1e9, rates.node_latency_us * 1e-6
    else:
        doublings = math.log2(ranks / rates.gpus_per_node)
        bandwidth, latency = rates.network_gb_s * 1e9, rates.network_latency_us * 1e-6 * (1 + doublings)
    moved = 2 * c.sent if c.kind == "allreduce" else max(c.sent, c.received)
    return moved * (ranks - 1) / ranks / bandwidth + latency


def price(m: Measured, rates: Rates) -> dict[str, float]:
    """The milliseconds of a step and of its parts."""
    compute, launches = m.step.flops / rates.tflops / 1e12, m.step.launches * rates.launch_us * 1e-6
    gradients = [c for c in m.step.collectives if c.gradients]
    reduction = sum(seconds_of(c, rates) for c in gradients)
    others = sum(seconds_of(c, rates) for c in m.step.collectives if not c.gradients)
    exposed = max(reduction * (1 - rates.overlap), reduction - compute / 2)
    step = max(compute, launches) + exposed + others
    parts = {"compute": compute, "launches": launches, "gradients": reduction, "other_collectives": others}
    return {f"{name}_ms": round(seconds * 1e3, 2) for name, seconds in {"step": step, **parts}.items()}


def measure_scale(name: str, ranks: int, least_images: int, rates: Rates) -> dict[str, Any]:
    """Count and price the step of a recipe on this number of GPUs."""
    recipe = recipes.compose(name, [])
    batch = max(recipe.optim.batch, ranks * least_images)
    changes = [] if batch == recipe.optim.batch else [f"optim.batch={batch}"]
    if recipe.bank.size < batch:
        changes.append(f"bank.size={batch}")
    recipe = recipes.compose(name, changes)
    if reason := world_sizes.explain_unfit(recipe, ranks):
        return {"ranks": ranks, "impossible": reason}
    m = measure(name, ranks, *changes, plain=False)
    priced = price(m, rates)
    steps = recipe.schedule.epochs * (IMAGES // batch)
    hours = steps * priced["step_ms"] / 3.6e6
    return {
        "ranks": ranks,
        "batch": batch,
        "is_recipe": not changes,
        "images_per_gpu": m.rows,
        **priced,
        "images_per_s": round(batch / priced["step_ms"] * 1e3),
        "operations": m.step.launches,
        "tflop_per_gpu": round(m.step.flops / 1e12, 3),
        "collectives": {kind: list(figures) for kind, figures in m.step.by_kind().items()},
        "memory_gib": round(gpu_memory.estimate(recipe, ranks).total / 2**30, 2),
        "hours": round(hours, 2),
        "gpu_hours": round(hours * ranks, 1),
    }


def describe(row: dict[str, Any]) -> str:
    """The row as a line of text."""
    if "impossible" in row:
        return f"  {row['ranks']:5d} GPUs: impossible: {row['impossible']}"
    sent = ", ".join(f"{n} {kind} ({s / 1e6:.1f} MB)" for kind, (n, s, _) in row["collectives"].items())
    exposed = row["step_ms"] - max(row["compute_ms"], row["launches_ms"]) - row["other_collectives_ms"]
    return (
        f"  {row['ranks']:5d} GPUs, batch {row['batch']}{'' if row['is_recipe'] else ' (not the recipe)'}: step "
        f"{row['step_ms']} ms = max(compute {row['compute_ms']}, launches {row['launches_ms']}) + {exposed:.2f} of "
        f"{row['gradients_ms']} for gradients + other collectives {row['other_collectives_ms']}; {row['images_per_s']} "
        f"images/s; {row['memory_gib']} GiB; {row['hours']} h, {row['gpu_hours']} GPU-hours; {sent}"
    )


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw images per second over GPUs, beside a straight line from the first number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, all_points in rows.items():
        points = [row for row in all_points if "impossible" not in row]
        x, y = [row["ranks"] for row in points], [row["images_per_s"] for row in points]
        (line,) = axes.loglog(x, y, marker="o", label=name)
        axes.loglog(x, [y[0] * n / x[0] for n in x], color=line.get_color(), linestyle=":", linewidth=1)
        grown = [(n, v) for n, v, row in zip(x, y, points, strict=True) if not row["is_recipe"]]
        if grown:
            axes.plot(*zip(*grown, strict=True), "o", markerfacecolor="white", color=line.get_color())
    axes.set_xlabel("GPUs (white: the batch had to grow)")
    axes.set_ylabel("images per second, computed")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--least-images", type=int, default=16, help="images per GPU below which the batch grows")
    for name, meaning in MEANING.items():
        value = getattr(Rates, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=meaning)
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON, and a plot beside it")
    options = parser.parse_args()
    rates = Rates(**{name: getattr(options, name) for name in MEANING})
    assumptions = {meaning: getattr(rates, name) for name, meaning in MEANING.items()}
    print("Assumed, not measured:", *[f"  {meaning}: {value:g}" for meaning, value in assumptions.items()], sep="\n")
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in options.recipes:
        print(name)
        rows[name] = []
        for ranks in options.ranks:
            rows[name].append(measure_scale(name, ranks, options.least_images, rates))
            print(describe(rows[name][-1]), flush=True)
            if options.out is not None:
                body = {"benchmark": "scale", "assumed": assumptions, "least_images": options.least_images}
                options.out.write_text(json.dumps(body | {"recipes": rows}, indent=1) + "\n")
    if options.out is not None:
        plot(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
