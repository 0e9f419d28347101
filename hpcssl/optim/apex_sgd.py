"""The fused SGD of NVIDIA's apex, for ``machine.fused=apex``. It is imported only if a recipe asks for it.

The update is that of ``torch.optim.SGD`` up to rounding, in one kernel for many tensors. Today's apex has no LARS
(its LARC was removed as well), and no other optimizer that a recipe can name.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hpcssl.errors import ConfigError

SETTINGS = ("torch", "apex")
"""Values of the recipe key ``machine.fused``."""
DEVICES = ("cuda",)
"""Types of the devices that apex has kernels for."""
SKIP_FLAG = "_dummy_overflow_buf"
"""The attribute of an optimizer of apex that its kernels read: int32 [1]. They change nothing where it is not 0."""
_PLAIN = "set machine.fused=torch"
_INSTALL = "install it as requirements-apex.txt says, or " + _PLAIN


def build(param_groups: list[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool) -> torch.optim.Optimizer:
    """Build apex's ``FusedSGD``.

    Args:
        param_groups: Groups of float32 parameters on a GPU, with their ``weight_decay``.
        lr: Learning rate.
        momentum: Momentum factor.
        nesterov: Whether to use Nesterov momentum.

    Raises:
        ConfigError: apex is missing, is another package, was built without its CUDA extensions, or has no kernels for
            the parameters.
    """
    parameters = [p for group in param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.device.type not in DEVICES:
            raise _error(f"parameters on the device {parameter.device.type}", "a GPU", _PLAIN)
        if parameter.dtype != torch.float32:  # FusedSGD would leave it as it is, without a word
            raise _error(f"parameters in {parameter.dtype}", "parameters in float32", _PLAIN)
    try:
        fused_sgd = importlib.import_module("apex.optimizers").FusedSGD
    except (ImportError, AttributeError) as error:
        got = f"no apex.optimizers.FusedSGD here ({type(error).__name__}: {error})"
        raise _error(got, "NVIDIA's apex", _INSTALL) from error
    try:
        optimizer: torch.optim.Optimizer = fused_sgd(param_groups, lr=lr, momentum=momentum, nesterov=nesterov)
    except (ImportError, RuntimeError) as error:
        raise _error(f"apex, which says: {error}", "apex with its CUDA extensions", _INSTALL) from error
    return optimizer


def _error(got: str, expected: str, fix: str) -> ConfigError:
    return ConfigError("machine.fused=apex", got=got, expected=expected, fix=fix)
