"""NNSiam: SimSiam towards the nearest neighbour. Section 4.5 of NNCLR, Dwibedi et al. ICCV 2021.

    L = − 1/2 · cos(p_1, NN(z_2, Q)) − 1/2 · cos(p_2, NN(z_1, Q))

    paper     here        meaning
    p_1       query.u     g(f(x_1)): prediction for one view, unit length
    z_2       target.z    f(x_2): projection of the other view by the same network, unit length, without gradient
    NN(·, Q)  aim         nearest row of the support set Q (``neighbours.py``): the last N z of the first view

With the view itself in place of its neighbour (``neighbours.rule=self``) it is SimSiam.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.methods import equations
from hpcssl.methods.base import Context, Emb, Heads
from hpcssl.methods.neighbours import NeighbourOptions, look_up
from hpcssl.views.plan import ViewOptions, both_ways


@dataclass(frozen=True, kw_only=True)
class NnsiamOptions:
    """``fix_predictor_lr``: the predictor keeps the peak rate, as in SimSiam (the paper does not say)."""

    name: str = "nnsiam"
    fix_predictor_lr: bool = True
    neighbours: NeighbourOptions = field(default_factory=NeighbourOptions)


class Nnsiam:
    """Plan: both ways, half each. Target: the online network itself, without gradient. Bank: fed after the step."""

    target = "stop"
    in_batch = False

    def __init__(self, options: NnsiamOptions, views: ViewOptions):
        self.options = options
        self.plan = both_ways(*views.pair(), share=0.5)
        self.heads = Heads(predictor="mlp", constant_lr=options.fix_predictor_lr)
        self.bank = options.neighbours.bank(self.plan.targets)

    def aim(self, target: Emb, ctx: Context) -> Tensor:
        return look_up(target, ctx, self.options.neighbours)

    def agree(self, query: Emb, aim: Tensor, pos_B: Tensor, ctx: Context) -> Tensor:
        return equations.negative_cosine(query.u, aim[pos_B])
