"""The optimizer from its options, its learning rate at a step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpcssl.errors import ConfigError, ResumeError, require_choice
from hpcssl.optim import apex_sgd, groups
from hpcssl.optim.lars import LARS

NAMES = ("sgd", "lars", "larc")
LR_SCALINGS = ("batch256", "sqrt_batch", "none")
TRUST_DENOMINATORS = ("decayed", "sum")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """SGD, LARS or LARC with momentum, and the precision of training.

    Attributes:
        name: Optimizer: ``sgd``, ``lars`` or ``larc`` (LARS as in apex, for SwAV).
        batch: Images per step over all processes.
        lr: Peak learning rate, in the unit that ``lr_scaling`` says.
        lr_scaling: How ``lr`` is scaled with the batch: ``batch256`` (rate = lr * batch / 256), ``sqrt_batch``
            (rate = lr * sqrt(batch), as a variant of SimCLR) or ``none`` (rate = lr).
        momentum: Momentum factor, from 0 to below 1.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: Weight decay (L2), 0 for none.
        exclude_norm_and_bias: Whether biases and the parameters of norms are exempt from weight decay and from the
            adaptive rates of LARS.
        not_excluded: Endings of the names of parameters to which ``exclude_norm_and_bias`` does not apply, such as
            ``downsample.1.weight``, which the pattern of OpenSelfSup misses.
        trust_coefficient: Factor of the trust ratio of LARS and LARC; ignored by SGD.
        trust_denominator: Denominator of the trust ratio of LARS: ``decayed``, the norm of the gradient after the
            decay was added (SimCLR, BYOL), or ``sum``, the norm of the gradient plus the weight decay times that of the
            weights (You et al. 2017, OpenSelfSup).
        lr_in_momentum: For LARS and LARC: whether gradients are scaled by the rate before they enter the momentum
            (SimCLR, OpenSelfSup) and not after it (BYOL).
        precision: ``fp32``; ``bf16`` or ``fp16`` (autocast with float32 weights); or ``fp64``, for tests.
    """

    name: str = "sgd"
    batch: int = 256
    lr: float = 0.05
    lr_scaling: str = "batch256"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    exclude_norm_and_bias: bool = False
    not_excluded: list[str] = field(default_factory=list)
    trust_coefficient: float = 1e-3
    trust_denominator: str = "decayed"
    lr_in_momentum: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        require_choice("optim.name", self.name, NAMES)
        require_choice("optim.lr_scaling", self.lr_scaling, LR_SCALINGS)
        require_choice("optim.trust_denominator", self.trust_denominator, TRUST_DENOMINATORS)
        require_choice("optim.precision", self.precision, PRECISIONS)
        is_lars, without_norms = self.name in ("lars", "larc"), "empty without optim.exclude_norm_and_bias"
        is_decayed = self.trust_denominator == "decayed"
        for name, holds, expected, fix in (
            ("lr", 0 < self.lr < math.inf, "above 0", "0.05"),
            ("momentum", 0 <= self.momentum < 1, "0 to below 1", "0.9"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more", "1e-4"),
            ("trust_coefficient", 0 < self.trust_coefficient < math.inf, "above 0", "0.001"),
            ("trust_coefficient", is_lars or self.trust_coefficient == 1e-3, "0.001 without LARS or LARC", "0.001"),
            ("trust_denominator", is_decayed or self.name == "lars", "decayed without LARS", "decayed"),
            ("lr_in_momentum", is_lars or not self.lr_in_momentum, "false without LARS or LARC", "false"),
            ("nesterov", not self.nesterov or self.momentum > 0, "false without momentum", "false"),
            ("not_excluded", not self.not_excluded or self.exclude_norm_and_bias, without_norms, "[]"),
        ):
            if not holds:
                raise ConfigError(
                    f"optim.{name}",
                    got=getattr(self, name),
                    expected=expected,
                    fix=f"set optim.{name}={fix}" + (", or optim.name=lars" if "LARS" in expected else ""),
                )


def batch_factor(options: OptimOptions, global_batch: int) -> float:
    """Return the factor that converts a rate in the unit of ``optim.lr`` into the optimizer's rate."""
    return {"batch256": global_batch / 256, "sqrt_batch": math.sqrt(global_batch), "none": 1.0}[options.lr_scaling]


