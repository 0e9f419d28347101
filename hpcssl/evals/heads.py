"""Linear layers on features, one per learning rate, trained side by side on the same batches.

    logits_r = x W_r^T + b_r        loss_r = mean over the batch of the cross-entropy        r = 1 … R

The losses are added: no head's gradient knows of another. One matrix product serves all heads, and each has an
optimiser of its own. Letters in shapes: B batch, N samples, D features, C classes, R rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl import rng
from hpcssl.errors import EvalError
from hpcssl.evals.protocols import Protocol
from hpcssl.optim import build
from hpcssl.optim.schedule import learning_rate

INITS = ("torch", "normal", "truncated", "zeros")
_ROWS = 4096  # that are scored at once


def initial(kind: str, classes: int, width: int, seed: int, place: str = "linear") -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] that a head starts from, drawn at the addresses (seed, place, name).

    ``torch``: both uniform in ±1/sqrt(D), as nn.Linear. ``normal``: N(0, 0.01) (MoCo, SimSiam, SwAV, OpenSelfSup).
    ``truncated``: N(0, 1/sqrt(D)) cut at two deviations (hk.Linear; BYOL). ``zeros`` (SimCLR). All but the first have
    biases of 0.
    """
    weight, bias = torch.zeros(classes, width), torch.zeros(classes)
    here, bound = rng.generator(rng.key(seed, place, "weight")), width**-0.5
    if kind == "torch":
        weight.uniform_(-bound, bound, generator=here)
        bias.uniform_(-bound, bound, generator=rng.generator(rng.key(seed, place, "bias")))
    elif kind == "normal":
        weight.normal_(0, 0.01, generator=here)
    elif kind == "truncated":
        nn.init.trunc_normal_(weight, std=bound, a=-2 * bound, b=2 * bound, generator=here)
    return weight, bias


def hits(logits: Tensor, y: Tensor) -> Tensor:
    """How many of the rows have their class first, and among the first five: int64 [..., 2] of logits [N, ..., C].

    Among equal logits the lower class stands first.
    """
    y = y.view(-1, *[1] * (logits.dim() - 1))
    true = logits.gather(-1, y.expand(*logits.shape[:-1], 1))
    lower = torch.arange(logits.shape[-1], device=y.device) < y
    place = ((logits > true) | ((logits == true) & lower)).sum(-1)
    return torch.stack(((place < 1).sum(0), (place < 5).sum(0)), -1)


class Heads:
    """R linear layers and their optimisers, and how many steps they have taken: all that a resume needs."""

    def __init__(self, classes: int, width: int, protocol: Protocol, rates: Sequence[float], seed: int,
                 device: torch.device, steps_per_epoch: int):
        weight, bias = (x.to(device) for x in initial(protocol.init, classes, width, seed))
        self.weight_RCD = weight.expand(len(rates), -1, -1).clone()
        self.bias_RC = bias.expand(len(rates), -1).clone()
        self.protocol, self.steps_per_epoch, self.step = protocol, steps_per_epoch, 0
        self.schedule = protocol.schedule()
        self.optims = [protocol.optim(rate) for rate in rates]
        # each optimiser steps in the memory of its own head
        self.optimizers = [
            build.build(options, [("weight", nn.Parameter(w)), ("bias", nn.Parameter(b))], global_batch=protocol.batch)
            for options, w, b in zip(self.optims, self.weight_RCD, self.bias_RC, strict=True)]

    def learn(self, x_BD: Tensor, y_B: Tensor) -> None:
        """One step of every head."""
        weight, bias = (x.detach().requires_grad_() for x in (self.weight_RCD, self.bias_RC))
        rates = len(weight)
        logits_BRC = F.linear(x_BD, weight.flatten(0, 1), bias.flatten()).unflatten(1, (rates, -1))
        loss = F.cross_entropy(logits_BRC.flatten(0, 1), y_B.repeat_interleave(rates)) * rates
        grads = torch.autograd.grad(loss, (weight, bias))
        for optimizer, options, *grad in zip(self.optimizers, self.optims, *grads, strict=True):
            lr = learning_rate(self.schedule, self.step, peak=options.lr, steps_per_epoch=self.steps_per_epoch)
            build.set_lr(optimizer, options, lr, global_batch=self.protocol.batch)
            for group in optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    parameter.grad = grad[name == "bias"]
            optimizer.step()
        self.step += 1

    @torch.no_grad()
    def score(self, x_ND: Tensor, y_N: Tensor) -> list[dict[str, float]]:
        """Top-1 and top-5 in percent of each head. A head that has diverged has 0; ``EvalError`` where all have."""
        right_R2 = torch.zeros(len(self.optims), 2, dtype=torch.int64)
        finite_R = torch.isfinite(self.weight_RCD).all(2).all(1).cpu()
        for x, y in zip(x_ND.split(_ROWS), y_N.split(_ROWS), strict=True):
            logits_NRC = F.linear(x, self.weight_RCD.flatten(0, 1), self.bias_RC.flatten()).unflatten(
                1, (len(self.optims), -1))
            finite_R &= torch.isfinite(logits_NRC).all(2).all(0).cpu()
            right_R2 += hits(logits_NRC, y).cpu()
        if not finite_R.any():
            raise EvalError("linear evaluation", got=f"NaN or infinite logits after step {self.step}",
                            expected="finite numbers", mend="lower evals.linear.lr")
        shares = (100.0 * right_R2.double() / len(x_ND)).masked_fill_(~finite_R[:, None], 0.0)
        return [{"top1": top1, "top5": top5} for top1, top5 in shares.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.weight_RCD, "bias": self.bias_RC}
        for r, optimizer in enumerate(self.optimizers):
            named |= {f"momentum.{r}.{name}": moment for name, moment in build.tensors(optimizer).items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over ``tensors`` that heads of the same protocol gave after ``step`` steps."""
        for name, living in self.tensors().items():
            living.copy_(tensors[name])
        self.step = step
