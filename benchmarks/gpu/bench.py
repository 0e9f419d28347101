"""The device, the sizes, and a clock that does not disturb what it measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.data.batch import Batch
from hpcssl.distributed.world import World
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec
from hpcssl.train import recipe as recipes
from hpcssl.train.train_state import TrainState
from hpcssl.views.augment import AUGMENTATIONS, Augmentation, draw_params

TINY = [
    "model.arch=resnet_tiny",
    "model.norm_group_size=4",
    "optim.precision=fp32",
]


@dataclass
class Timing:
    """Milliseconds per call of several runs of calls back to back: the median run, and the fastest and slowest.

    ``host_ms`` is the time until the host had launched them: where it is near the time, the GPU waits for launches.
    """

    ms: float
    low: float
    high: float
    host_ms: float
    calls: int

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}


class Bench:
    """The device and the sizes of the measurements; ``tiny`` ones prove on a CPU that the code runs."""

    def __init__(self, device: str, tiny: bool, data: Path | None):
        self.world, self.tiny, self.data = World.single_process(device), tiny, data
        self.device = self.world.device
        self.queries, self.width, self.k = (16, 32, 5) if tiny else (256, 512, 5)
        self.rows = (8192,) if tiny else (131_072, 1_048_576)
        self.batch, self.side = (8, 32) if tiny else (256, 224)
        self.calls, self.runs, self.warm_up_s = (2, 2, 0.0) if tiny else (20, 5, 1.0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, work: Callable[[], Any]) -> Timing:
        """Time calls back to back, with events of the GPU around each run of them, after a second of warm-up."""
        start = time.perf_counter()
        work()
        while time.perf_counter() - start < self.warm_up_s:
            work()
        times, host = [], []
        for _ in range(self.runs):
            self.sync()
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on_gpu else []
            begun = time.perf_counter()
            if ends:
                ends[0].record()
            for _ in range(self.calls):
                work()
            if ends:
                ends[1].record()
            host.append((time.perf_counter() - begun) * 1e3 / self.calls)
            self.sync()
            spent = ends[0].elapsed_time(ends[1]) if ends else (time.perf_counter() - begun) * 1e3
            times.append(spent / self.calls)
        return Timing(statistics.median(times), min(times), max(times), statistics.median(host), self.calls)

    def extra_mib(self, work: Callable[[], Any]) -> float | None:
        """The peak memory of a call above that before it, in MiB; None without a GPU."""
        if not self.on_gpu:
            return None
        work()
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.sync()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    # -- inputs -----------------------------------------------------------------------------------------------

    def unit_rows(self, rows: int, name: str) -> torch.Tensor:
        draw = rng.generator(rng.key(0, name), self.device)
        return F.normalize(torch.randn(rows, self.width, generator=draw, device=self.device), dim=1)

    def bank(self, rows: int, prefilter: str, exact: bool | None = None) -> Bank:
        columns = {"key": ColumnSpec(self.width)}
        bank = Bank(rows, columns, self.world, key=1, prefilter=prefilter, exact=exact)
        for first in range(0, rows, 65_536):
            bank.push(key=self.unit_rows(min(65_536, rows - first), f"rows-{first}"))
        return bank

    def training(self, name: str, *changes: str) -> TrainState:
        """The training of a recipe on this device, without data; ``tiny``: with a small network and bank."""
        if self.tiny:
            size = f"views.size={self.side}"
            sizes = [size, f"optim.batch={self.batch}", "bank.size=4096"]
            changes = (*changes, *TINY, *sizes, *(["views.crops_size=16"] if "_mc" in name else []))
        recipe = recipes.compose(name, list(changes))
        labels = np.zeros(1_281_167, np.int64)
        return TrainState(recipe, self.world, steps_per_epoch=5000, labels=labels, data_digest="benchmark")

    def batch_of(self, t: TrainState) -> Batch:
        """A batch of noise, in pinned memory where there is a GPU."""
        count = t.recipe.optim.batch
        images = [self.noise(count, view.size) for view in t.plan.views]
        params = [draw(view.augmentation, count) for view in t.plan.views]
        return Batch(0, 0, np.arange(count), np.arange(count) % 10, images, params)

    def noise(self, count: int, side: int) -> torch.Tensor:
        draws = rng.generator(rng.key(0, "noise"))
        images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=draws)
        return images.pin_memory() if self.on_gpu else images

    def smooth(self, count: int, augment: str) -> tuple[torch.Tensor, np.ndarray]:
        """uint8 views [count, S, S, 3] as the loader delivers them, and drawn parameters."""
        coarse = torch.rand(count, 3, 16, 16, generator=rng.generator(rng.key(0, "pictures")))
        smooth = F.interpolate(coarse, (self.side, self.side), mode="bicubic").clamp(0, 1).mul(255).byte()
        return smooth.permute(0, 2, 3, 1).contiguous(), draw(AUGMENTATIONS[augment], count)


def draw(augmentation: Augmentation, count: int) -> np.ndarray:
    """Drawn parameters of views of images of 400 x 500 pixels."""
    return np.stack([draw_params(augmentation, rng.key(0, "params", i), 400, 500) for i in range(count)])
