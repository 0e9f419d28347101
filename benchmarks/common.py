"""Shared by the benchmarks of the data path: real images, taking turns, ratios, and the JSON report.

A rate means little on a shared machine. So candidates take turns in every round, in a rotating order, and the report
gives the median over rounds of the ratio within one round.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hpcssl import cli_runner
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError

PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "webdataset", "numpy", "lightly", "kornia")


@dataclass
class Images:
    """The same images as shards (ours), as class folders (ImageFolder), and as bytes in memory."""

    shards: ShardSet
    folder: Path
    bodies: list[bytes] = field(repr=False)


def prepare(data: Path, scratch: Path) -> Images:
    """Write the images of ``data`` below ``scratch``: a folder of shards, or a tar of CLASS_NAME.JPEG or CLASS/NAME."""
    folder, root = scratch / "images", data
    if data.is_dir():
        shards = ShardSet.open(data)
        with Reader(shards) as reader:
            for index in range(len(shards)):
                target = folder / f"class{max(0, reader.label(index)):04d}" / f"{index:07d}.jpg"
                _write(target, reader.read(index))
    elif data.is_file():
        from data_prep.cli import app

        with tarfile.open(data) as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                    parts = Path(member.name).parts
                    class_name = parts[-2] if len(parts) > 1 else parts[-1].split("_")[0]
                    _write(folder / class_name / parts[-1], tar.extractfile(member).read())
        root = scratch / "shards"
        if cli_runner.run(app, ["images", str(folder), str(root), "--samples-per-shard", "50"], "hpcssl-shard"):
            raise SystemExit(1)
    else:
        raise DataError(
            f"--data {data}",
            got="no such file or folder",
            expected="a folder of shards or a tar of JPEG images",
            fix="write shards with `hpcssl-shard images SRC OUT` and name OUT",
        )
    shards = ShardSet.open(root)
    with Reader(shards) as reader:
        return Images(shards, folder, [reader.read(i) for i in range(len(shards))])


def _write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def take_turns(
    candidates: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Measure the seconds per unit of work, by candidate and round.

    A candidate does its work and returns the number of units. ``clock=time.process_time`` counts the CPU time of all
    threads, which other processes on the machine disturb least. It suits work on one core, but not comparisons of
    several cores or processes.
    """
    for work in candidates.values():
        work()  # warm-up: caches, compiled kernels, worker processes
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            units = candidates[name]()
            seconds[name].append((clock() - start) / units)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """Return how many times faster ``ours`` is than ``peer``: the median of the ratios of the rounds."""
    return round(statistics.median(b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)), 3)


def rates(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the units per second of the median round."""
    return {name: round(1 / statistics.median(values), 1) for name, values in seconds.items()}


def versions() -> dict:
    """Return the versions that affect the figures; nothing identifies a machine or a person."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "python": platform.python_version(),
        **packages,
        "cpu": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def report(name: str, what: str, body: dict, out: Path | None) -> None:
    """Print the sections of ``body`` as lines, and write all of it as JSON."""
    print(f"{name}: {what}")
    for section, rows in body.items():
        print(f"  {section}")
        for key, value in rows.items():
            print(f"    {key:58s} {value}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"benchmark": name, "what": what, **body, "versions": versions()}, indent=2) + "\n")
        print(f"  written to {out.name}")


def with_goal(value: float, goal: float) -> str:
    """Return text such as ``4.31 (goal 4.2: met)``."""
    return f"{value} (goal {goal}: {'met' if value >= goal else 'missed'})"
