"""Whether kernels that only a GPU has are used: tried by every rank before a training, and decided alike on all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError

SETTINGS = ("auto", "plain", "fast")
"""Values of the recipe key ``machine.kernels``."""
LOG = logging.getLogger("hpcssl")


class Trial(NamedTuple):
    """One comparison of a kernel with plain code on random values.

    Attributes:
        name: The kernel, in the singular.
        reference: What it is compared with.
        tolerance: Largest allowed difference.
        measure: Computes both, and returns the difference.
    """

    name: str
    reference: str
    tolerance: float
    measure: Callable[[], float]


def run_trials(trials: Iterable[Trial]) -> str:
    """Make comparisons until one fails. Not a collective.

    Returns:
        What is wrong, as a clause; empty if nothing is.
    """
    for trial in trials:
        try:
            with _disable_current_modes(), torch.enable_grad():  # whoever counts operations does not mean these
                difference = trial.measure()
        except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises, the plain code remains
            text = " ".join(str(error).split())[:200]
            return f"{trial.name} failed with {type(error).__name__} ({text})"
        if not difference <= trial.tolerance:
            return f"{trial.name} differs from {trial.reference} by {difference:.2g}"
    return ""


def gather_fault(fault: str, world: World) -> str:
    """Return the first fault of any rank, with the rank; empty if none has one. A collective.

    Args:
        fault: What ``run_trials`` returned on this rank.
        world: The processes that compute together.
    """
    faults = world.all_gather_text(fault)
    return next((f"{text}, on rank {rank}" for rank, text in enumerate(faults) if text), "")


def choose(setting: str, world: World, find_fault: Callable[[torch.device], str], users: str) -> bool:
    """Decide whether fast kernels are used. A collective on a GPU.

    Args:
        setting: One of ``SETTINGS``.
        world: The processes that compute together.
        find_fault: From a device to what ``run_trials`` returns there.
        users: What uses the kernels, in the plural, as the first words of the warning.

    Returns:
        False for ``plain`` and on a CPU. With ``auto`` also where a kernel fails or is wrong on some rank, after a
        warning with the reason.

    Raises:
        ConfigError: For ``fast``, where the kernels cannot be used.
    """
    if setting == "plain":
        return False
    if world.device.type != "cuda":
        fault = f"the device {world.device.type}"
        if setting == "auto":
            return False
    elif not torch.cuda.is_available():
        return True  # fake tensors, on a machine without a GPU: nothing is computed
    else:
        fault = gather_fault(find_fault(world.device), world)
    if not fault:
        return True
    if setting == "fast":
        fix = "set machine.kernels=auto, which uses the plain kernels here"
        raise ConfigError("machine.kernels=fast", got=fault, expected="a GPU on which the fast kernels work", fix=fix)
    if world.is_main:
        LOG.warning("%s use the plain kernels, which are slower: %s.", users, fault)
    return False
