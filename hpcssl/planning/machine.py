"""The machine that a recipe is written for, and the section ``machine`` of the recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from hpcssl.planning.recipe_text import Value


@dataclass(frozen=True)
class Machine:
    """Where the recipe will run.

    Attributes:
        gpus: Number of GPUs, one process each; 0 for one process on a CPU.
        gpus_here: Number of GPUs that this process sees.
        gpu_bytes: Memory of a GPU here; 0 without one.
        cores: Cores that this process may use.
        busy: Cores that other work keeps busy.
    """

    gpus: int
    gpus_here: int = 0
    gpu_bytes: int = 0
    cores: int = 1
    busy: int = 0

    @property
    def kind(self) -> str:
        """``cpu`` or ``gpu``."""
        return "gpu" if self.gpus else "cpu"

    @property
    def processes(self) -> int:
        """Number of processes: one per GPU, or one."""
        return max(1, self.gpus)

    @classmethod
    def detect(cls, gpus: int | None) -> Machine:
        """Describe this machine. ``gpus`` is the number to use; None for all that there are."""
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cores = len(os.sched_getaffinity(0))
        number = here if gpus is None else gpus
        busy = min(cores - 1, round(os.getloadavg()[0]))
        if not here:
            return cls(number, cores=cores, busy=busy)
        properties = torch.cuda.get_device_properties(0)
        return cls(number, here, properties.total_memory, cores, busy)


def fit_machine(machine: Machine) -> list[Value]:
    """Choose devices and threads."""
    if machine.gpus:
        values = [Value("machine.devices", "gpu", "so that no job falls back to the CPU")]
        if machine.gpus_here:
            threads = max(1, min(16, machine.cores // min(machine.gpus, machine.gpus_here)))
            values.append(Value("machine.loader_threads", threads, f"of {machine.cores} cores here"))
        return values
    free = machine.cores - machine.busy
    loaders = max(1, free // 4)
    reason = f"{machine.cores} cores here"
    if machine.busy:  # threads that wait for a core are far slower than fewer threads
        reason += f", of which other work keeps {machine.busy} busy"
    values = [
        Value("machine.threads", max(1, free - loaders), reason),
        Value("machine.loader_threads", loaders),
    ]
    return [Value("machine.devices", "cpu"), *values] if machine.gpus_here else values
