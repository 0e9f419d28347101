"""What a node computes with: versions, decoding, GPUs and the all-reduce. ``python -m slurm.doctor.compute`` on a node.

It prints one JSON object per line, for ``probe`` to report. The ranks are found by the variables of torchrun.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALL_REDUCE_BYTES = 32 << 20
SECONDS = 1.0
"""About how long each rate is measured."""
TIMEOUT_S = 60.0
IMAGE = (500, 375)
"""Width and height of the image that is decoded: the average of ImageNet."""


def print_result(check: str, **values: object) -> None:
    """Print one result as a line of JSON."""
    sys.stdout.write(json.dumps({"check": check, **values}) + "\n")
    sys.stdout.flush()


def describe_versions() -> dict[str, Any]:
    """Return the versions of Python, torch, hpcssl, CUDA, NCCL and the GPU driver; empty texts for what is missing."""
    import torch

    import hpcssl

    driver = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", driver.read_text()) if driver.is_file() else None
    has_gpu = torch.cuda.is_available()
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "hpcssl": hpcssl.__version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else "",  # type: ignore[no-untyped-call]
        "driver": match[1] if match else "",
        "gpus": torch.cuda.device_count() if has_gpu else 0,
    }


def measure_rate(work: Callable[[], object], seconds: float = SECONDS) -> float:
    """Return how often per second ``work`` can be called, measured for about ``seconds``."""
    work()
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        work()
        count += 1
    return count / took


def make_jpeg() -> bytes:
    """Return a JPEG of the average size of ImageNet, about 100 kB: smooth colors with noise."""
    import numpy as np
    from PIL import Image

    width, height = IMAGE
    y, x = np.mgrid[:height, :width]
    noise = (x * 2654435761 + y * 40503 * (x % 97 + 1)) >> 7 & 31
    pixels = np.stack([(x + noise) % 256, (y + noise) % 256, (x + y + noise) // 2 % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure_decoding() -> float:
    """Return how many images of ImageNet's average size one core decodes per second."""
    from hpcssl.data import decode

    data, scratch = make_jpeg(), decode.ScratchBuffer()
    return measure_rate(lambda: decode.decode(data, scratch))


def find_decoder_fault() -> str:
    """Return why crops of JPEGs are not decoded by the native decoder on this node; empty if they are."""
    from hpcssl.data.native import selection

    return selection.find_fault()


def measure_gpu_copies() -> dict[str, float]:
    """Return the rate of copies from the first GPU to each other one of this node, in GB/s by ``0-k``."""
    import torch

    if not torch.cuda.is_available():
        return {}
    source = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda:0")
    rates = {}
    for number in range(1, torch.cuda.device_count()):
        target = torch.empty_like(source, device=f"cuda:{number}")

        def copy(target: torch.Tensor = target, number: int = number) -> None:
            target.copy_(source)
            torch.cuda.synchronize(number)
            torch.cuda.synchronize(0)

        rates[f"0-{number}"] = measure_rate(copy, 0.3) * len(source) / 1e9
    return rates


def measure_all_reduce() -> dict[str, Any]:
    """Sum a tensor of ``ALL_REDUCE_BYTES`` over all ranks, first to check the result, then to measure the rate.

    Returns:
        ``device``, ``correct``, and ``gb_per_s``: bytes of the tensor per second of one all-reduce.
    """
    import torch

    from hpcssl.distributed.world import World

    world = World.start("auto", timeout_s=TIMEOUT_S)
    x = torch.full((ALL_REDUCE_BYTES // 4,), float(world.rank + 1), device=world.device)
    expected = world.size * (world.size + 1) / 2
    is_correct = bool((world.all_reduce_sum(x) == expected).all())
    rounds = 4  # the same on all ranks, so not by the clock
    began = time.perf_counter()
    for _ in range(rounds):
        last = world.all_reduce_sum(x)
    is_correct = is_correct and bool((last == expected).all())  # waits for the GPU
    took = time.perf_counter() - began
    device = world.device.type
    world.barrier()
    world.close()
    return {"device": device, "correct": is_correct, "gb_per_s": rounds * ALL_REDUCE_BYTES / took / 1e9}


def main() -> None:
    """Measure, and print one line per result."""
    versions = describe_versions()
    print_result("versions", **versions)
    cores, fault = len(os.sched_getaffinity(0)), find_decoder_fault()
    print_result("decode", images_per_s=measure_decoding(), cores=cores, native_fault=fault)
    if versions["gpus"] > 1:
        print_result("gpu_copies", rates=measure_gpu_copies())
    if int(os.environ["WORLD_SIZE"]) > 1:
        print_result("all_reduce", **measure_all_reduce())


if __name__ == "__main__":
    main()
