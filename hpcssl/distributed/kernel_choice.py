"""Whether kernels that only a GPU has are used: tried by every rank before a training, and decided alike on all."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError

SETTINGS = ("auto", "plain", "fast")
"""Values of the recipe key ``machine.kernels``."""
LOG = logging.getLogger("hpcssl")


def choose(setting: str, world: World, find_fault: Callable[[torch.device], str], users: str) -> bool:
    """Decide whether fast kernels are used. A collective on a GPU.

    Args:
        setting: One of ``SETTINGS``.
        world: The processes that compute together.
        find_fault: Compares the kernels with plain ones on a device, and returns what is wrong as a clause, or nothing.
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
        faults = world.all_gather_text(find_fault(world.device))
        fault = next((f"{text}, on rank {rank}" for rank, text in enumerate(faults) if text), "")
    if not fault:
        return True
    if setting == "fast":
        fix = "set machine.kernels=auto, which uses the plain kernels here"
        raise ConfigError("machine.kernels=fast", got=fault, expected="a GPU on which the fast kernels work", fix=fix)
    if world.is_main:
        LOG.warning("%s use the plain kernels, which are slower: %s.", users, fault)
    return False


def explain_failure(kernels: str, error: Exception) -> str:
    """Say in a clause that kernels failed, whatever the compiler or the driver raised."""
    return f"{kernels} failed with {type(error).__name__} ({' '.join(str(error).split())[:200]})"
