"""The optimiser from its options, its learning rate for a step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcssl.errors import ConfigError, ResumeError, nearest
from hpcssl.optim import groups
from hpcssl.optim.lars import LARS, LR_PLACES

NAMES = ("sgd", "lars", "larc")
LR_PERS = ("batch256", "sqrt_batch", "absolute")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """SGD, LARS or LARC with momentum. ``batch``: images per step over all processes.

    ``lr`` is meant ``lr_per`` batch256 (rate = lr·batch/256), sqrt_batch (lr·√batch, SimCLR's other rule) or
    absolute. ``trust`` and ``lr_place`` (``lars.py``) are LARS's and LARC's. ``precision``: bf16 and fp16 are autocast
    over float32 weights; fp64 is for proofs.
    """

    name: str = "sgd"
    batch: int = 256
    lr: float = 0.05
    lr_per: str = "batch256"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    exclude_norm_and_bias: bool = False
    trust: float = 1e-3
    lr_place: str = "outside"
    precision: str = "fp32"

    def __post_init__(self):
        for name, known in (("name", NAMES), ("lr_per", LR_PERS), ("lr_place", LR_PLACES),
                            ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"optim.{name}", got=repr(value), expected=" or ".join(known),
                                  mend=nearest(str(value), known))
        for name, holds, expected in (
                ("lr", 0 < self.lr < math.inf, "above 0"), ("momentum", 0 <= self.momentum < 1, "0 to below 1"),
                ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
                ("trust", 0 < self.trust < math.inf, "above 0"),
                ("nesterov", not self.nesterov or self.momentum > 0, "false without momentum")):
            if not holds:
                raise ConfigError(f"optim.{name}", got=getattr(self, name), expected=expected,
                                  mend=f"set optim.{name} to a value that is {expected}")


def batch_factor(options: OptimOptions, global_batch: int) -> float:
    """What turns a rate in the unit of ``optim.lr`` into the optimiser's."""
    return {"batch256": global_batch / 256, "sqrt_batch": math.sqrt(global_batch), "absolute": 1.0}[options.lr_per]


def build(options: OptimOptions, parameters: Iterable[tuple[str, nn.Parameter]], *, global_batch: int,
          constant_lr: Collection[str] = ()) -> torch.optim.Optimizer:
    """The optimiser of the trainable ones among named parameters, at its peak rate.

    ``constant_lr``: name prefixes of parameters that keep that rate (``groups.split``).
    """
    made = groups.split(parameters, weight_decay=options.weight_decay,
                        exclude_norm_and_bias=options.exclude_norm_and_bias, constant_lr=constant_lr)
    common = {"lr": options.lr * batch_factor(options, global_batch), "momentum": options.momentum,
              "nesterov": options.nesterov}
    if options.name in ("lars", "larc"):
        optimizer = LARS(made, trust=options.trust, lr_place=options.lr_place, larc=options.name == "larc", **common)
    else:
        fused = all(p.device.type in ("cpu", "cuda") for group in made for p in group["params"])
        optimizer = torch.optim.SGD(made, fused=fused, **common)
    if options.momentum > 0:  # zeros are what the first update would start from; now the state has one form always
        for _, parameter in _named(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, options: OptimOptions, lr: float, *, global_batch: int) -> None:
    """The rate of the next update: ``lr`` in the unit of ``optim.lr``, as ``schedule.learning_rate`` gives it."""
    factor = batch_factor(options, global_batch)
    for group in optimizer.param_groups:
        group["lr"] = (options.lr if group["constant"] else lr) * factor


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The living momentum of every parameter, by the parameter's name. All state there is: rates follow from the
    step, and options from the recipe."""
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in _named(optimizer) if optimizer.state[p]}


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Take over the ``tensors`` of an optimiser of the same parameters. Raises ``ResumeError`` if they differ."""
    living = tensors(optimizer)
    odd = sorted(name for name in living.keys() | saved.keys()
                 if name not in living or name not in saved or living[name].shape != saved[name].shape)
    if odd:
        raise ResumeError("the saved optimiser", got=f"no fitting momentum of {odd[0]} and {len(odd) - 1} more",
                          expected="the momentum of this network's parameters, in their shapes",
                          mend="resume with the model and optimiser of the run")
    for name, moment in living.items():
        moment.copy_(saved[name])


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for group in optimizer.param_groups
            for pair in zip(group["names"], group["params"], strict=True)]
