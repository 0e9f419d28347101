"""Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV), Caron et al. NeurIPS 2020.

    ℓ(z_t, q_s) = − Σ_k q_s^(k) log p_t^(k),    p_t = softmax(z_t·c_k / τ)                              (eq. 2)
    Q*          = Diag(a) exp(Cᵀ Z / ε) Diag(b), with equal sums over prototypes and over rows         (eq. 3-5)
    L           = 1/2 · Σ_{s ∈ {1,2}} 1/(V+1) · Σ_{v ≠ s} ℓ(z_v, q_s)                 (eq. 1; eq. 6 with V small crops)

    paper  here                  meaning
    z      query.z               projection of one crop, unit length
    c_k    prototypes            trainable unit vectors; query.prediction holds z·c_k, [b, C]
    q_s    targets               codes of a large crop, by Sinkhorn-Knopp over the global batch, without gradient
    C, Z   prototypes, ctx.bank  with ``queue``: earlier projections of the same large crop, which join its codes
    V      views.crops           small crops: they predict codes, and have none
    τ, ε   options               ``temperature``, ``epsilon``

As in the official code, the queue joins from epoch ``queue_start_epoch`` on, once it could have been filled since then;
prototypes are not updated for the first ``freeze_steps`` steps; the recipes set ``model.joint_forward``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.errors import ConfigError
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Embedding, HeadSpec, StepContext
from hpcssl.methods.checks import check_at_least, check_positive
from hpcssl.views.plan import ViewOptions, symmetric_plan


@dataclass(frozen=True, kw_only=True)
class SwavOptions:
    """Options of SwAV.

    Attributes:
        name: ``swav``, the name of the method.
        prototypes: number of prototypes, 2 or more.
        temperature: τ, above 0.
        epsilon: ε of Sinkhorn-Knopp, above 0. Smaller values give harder codes.
        sinkhorn_iterations: iterations of Sinkhorn-Knopp, 1 or more.
        freeze_steps: number of steps at the start in which prototypes are not updated; 0: they are always updated.
        queue: true: codes also use the last ``bank.size`` projections of each large crop.
        queue_start_epoch: epoch from which on the queue is used, counted from 0; only with ``queue``.
    """

    name: str = "swav"
    prototypes: int = 3000
    temperature: float = 0.1
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    freeze_steps: int = 313
    queue: bool = False
    queue_start_epoch: int = 15

    def __post_init__(self) -> None:
        if self.queue_start_epoch != 15 and not self.queue:
            raise ConfigError(
                "method.queue_start_epoch",
                got=f"{self.queue_start_epoch} without a queue",
                expected="no value without a queue",
                fix="set method.queue=true, or remove method.queue_start_epoch",
            )
        for key, least in (
            ("prototypes", 2),
            ("sinkhorn_iterations", 1),
            ("freeze_steps", 0),
            ("queue_start_epoch", 0),
        ):
            check_at_least(f"method.{key}", getattr(self, key), least)
        check_positive("method.temperature", self.temperature, default=0.1)
        check_positive("method.epsilon", self.epsilon, default=0.05)


class Swav:
    """View plan: symmetric, half each. Target encoder: online, without gradient. Bank: the queue, if any.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "stop_gradient"
    needs_whole_batch = True

    def __init__(self, options: SwavOptions, views: ViewOptions):
        self.options = options
        self.plan = symmetric_plan(*views.make_views(), share=0.5)
        self.heads = HeadSpec(predictor="prototypes", prototypes=options.prototypes, frozen_steps=options.freeze_steps)
        self.bank = BankSpec(push="after", views=(0,), vectors=("second_view",)) if options.queue else None

    def bank_columns(self, target: Embedding, ctx: StepContext) -> dict[str, Tensor]:
        """Return the second large crop's projections: each large crop has its own queue, in its own column."""
        return {"second_view": ctx.target_embeddings[1].z.detach()}

    @torch.no_grad()
    def targets(self, target: Embedding, ctx: StepContext) -> Tensor:
        """Return the codes q_s [b, C] of a large crop."""
        score_NC, rows = target.prediction, ctx.global_batch_size
        if self._uses_queue(ctx):
            queue_ND = ctx.bank.all_rows("second_view" if target.view else "key")
            queue_score_NC = ctx.predict(ctx.share_of(queue_ND))
            score_NC, rows = torch.cat((queue_score_NC, score_NC)), rows + len(queue_ND)
        code_NC = equations.sinkhorn(
            score_NC, self.options.epsilon, self.options.sinkhorn_iterations, rows, ctx.all_reduce_sum
        )
        return code_NC[-len(target.z) :]

    def loss(self, query: Embedding, targets: Tensor, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Eq. 2."""
        return equations.swapped_prediction(query.prediction, targets[rows_B], self.options.temperature)

    def _uses_queue(self, ctx: StepContext) -> bool:
        """Whether the queue has been filled completely since epoch ``queue_start_epoch``."""
        if not self.options.queue:
            return False
        steps_to_fill = -(-ctx.bank.size // ctx.global_batch_size)
        return ctx.step >= self.options.queue_start_epoch * ctx.steps_per_epoch + steps_to_fill
