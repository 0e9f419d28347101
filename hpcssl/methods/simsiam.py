"""Exploring Simple Siamese Representation Learning (SimSiam), Chen and He. CVPR 2021.

    D(p_1, z_2) = − ⟨p_1, z_2⟩ / (‖p_1‖ · ‖z_2‖)                                                    (eq. 1)
    L           = 1/2 · D(p_1, stopgrad(z_2)) + 1/2 · D(p_2, stopgrad(z_1))                          (eq. 4)

    paper  here        meaning
    p_1    query.u     h(f(x_1)): prediction for one view, unit length
    z_2    target.z    f(x_2): projection of the other view by the same network, unit length, without gradient

No moving average, no negatives, no bank: the stopped gradient alone keeps it from collapsing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hpcssl.methods import equations
from hpcssl.methods.base import Context, Emb, Heads
from hpcssl.views.plan import ViewOptions, both_ways


@dataclass(frozen=True, kw_only=True)
class SimSiamOptions:
    """``fix_predictor_lr``: the predictor keeps the peak rate while the rest decays (the official ``--fix-pred-lr``,
    and the paper's setting: "lr does not decay for h")."""

    name: str = "simsiam"
    fix_predictor_lr: bool = True


class SimSiam:
    """Plan: both ways, half each. Target: the online network itself, without gradient. No bank."""

    target = "stop"
    in_batch = False
    bank = None

    def __init__(self, options: SimSiamOptions, views: ViewOptions):
        self.options = options
        self.plan = both_ways(*views.pair(), share=0.5)
        self.heads = Heads(predictor="mlp", constant_lr=options.fix_predictor_lr)

    def aim(self, target: Emb, ctx: Context) -> Tensor:
        return target.z

    def agree(self, query: Emb, aim: Tensor, pos_B: Tensor, ctx: Context) -> Tensor:
        return equations.negative_cosine(query.u, aim[pos_B])