def build_optimizer(
    options: OptimOptions,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    global_batch: int,
    constant_lr: Collection[str] = (),
    fused: str = "torch",
) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable ones among named parameters, at its peak rate.

    Args:
        options: The ``optim`` section of a recipe.
        parameters: Pairs of name and parameter.
        global_batch: Images per step over all processes, which scale the rate.
        constant_lr: Prefixes of the names of parameters that keep the peak rate.
        fused: Whose SGD is used, one of ``apex_sgd.SETTINGS``. LARS and LARC are this package's own.

    Raises:
        ConfigError: No parameter's name has an ending of ``options.not_excluded``, or apex cannot be used.
    """
    param_groups = groups.group_parameters(
        parameters,
        weight_decay=options.weight_decay,
        exclude_norm_and_bias=options.exclude_norm_and_bias,
        not_excluded=options.not_excluded,
        constant_lr=constant_lr,
    )
    lr, momentum = options.lr * batch_factor(options, global_batch), options.momentum
    optimizer: torch.optim.Optimizer
    if options.name in ("lars", "larc"):
        optimizer = LARS(
            param_groups,
            lr=lr,
            momentum=momentum,
            nesterov=options.nesterov,
            trust_coefficient=options.trust_coefficient,
            lr_in_momentum=options.lr_in_momentum,
            denominator=options.trust_denominator,
            larc=options.name == "larc",
        )
    elif fused == "apex":
        optimizer = apex_sgd.build(param_groups, lr=lr, momentum=momentum, nesterov=options.nesterov)
    else:
        has_kernel = all(p.device.type in ("cpu", "cuda") for group in param_groups for p in group["params"])
        optimizer = torch.optim.SGD(param_groups, lr=lr, momentum=momentum, nesterov=options.nesterov, fused=has_kernel)
    if momentum > 0:
        # The first update would start from zeros anyway. With them the state has the same tensors at every step.
        for _, parameter in _named_parameters(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, options: OptimOptions, lr: float, *, global_batch: int) -> None:
    """Set the rate of the next update.

    Args:
        optimizer: What ``build_optimizer`` returned.
        options: The options that it was built from.
        lr: The rate in the unit of ``optim.lr``, as ``schedule.learning_rate`` returns it. Parameters with a constant
            rate keep the peak rate.
        global_batch: Images per step over all processes.
    """
    factor = batch_factor(options, global_batch)
    for group in optimizer.param_groups:
        group["lr"] = (options.lr if group["constant"] else lr) * factor


def momentum_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the momentum of every parameter by the parameter's name, without copying it.

    It is all the state of the optimizer: rates follow from the step, and options from the recipe.
    """
    if optimizer.param_groups[0]["momentum"] == 0:
        return {}  # apex keeps zeros, which it does not use
    named = _named_parameters(optimizer)
    return {name: optimizer.state[p]["momentum_buffer"] for name, p in named if optimizer.state[p]}


def load_momentum(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Copy saved ``momentum_tensors`` into an optimizer of the same parameters.

    Raises:
        ResumeError: Names or shapes differ.
    """
    current = momentum_tensors(optimizer)
    unfit = sorted(
        name
        for name in current.keys() | saved.keys()
        if name not in current or name not in saved or current[name].shape != saved[name].shape
    )
    if unfit:
        raise ResumeError(
            "the saved optimizer",
            got=f"no momentum that fits {unfit[0]}, and {len(unfit) - 1} more",
            expected="the momentum of this network's parameters, in their shapes",
            fix="resume with the model and optimizer of the run",
        )
    for name, moment in current.items():
        moment.copy_(saved[name])


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
