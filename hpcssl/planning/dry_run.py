"""A dry run: build a training, take a few steps, and report speed, memory and length. Nothing is left behind.

The network, the method, the optimizer and the loader are those of ``hpcssl train``. What an attempt writes into its run
folder goes to a temporary folder, which is removed. Shards in a folder are read where they are, not staged.
"""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch

from hpcssl.checkpoint.manager import CheckpointState
from hpcssl.checkpoint.reader import latest_valid
from hpcssl.data.address import is_remote
from hpcssl.data.batch import RING_SIZE
from hpcssl.data.loader import Loader
from hpcssl.distributed.world import World
from hpcssl.errors import Stopped, format_bytes
from hpcssl.evals.online_knn import build_online_knn
from hpcssl.journal import set_up_logging
from hpcssl.run_dir import RunDir
from hpcssl.train import main as training
from hpcssl.train.data import DataPipeline
from hpcssl.train.recipe import Recipe
from hpcssl.train.start import initial_weights
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState

WARM_UP_STEPS, WARM_UP_S = RING_SIZE + 1, 10.0
"""Steps that are not measured, or seconds after which the next one is: the first steps choose kernels, and take batches
that were loaded meanwhile."""
MEASURED_STEPS, MEASURED_S = 20, 5.0
"""Most steps that are measured, or seconds after which enough are."""


@dataclass(frozen=True)
class DryRunReport:
    """What a dry run has measured.

    Attributes:
        recipe: Name of the recipe.
        processes: Number of processes.
        device: Name of the device of rank 0.
        batch: Images per step, over all processes.
        steps: Number of steps that were taken.
        is_warm: Whether the measured steps follow others. A run of one step has none.
        step_s: Seconds per step: the mean of the measured steps, of the slowest process.
        loss: Loss of the last step, of rank 0.
        memory_bytes: Most memory that a process used: of a GPU what torch allocated, else the resident memory of the
            process with all its libraries.
        device_bytes: Memory of the GPU of rank 0, or of the machine.
        checkpoint_bytes: Size of one checkpoint, over all processes.
        steps_per_epoch: Steps per epoch.
        first_step: Step of the checkpoint that the training would go on from; 0 without one.
        last_step: Number of steps of the whole run.
    """

    recipe: str
    processes: int
    device: str
    batch: int
    steps: int
    is_warm: bool
    step_s: float
    loss: float
    memory_bytes: int
    device_bytes: int
    checkpoint_bytes: int
    steps_per_epoch: int
    first_step: int
    last_step: int

    @property
    def images_per_s(self) -> float:
        """Images per second, over all processes."""
        return self.batch / self.step_s

    @property
    def epoch_s(self) -> float:
        """Seconds per epoch, without evaluations and checkpoints."""
        return self.steps_per_epoch * self.step_s

    @property
    def remaining_s(self) -> float:
        """Seconds from ``first_step`` to the end of the training, without evaluations and checkpoints."""
        return (self.last_step - self.first_step) * self.step_s


def dry_run(
    recipe: Recipe,
    run: RunDir | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    allow_pipe: str = "",
    first_step: int = 0,
) -> DryRunReport | None:
    """Take a few steps of a recipe without a run folder. All ranks call it, as ``hpcssl.train.main.train``.

    Args:
        recipe: The recipe, with its data.
        run: A run folder that the training would go on in; it is only read.
        stop: Whether this process was asked to stop.
        allow_pipe: The only shell command that ``data.train`` may be.
        first_step: Step of the checkpoint of another run that the training would start from; 0 without one.

    Returns:
        The report on rank 0, None on other ranks.

    Raises:
        HpcsslError: The training cannot be built, on any rank. ``Stopped`` on all ranks after a request to stop.
    """
    world = World.start(recipe.machine.devices, recipe.machine.timeout_minutes * 60, stop)
    training.set_up_torch(recipe.machine, world.device)
    set_up_logging(world.rank)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    data = recipe.data
    # shards at an address come to the disk that is meant for them
    place = data.stage_dir if is_remote(data.train) and Path(data.stage_dir).is_dir() else None
    with tempfile.TemporaryDirectory(prefix="hpcssl-dry-run-", dir=place) as folder:
        scratch = RunDir(folder)
        recipe = _without_copies(recipe, folder)
        pipeline = DataPipeline(recipe, scratch, world, allowed_pipe=allow_pipe, stop=stop)
        t, loader, order = training.build_training(recipe, world, pipeline)
        first_step = max(first_step, _saved_step(run, world))
        if first_step == 0:
            initial_weights.load(recipe, t.pair)
        try:
            build_online_knn(recipe, scratch, world, stop)  # opens and checks the shards of the validation set
            end = min(t.last_step, WARM_UP_STEPS + MEASURED_STEPS + RING_SIZE)
            pipeline.start_prefetch(order, 0, end, random_access=t.support is not None)
            seconds, loss = _take_steps(t, loader, stop)
        finally:
            loader.close()
            if t.support is not None:
                t.support.close()
            pipeline.close()
            pipeline.reader.close()
    report = _make_report(t, seconds, loss, first_step)
    is_main = world.is_main
    world.barrier()  # when one process leaves, the launcher may kill the others
    world.close()
    return report if is_main else None


