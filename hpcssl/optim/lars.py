"""LARS: layer-wise adaptive rates for SGD with momentum. You, Gitman and Ginsburg, arXiv:1708.03888.

    g <- grad + wd w
    g <- eta |w| / |g| g                    the trust ratio; 1 where |w| or |g| is 0; not for norms and biases
    lr outside     m <- mu m + g            w <- w - lr m                  BYOL (byol/utils/optimizers.py)
    lr in momentum m <- mu m + lr g         w <- w - m                     SimCLR (lars_optimizer.py, classic momentum)
    nesterov       the update is mu m + g, or mu m + lr g with the rate in the momentum

The two forms differ while the rate changes: with the rate outside, past gradients are scaled by the current rate; with
the rate in the momentum they keep the rate of their own step.

``denominator="sum"`` is the form of OpenSelfSup and of the paper: the ratio is ``eta |w| / (|grad| + wd |w|)``, with
the gradient before the decay, and 0 where ``|w|`` or the denominator is 0.

``larc`` is the form of apex's LARC with clip=False, which SwAV and the linear evaluation of SimSiam use: the ratio is
``eta |w| / (|g| + wd |w| + 1e-8)``, with g before the decay, and a gradient of 0 brings no decay either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a learning rate that is adapted to each layer.

    Its state is one tensor per parameter, ``momentum_buffer``; without momentum there is none.

    Args:
        params: Parameters or parameter groups. Groups may set all other arguments.
        lr: Learning rate.
        momentum: Factor of the momentum, mu.
        weight_decay: Weight decay, wd.
        trust_coefficient: Factor of the trust ratio, eta.
        nesterov: Whether to use Nesterov momentum.
        lr_in_momentum: Whether gradients are scaled by the rate before they enter the momentum.
        adapt: False for plain SGD.
        denominator: Denominator of the trust ratio: ``decayed``, ``|grad + wd w|``, or ``sum``, ``|grad| + wd |w|``.
        larc: Whether to use the trust ratio of LARC.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
        lr_in_momentum: bool = False,
        adapt: bool = True,
        denominator: str = "decayed",
        larc: bool = False,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "nesterov": nesterov,
                "lr_in_momentum": lr_in_momentum,
                "adapt": adapt,
                "denominator": denominator,
                "larc": larc,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Gradients are not changed.

        Args:
            closure: Computes the loss again, with gradients.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(group, weights)
        return loss

    def _update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        lr, mu = group["lr"], group["momentum"]
        raw_grads = [p.grad for p in weights if p.grad is not None]
        grads = list(torch._foreach_add(raw_grads, weights, alpha=group["weight_decay"]))
        if group["adapt"]:
            coefficient, decay = group["trust_coefficient"], group["weight_decay"]
            if group["larc"]:
                ratios = larc_ratios(weights, raw_grads, coefficient, decay)
            elif group["denominator"] == "sum":
                ratios = sum_ratios(weights, raw_grads, coefficient, decay)
            else:
                ratios = trust_ratios(weights, grads, coefficient)
            torch._foreach_mul_(grads, ratios)
        if group["lr_in_momentum"]:
            torch._foreach_mul_(grads, lr)
        update = grads
        if mu > 0:
            moments = [self._moment(p) for p in weights]
            torch._foreach_mul_(moments, mu)
            torch._foreach_add_(moments, grads)
            if group["nesterov"]:
                torch._foreach_add_(grads, moments, alpha=mu)
            else:
                update = moments
        torch._foreach_add_(weights, update, alpha=-1.0 if group["lr_in_momentum"] else -lr)

    def _moment(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        moment: Tensor = state["momentum_buffer"]
        return moment


def trust_ratios(weights: list[Tensor], grads: list[Tensor], trust_coefficient: float) -> list[Tensor]:
    """Return the trust ratio of LARS per layer: ``eta |w| / |g|``, and 1 where either norm is 0.

    It is computed on the device, without waiting for it.
    """
    w, g = _norms(weights), _norms(grads)
    return list(torch.where((w > 0) & (g > 0), trust_coefficient * w / g, torch.ones_like(w)).unbind())


def sum_ratios(
    weights: list[Tensor], grads: list[Tensor], trust_coefficient: float, weight_decay: float
) -> list[Tensor]:
    """Return the trust ratio of OpenSelfSup per layer: ``eta |w| / (|g| + wd |w|)``, and 0 where that is 0 / 0.

    ``grads`` are those before the decay.
    """
    w, g = _norms(weights), _norms(grads)
    norms = g + weight_decay * w
    return list(torch.where((w > 0) & (norms > 0), trust_coefficient * w / norms, torch.zeros_like(w)).unbind())


def larc_ratios(
    weights: list[Tensor], grads: list[Tensor], trust_coefficient: float, weight_decay: float
) -> list[Tensor]:
    """Return the trust ratio of LARC per layer: ``eta |w| / (|g| + wd |w| + 1e-8)``.

    It is 1 where ``|w|`` is 0, and 0 where ``|g|`` is 0. ``grads`` are those before the decay.
    """
    w, g = _norms(weights), _norms(grads)
    ratio = torch.where(w > 0, trust_coefficient * w / (g + weight_decay * w + 1e-8), torch.ones_like(w))
    return list((ratio * (g > 0)).unbind())


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(list(torch._foreach_norm(tensors)))
