"""LARS: layer-wise adaptive rates for SGD with momentum. You, Gitman and Ginsburg, arXiv:1708.03888.

    g <- grad + wd w
    g <- eta |w| / |g| g                 the trust ratio; 1 where |w| or |g| is 0; not for norms and biases
    outside     m <- mu m + g            w <- w - lr m                  BYOL (byol/utils/optimizers.py)
    inside      m <- mu m + lr g         w <- w - m                     SimCLR (lars_optimizer.py, classic momentum)
    nesterov    the update is mu m + g (outside), mu m + lr g (inside)

The two differ while the rate changes: outside, past gradients follow today's rate; inside, they keep their own.

``larc`` is the form of apex's LARC with clip=False, which SwAV and SimSiam's linear evaluation use: the ratio is
eta |w| / (|g| + wd |w| + 1e-8), with g before the decay, and a gradient of 0 brings no decay either.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LR_PLACES = ("outside", "inside")


class LARS(torch.optim.Optimizer):
    """Options per group: ``lr``, ``momentum``, ``weight_decay``, ``trust`` (eta), ``nesterov``, ``lr_place`` and
    ``adapt`` (False: plain SGD for this group), ``larc``. Its state holds one tensor per parameter,
    ``momentum_buffer``, and none without momentum.
    """

    def __init__(self, params: Iterable, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust: float = 1e-3, nesterov: bool = False, lr_place: str = "outside", adapt: bool = True,
                 larc: bool = False):
        if lr_place not in LR_PLACES:
            raise ValueError(f"lr_place {lr_place!r}: one of {', '.join(LR_PLACES)}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust,
                                  "nesterov": nesterov, "lr_place": lr_place, "adapt": adapt,
                                  "larc": larc})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(group, weights)
        return loss

    def _update(self, group: dict, weights: list[Tensor]) -> None:
        lr, mu = group["lr"], group["momentum"]
        grads = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
        if group["adapt"]:
            decay = group["weight_decay"] if group["larc"] else None
            raw = [p.grad for p in weights] if group["larc"] else grads
            torch._foreach_mul_(grads, trust_ratios(weights, raw, group["trust"], decay))
        if group["lr_place"] == "inside":
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
        torch._foreach_add_(weights, update, alpha=-lr if group["lr_place"] == "outside" else -1.0)

    def _moment(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def trust_ratios(weights: list[Tensor], grads: list[Tensor], trust: float, larc_decay: float | None = None
                 ) -> list[Tensor]:
    """trust·|w|/|g| per layer, 1 where either norm is 0, without asking the device; or LARC's for this decay."""
    w = torch.stack(torch._foreach_norm(weights))
    g = torch.stack(torch._foreach_norm(grads))
    if larc_decay is not None:
        ratio = torch.where(w > 0, trust * w / (g + larc_decay * w + 1e-8), torch.ones_like(w))
        return list((ratio * (g > 0)).unbind())
    return list(torch.where((w > 0) & (g > 0), trust * w / g, torch.ones_like(w)).unbind())