def _without_copies(recipe: Recipe, folder: str) -> Recipe:
    """The recipe without the work that precedes the first step of a large data set: copies and checksums.

    Shards at an address go into ``folder``.
    """
    stage_dir = folder if is_remote(recipe.data.train) else ""
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, stage_dir=stage_dir, verify="sizes"))


def _take_steps(t: TrainState, loader: Loader, stop: Callable[[], bool]) -> tuple[list[float], float]:
    """Take steps until enough are measured. A collective.

    Returns:
        Seconds of every step, and the loss of the last one.
    """
    seconds: list[float] = []
    loss = math.nan
    batches = iter(loader.iterate(0, t.last_step, stop))
    while t.step < t.last_step:
        start = time.monotonic()
        report = train_step(t, next(batches))
        if t.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
        if t.world.any(stop()) or report.abandoned:
            raise Stopped(
                "dry run",
                got="a request to stop",
                expected="time for a few steps",
                fix="run the same command again",
            )
        loss = float(report.scalars["loss"])
        measured = seconds[_warm_up_steps(seconds) :]
        is_enough = len(measured) >= MEASURED_STEPS or sum(measured) >= MEASURED_S
        if t.world.any(is_enough):
            break
    return seconds, loss


def _warm_up_steps(seconds: list[float]) -> int:
    """Number of steps that are not measured, from the seconds of all steps: one or more."""
    total = 0.0
    for count, step_s in enumerate(seconds, 1):
        total += step_s
        if count == WARM_UP_STEPS or total >= WARM_UP_S:
            return count
    return len(seconds)


def _make_report(t: TrainState, seconds: list[float], loss: float, first_step: int) -> DryRunReport:
    """Combine the measurements of all ranks. A collective."""
    world = t.world
    # a run of very few steps ends during the warm-up
    measured = seconds[_warm_up_steps(seconds) :] or seconds[1:] or seconds
    if world.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
        properties = torch.cuda.get_device_properties(world.device)
        device, device_bytes = properties.name, properties.total_memory
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        threads = torch.get_num_threads()
        device = f"CPU, {threads} thread{'s' * (threads > 1)}"
        device_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    numbers = torch.tensor([sum(measured) / len(measured), float(memory)], dtype=torch.float64, device=world.device)
    step_s, memory_bytes = world.all_reduce_max(numbers).result().tolist()
    return DryRunReport(
        recipe=t.recipe.name,
        processes=world.size,
        device=device,
        batch=t.recipe.optim.batch,
        steps=len(seconds),
        is_warm=len(seconds) > 1,
        step_s=step_s,
        loss=loss,
        memory_bytes=int(memory_bytes),
        device_bytes=device_bytes,
        checkpoint_bytes=_checkpoint_bytes(t.state()),
        steps_per_epoch=t.steps_per_epoch,
        first_step=min(first_step, t.last_step),
        last_step=t.last_step,
    )


def _checkpoint_bytes(state: CheckpointState) -> int:
    """Bytes of the tensors of one checkpoint, in which each tensor is stored once."""
    return sum(math.prod(shard.shape) * shard.tensor.element_size() for shard in state.tensors.values())


def _saved_step(run: RunDir | None, world: World) -> int:
    """Step of the newest whole checkpoint of a run folder, as rank 0 finds it; 0 without one. A collective."""
    steps = [0]

    def look() -> None:
        saved = latest_valid(run)[0] if run is not None and run.checkpoints.is_dir() else None
        steps.append(saved.step if saved else 0)

    world.run_on_main(look)
    return int(world.broadcast_text(str(steps[-1])))


def print_report(report: DryRunReport) -> None:
    """Print a report: aligned lines on a terminal, tab-separated names and values on a pipe."""
    end = datetime.now().astimezone() + timedelta(seconds=report.remaining_s)
    remaining = report.last_step - report.first_step
    length = f"{remaining} steps, {format_duration(report.remaining_s)}"
    warm = "" if report.is_warm else ", the only one: later steps are faster"
    memory = "GPU memory" if not report.device.startswith("CPU") else "memory"
    rows = [
        ("recipe", report.recipe),
        ("processes", f"{report.processes} ({report.device})"),
        ("batch", f"{report.batch} images"),
        ("steps taken", f"{report.steps}{warm}"),
        ("loss", f"{report.loss:.4g}"),
        ("step", format_duration(report.step_s)),
        ("images per second", f"{report.images_per_s:.4g}"),
        (memory, f"{format_bytes(report.memory_bytes)} of {format_bytes(report.device_bytes)}, per process"),
        ("checkpoint", format_bytes(report.checkpoint_bytes)),
        ("epoch", f"{report.steps_per_epoch} steps, {format_duration(report.epoch_s)}"),
        ("training", length if not report.first_step else f"{length}, from step {report.first_step} on"),
        ("expected end", f"{end:%Y-%m-%d %H:%M %Z}, without evaluations, if started now"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        sys.stdout.write(f"{name:<{width}}  {value}\n" if sys.stdout.isatty() else f"{name}\t{value}\n")


def format_duration(seconds: float) -> str:
    """Return a duration in words, such as ``3 h 20 min``, ``12 s`` or ``31 ms``."""
    if seconds < 0.9995:  # from there on, three digits round to one second
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"
