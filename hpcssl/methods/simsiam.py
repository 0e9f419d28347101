"""Exploring Simple Siamese Representation Learning (SimSiam), Chen and He. CVPR 2021.

    D(p_1, z_2) = − ⟨p_1, z_2⟩ / (‖p_1‖ · ‖z_2‖)                                                    (eq. 1)
    L           = 1/2 · D(p_1, stopgrad(z_2)) + 1/2 · D(p_2, stopgrad(z_1))                          (eq. 4)

    paper  here              meaning
    p_1    query.prediction  h(f(x_1)): prediction for one view, unit length
    z_2    target.z          f(x_2): projection of the other view by the same network, unit length, without gradient

There is no moving average, no negative and no bank: only the stopped gradient prevents a collapse.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hpcssl.methods import equations
from hpcssl.methods.base import Embedding, HeadSpec, StepContext
from hpcssl.views.plan import ViewOptions, symmetric_plan


@dataclass(frozen=True, kw_only=True)
class SimSiamOptions:
    """Options of SimSiam.

    Attributes:
        name: ``simsiam``, the name of the method.
        fix_predictor_lr: true: the predictor keeps the peak learning rate while the rest decays (the official
            ``--fix-pred-lr``, and the paper's setting: "lr does not decay for h").
    """

    name: str = "simsiam"
    fix_predictor_lr: bool = True


class SimSiam:
    """View plan: symmetric, half each. Target encoder: online, without gradient. No bank.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "stop_gradient"
    needs_whole_batch = False
    bank = None

    def __init__(self, options: SimSiamOptions, views: ViewOptions):
        self.options = options
        self.plan = symmetric_plan(*views.make_views(), share=0.5)
        self.heads = HeadSpec(predictor="mlp", constant_lr=options.fix_predictor_lr)

    def targets(self, target: Embedding, ctx: StepContext) -> Tensor:
        """Return z [b, D]."""
        return target.z

    def loss(self, query: Embedding, targets: Tensor, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Eq. 1."""
        return equations.negative_cosine(query.prediction, targets[rows_B])
