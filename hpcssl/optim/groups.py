"""Parameter groups: which weights decay, which LARS adapts, and which keep their learning rate."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from hpcssl.errors import ConfigError


def group_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    exclude_norm_and_bias: bool,
    not_excluded: Collection[str] = (),
    constant_lr: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Group the trainable ones of named parameters for an optimizer, in their order.

    Args:
        parameters: Pairs of name and parameter.
        weight_decay: Weight decay of the parameters that decay.
        exclude_norm_and_bias: True: biases and the scales and shifts of norms neither decay nor are adapted by LARS
            (BYOL, SimCLR, NNCLR). False: all do (MSF, MoCo v2, SimSiam). They are recognized by their single
            dimension, which no weight of a network here has.
        not_excluded: Endings of the names of parameters that are not excluded all the same.
        constant_lr: Prefixes of the names of parameters that do not follow the schedule (``--fix-pred-lr`` of
            SimSiam).

    Returns:
        Groups with the keys ``params``, ``names``, ``weight_decay``, ``adapt`` (whether LARS adapts the rate) and
        ``constant`` (whether the rate is constant).

    Raises:
        ConfigError: No parameter's name has an ending of ``not_excluded``.
    """
    parameters, kept = list(parameters), tuple(not_excluded)
    for ending in kept:
        if not any(name.endswith(ending) for name, _ in parameters):
            raise ConfigError(
                "optim.not_excluded",
                got=repr(ending),
                expected="the ending of the name of a parameter",
                fix="choose an ending such as " + parameters[-1][0],
            )
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    prefixes = tuple(constant_lr)
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        adapt = not (exclude_norm_and_bias and parameter.ndim <= 1) or (bool(kept) and name.endswith(kept))
        constant = bool(prefixes) and name.startswith(prefixes)
        group = groups.setdefault(
            (adapt, constant),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if adapt else 0.0,
                "adapt": adapt,
                "constant": constant,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
