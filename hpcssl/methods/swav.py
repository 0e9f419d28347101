"""Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV), Caron et al. NeurIPS 2020.

    ℓ(z_t, q_s) = − Σ_k q_s^(k) log p_t^(k),    p_t = softmax(z_t·c_k / τ)                              (eq. 2)
    Q*          = Diag(a) exp(Cᵀ Z / ε) Diag(b), with equal sums over prototypes and over rows         (eq. 3-5)
    L           = 1/2 · Σ_{s ∈ {1,2}} 1/(V+1) · Σ_{v ≠ s} ℓ(z_v, q_s)                 (eq. 1; eq. 6 with V small crops)

    paper  here          meaning
    z      query.z       projection of one crop, unit length
    c_k    prototypes    trainable unit vectors; query.u holds z·c_k, [b, K]
    q_s    aim           codes of a large crop, by ``rounds`` of Sinkhorn-Knopp over the global batch, without gradient
    C, Z   ctx.bank      with ``queue``: earlier projections of the same large crop that take part in its codes
    V      views.crops   small crops: they predict codes, and have none

As the official code: the queue takes part from epoch ``queue_epoch`` on, once it could have been filled since then;
prototypes are not updated for the first ``freeze_steps`` steps; the recipes set ``model.joint``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.errors import ConfigError
from hpcssl.memory.rows import Memory
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Context, Emb, Heads, Scene
from hpcssl.views.plan import ViewOptions, both_ways


@dataclass(frozen=True, kw_only=True)
class SwavOptions:
    """``prototypes``: K. ``epsilon``, ``rounds`` of Sinkhorn-Knopp. ``queue``: the bank is one (``bank.size`` rows)."""

    name: str = "swav"
    prototypes: int = 3000
    tau: float = 0.1
    epsilon: float = 0.05
    rounds: int = 3
    freeze_steps: int = 313
    queue: bool = False
    queue_epoch: int = 15

    def __post_init__(self):
        if self.queue_epoch != 15 and not self.queue:
            raise ConfigError("method.queue_epoch", got=f"{self.queue_epoch} without a queue", expected="it with one",
                              mend="set method.queue=true, or leave method.queue_epoch")
        for key, least in (("prototypes", 2), ("rounds", 1), ("freeze_steps", 0), ("queue_epoch", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"method.{key}", got=getattr(self, key), expected=f"{least} or more",
                                  mend=f"set method.{key}={least} or more")
        for key in ("tau", "epsilon"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"method.{key}", got=getattr(self, key), expected="above 0",
                                  mend="set method.tau=0.1 method.epsilon=0.05")


class Swav:
    """Plan: both ways, half each, and small crops. Target: the online network without gradient. Bank: the queue."""

    target, in_batch = "stop", True

    def __init__(self, options: SwavOptions, views: ViewOptions):
        self.options, self.plan = options, both_ways(*views.pair(), share=0.5)
        self.heads = Heads(predictor="prototypes", prototypes=options.prototypes, still_steps=options.freeze_steps)
        self.bank = BankSpec(push="after", views=(0,), vectors=("other",)) if options.queue else None

    def memories(self, scene: Scene) -> dict[str, Memory]:
        return {}

    def refresh(self, ctx: Context) -> None:
        pass

    def columns(self, target: Emb, ctx: Context) -> dict[str, Tensor]:
        """Each large crop has a queue of its own: the second's is a column beside the first's."""
        return {"other": ctx.targets[1].z.detach()}

    def after(self, target: dict[int, Emb], ctx: Context) -> None:
        pass

    @torch.no_grad()
    def aim(self, target: Emb, ctx: Context) -> Tensor:
        world, score_NC, rows = ctx.world, target.u, len(target.u) * ctx.world.size
        if self.options.queue:
            since = self.options.queue_epoch * ctx.epoch_steps
            if ctx.step >= since + -(-ctx.bank.size // rows):
                queue_ND = ctx.bank.everything("other" if target.view else "key")
                mine = queue_ND.tensor_split(world.size)[world.rank]  # ranks share the work
                score_NC, rows = torch.cat((ctx.predict(mine), score_NC)), rows + len(queue_ND)
        code_NC = equations.sinkhorn(score_NC, self.options.epsilon, self.options.rounds, rows, world.sum)
        return code_NC[-len(target.u):]

    def agree(self, query: Emb, aim: Tensor, pos_B: Tensor, ctx: Context) -> Tensor:
        return equations.swapped_prediction(query.u, aim[pos_B], self.options.tau)
