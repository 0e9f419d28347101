"""Linear layers on features, one per learning rate, trained side by side on the same batches.

    logits_r = x W_r^T + b_r        loss_r = mean over the batch of the cross-entropy        r = 1 … R

The losses are added, so the gradient of a head does not depend on the other heads. One matrix product serves all heads;
each has its own optimizer.

Shapes: B batch, N samples, D features, C classes, R rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl import rng
from hpcssl.errors import EvalError
from hpcssl.evals.linear.protocols import LinearProtocol
from hpcssl.optim import build
from hpcssl.optim.schedule import learning_rate

INITS = ("torch", "normal", "truncated", "zeros")
_SCORE_BATCH = 4096


def draw_initial_weights(
    init: str, classes: int, width: int, seed: int, address: str = "linear"
) -> tuple[Tensor, Tensor]:
    """Draw the initial values of a linear layer.

    Args:
        init: ``torch`` draws weight and bias uniformly in ±1/sqrt(D), as ``nn.Linear``. ``normal`` draws the weight
            from N(0, 0.01) (MoCo, SimSiam, SwAV, OpenSelfSup). ``truncated`` draws it from N(0, 1/sqrt(D)) cut at two
            standard deviations (``hk.Linear``; BYOL). ``zeros`` draws nothing (SimCLR). All but ``torch`` have biases
            of 0.
        classes: Number of classes, C.
        width: Number of features, D.
        seed: Seed of the draw.
        address: Name that separates the draws of different evaluations.

    Returns:
        Weight [C, D] and bias [C], fp32.
    """
    weight, bias = torch.zeros(classes, width), torch.zeros(classes)
    generator, bound = rng.generator(rng.key(seed, address, "weight")), width**-0.5
    if init == "torch":
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=rng.generator(rng.key(seed, address, "bias")))
    elif init == "normal":
        weight.normal_(0, 0.01, generator=generator)
    elif init == "truncated":
        nn.init.trunc_normal_(weight, std=bound, a=-2 * bound, b=2 * bound, generator=generator)
    return weight, bias


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the rows whose class is first, and among the first five.

    Among equal logits the lower class is first.

    Args:
        logits: [N, ..., C].
        labels: int64 [N].

    Returns:
        int64 [..., 2]: numbers of top-1 and top-5 hits.
    """
    labels = labels.view(-1, *[1] * (logits.dim() - 1))
    true = logits.gather(-1, labels.expand(*logits.shape[:-1], 1))
    lower = torch.arange(logits.shape[-1], device=labels.device) < labels
    place = ((logits > true) | ((logits == true) & lower)).sum(-1)
    return torch.stack(((place < 1).sum(0), (place < 5).sum(0)), -1)


class LinearHeads:
    """R linear layers with their optimizers, and the number of steps they have taken.

    Args:
        classes: Number of classes, C.
        width: Number of features, D.
        protocol: Optimizer, schedule and initial values.
        rates: Peak learning rate of each head, in the protocol's unit.
        seed: Seed of the initial values.
        device: Device of the heads.
        steps_per_epoch: Steps per epoch, for the schedule.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        protocol: LinearProtocol,
        rates: Sequence[float],
        seed: int,
        device: torch.device,
        steps_per_epoch: int,
    ) -> None:
        weight, bias = (x.to(device) for x in draw_initial_weights(protocol.init, classes, width, seed))
        self.weight_RCD = weight.expand(len(rates), -1, -1).clone()
        self.bias_RC = bias.expand(len(rates), -1).clone()
        self.protocol, self.steps_per_epoch, self.step = protocol, steps_per_epoch, 0
        self.schedule = protocol.schedule()
        self.optims = [protocol.optim(rate) for rate in rates]
        # parameters are views: each optimizer updates the memory of its own head in place
        self.optimizers = [
            build.build_optimizer(
                options, [("weight", nn.Parameter(w)), ("bias", nn.Parameter(b))], global_batch=protocol.batch
            )
            for options, w, b in zip(self.optims, self.weight_RCD, self.bias_RC, strict=True)
        ]

    def train_step(self, x_BD: Tensor, y_B: Tensor) -> None:
        """Take one optimizer step with every head.

        Args:
            x_BD: Inputs of the heads, fp32 [B, D].
            y_B: Labels, int64 [B].
        """
        weight, bias = (x.detach().requires_grad_() for x in (self.weight_RCD, self.bias_RC))
        rates = len(weight)
        logits_BRC = torch.unflatten(F.linear(x_BD, weight.flatten(0, 1), bias.flatten()), 1, (rates, -1))
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
        """Return top-1 and top-5 accuracy in percent of each head; 0 for a head that has diverged.

        Args:
            x_ND: Inputs of the heads, fp32 [N, D].
            y_N: Labels, int64 [N].

        Raises:
            EvalError: All heads have diverged.
        """
        correct_R2 = torch.zeros(len(self.optims), 2, dtype=torch.int64)
        finite_R = torch.isfinite(self.weight_RCD).all(2).all(1).cpu()
        for x, y in zip(torch.split(x_ND, _SCORE_BATCH), torch.split(y_N, _SCORE_BATCH), strict=True):
            logits = F.linear(x, self.weight_RCD.flatten(0, 1), self.bias_RC.flatten())
            logits_NRC = torch.unflatten(logits, 1, (len(self.optims), -1))
            finite_R &= torch.isfinite(logits_NRC).all(2).all(0).cpu()
            correct_R2 += count_correct(logits_NRC, y).cpu()
        if not finite_R.any():
            raise EvalError(
                "linear evaluation",
                got=f"NaN or infinite logits after step {self.step}",
                expected="finite numbers",
                fix="lower evals.linear.lr",
            )
        percent = (100.0 * correct_R2.double() / len(x_ND)).masked_fill_(~finite_R[:, None], 0.0)
        return [{"top1": top1, "top5": top5} for top1, top5 in percent.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a resume needs, by name: weights, biases and momentum buffers. Not copies."""
        named = {"weight": self.weight_RCD, "bias": self.bias_RC}
        for r, optimizer in enumerate(self.optimizers):
            named |= {f"momentum.{r}.{name}": moment for name, moment in build.momentum_tensors(optimizer).items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Restore the ``tensors`` that heads of the same protocol had after ``step`` steps."""
        for name, live in self.tensors().items():
            live.copy_(tensors[name])
        self.step = step
