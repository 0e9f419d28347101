"""Bootstrap Your Own Latent (BYOL), Grill et al. NeurIPS 2020.

    L_{θ,ξ} = ‖ q̄_θ(z_θ) − z̄'_ξ ‖² = 2 − 2 · ⟨q_θ(z_θ), z'_ξ⟩ / (‖q_θ(z_θ)‖ · ‖z'_ξ‖)        (eq. 2)
    L       = L_{θ,ξ} + L~_{θ,ξ}                                     (the views exchanged; symmetric)

    paper  here              meaning
    q_θ    query.prediction  prediction of the online network for one view, unit length
    z'_ξ   target.z          projection of the target network for the other view, unit length
    ξ      target encoder    moving average of θ: ξ ← τ ξ + (1 − τ) θ, τ = 1 − (1 − τ_0)(cos(π k/K) + 1)/2

``symmetric=False`` keeps one direction: the "BYOL-asym" that MSF compares with, at half the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.methods import equations
from hpcssl.methods.base import Embedding, HeadSpec, StepContext
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, one_way_plan, symmetric_plan


@dataclass(frozen=True, kw_only=True)
class ByolOptions:
    """Options of BYOL.

    Attributes:
        name: ``byol``, the name of the method.
        symmetric: true: each view is query once and target once, and the two losses are added. false: only the first
            view is a query.
        ema: momentum of the target network. ``ema.momentum`` is τ_0; ``ema.shape=cosine`` raises it to 1 over the run,
            as in the paper.
    """

    name: str = "byol"
    symmetric: bool = True
    ema: EmaOptions = field(default_factory=lambda: EmaOptions(momentum=0.996, shape="cosine"))


class Byol:
    """View plan: symmetric (or one way). Target encoder: moving average. No bank.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "ema"
    heads = HeadSpec(predictor="mlp")
    needs_whole_batch = False
    bank = None

    def __init__(self, options: ByolOptions, views: ViewOptions):
        self.options = options
        query, target = views.make_views()
        self.plan = symmetric_plan(query, target) if options.symmetric else one_way_plan(query, target)

    def targets(self, target: Embedding, ctx: StepContext) -> Tensor:
        """Return z' [b, D]."""
        return target.z

    def loss(self, query: Embedding, targets: Tensor, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Eq. 2."""
        return equations.squared_distance(query.prediction, targets[rows_B])
