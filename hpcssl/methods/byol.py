"""Bootstrap Your Own Latent (BYOL), Grill et al. NeurIPS 2020.

    L_{θ,ξ} = ‖ q̄_θ(z_θ) − z̄'_ξ ‖² = 2 − 2 · ⟨q_θ(z_θ), z'_ξ⟩ / (‖q_θ(z_θ)‖ · ‖z'_ξ‖)        (eq. 2)
    L       = L_{θ,ξ} + L~_{θ,ξ}                                     (the views exchanged; symmetric)

    paper  here        meaning
    q_θ    query.u     prediction of the online network for one view, unit length
    z'_ξ   target.z    projection of the target network for the other view, unit length
    ξ      pair        moving average of θ: ξ ← τ ξ + (1 − τ) θ, τ = 1 − (1 − τ_0)(cos(π k/K) + 1)/2

``symmetric=False`` keeps one direction: the "BYOL-asym" that MSF compares with, at half the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.methods import equations
from hpcssl.methods.base import Context, Emb, Heads
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, both_ways, one_way


@dataclass(frozen=True, kw_only=True)
class ByolOptions:
    """``ema.momentum`` is τ_0; ``ema.shape=cosine`` raises it to 1 over the run as in the paper."""

    name: str = "byol"
    symmetric: bool = True
    ema: EmaOptions = field(default_factory=lambda: EmaOptions(momentum=0.996, shape="cosine"))


class Byol:
    """Plan: both ways (or one). Target: moving average. No bank."""

    target = "ema"
    heads = Heads(predictor="mlp")
    in_batch = False
    bank = None

    def __init__(self, options: ByolOptions, views: ViewOptions):
        self.options = options
        self.plan = both_ways(*views.pair()) if options.symmetric else one_way(*views.pair())

    def aim(self, target: Emb, ctx: Context) -> Tensor:
        return target.z

    def agree(self, query: Emb, aim: Tensor, pos_B: Tensor, ctx: Context) -> Tensor:
        return equations.regression(query.u, aim[pos_B])
