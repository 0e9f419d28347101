"""Parameter groups: which weights decay, which LARS adapts, and which keep their learning rate."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn


def split(parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, exclude_norm_and_bias: bool,
          constant_lr: Collection[str] = ()) -> list[dict]:
    """Groups of named parameters, in their order, the trainable ones only.

    ``exclude_norm_and_bias``: biases and the scales and shifts of norms neither decay nor are adapted (BYOL,
    SimCLR, NNCLR); False: everything does (MSF, MoCo v2, SimSiam). They are told by having one dimension, as no
    weight of a network here has. Parameters whose name starts with one of ``constant_lr`` do not follow the
    schedule (SimSiam's ``--fix-pred-lr``).

    Each group holds ``params``, their ``names``, ``weight_decay``, ``adapt`` and ``constant``.
    """
    groups: dict[tuple[bool, bool], dict] = {}
    prefixes = tuple(constant_lr)
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        adapt = not (exclude_norm_and_bias and parameter.ndim <= 1)
        constant = bool(prefixes) and name.startswith(prefixes)
        group = groups.setdefault((adapt, constant), {
            "params": [], "names": [], "weight_decay": weight_decay if adapt else 0.0, "adapt": adapt,
            "constant": constant})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
