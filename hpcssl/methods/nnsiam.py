"""NNSiam: SimSiam toward the nearest neighbor. Section 4.5 of NNCLR, Dwibedi et al. ICCV 2021.

    L = − 1/2 · cos(p_1, NN(z_2, Q)) − 1/2 · cos(p_2, NN(z_1, Q))

    paper     here              meaning
    p_1       query.prediction  g(f(x_1)): prediction for one view, unit length
    z_2       target.z          f(x_2): projection of the other view by the same network, unit length, without gradient
    NN(·, Q)  targets           nearest row of the support set Q (``neighbors.py``): the last N z of the first view

With the view itself in place of its neighbor (``neighbors.rule=self``) it is SimSiam.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.methods import equations
from hpcssl.methods.base import Embedding, HeadSpec, StepContext
from hpcssl.methods.neighbors import NeighborOptions, find_positives
from hpcssl.views.plan import ViewOptions, symmetric_plan


@dataclass(frozen=True, kw_only=True)
class NnsiamOptions:
    """Options of NNSiam.

    Attributes:
        name: ``nnsiam``, the name of the method.
        fix_predictor_lr: true: the predictor keeps the peak learning rate, as in SimSiam (the paper does not say).
        neighbors: which positives replace the view itself.
    """

    name: str = "nnsiam"
    fix_predictor_lr: bool = True
    neighbors: NeighborOptions = field(default_factory=NeighborOptions)


class Nnsiam:
    """View plan: symmetric, half each. Target encoder: online, without gradient. Bank: fed after the step.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "stop_gradient"
    needs_whole_batch = False

    def __init__(self, options: NnsiamOptions, views: ViewOptions):
        self.options = options
        self.plan = symmetric_plan(*views.make_views(), share=0.5)
        self.heads = HeadSpec(predictor="mlp", constant_lr=options.fix_predictor_lr)
        self.bank = options.neighbors.bank_spec(self.plan.targets)

    def targets(self, target: Embedding, ctx: StepContext) -> Tensor:
        """Return NN(z, Q), [b, D]."""
        return find_positives(target, ctx, self.options.neighbors)

    def loss(self, query: Embedding, targets: Tensor, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """−cos(p, NN(z, Q))."""
        return equations.negative_cosine(query.prediction, targets[rows_B])
