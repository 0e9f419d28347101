"""Improved Baselines with Momentum Contrastive Learning (MoCo v2), Chen, Fan, Girshick, He. arXiv 2003.04297, 2020;
the loss is that of Momentum Contrast for Unsupervised Visual Representation Learning (MoCo), CVPR 2020.

    L = − log [ exp(q·k₊/τ) / (exp(q·k₊/τ) + Σ_{i=1..K} exp(q·k_i/τ)) ]                              (eq. 1)

    paper  here         meaning
    q      query.z      f_q(x_q): projection of one view by the online network, unit length
    k₊     target.z     f_k(x_k): projection of the other view by the moving average of f_q, unit length
    k_i    ctx.bank     the last K keys, first in, first out; a batch's own keys enter after the step
    τ      options.tau  0.2 in v2, 0.07 in v1, 0.1 in the authors' CIFAR-10 demo

Pushed any earlier, the positive would stand among its own negatives. v1 and v2 differ in views and projector alone
(v1: one linear layer), which the recipe says; there is no predictor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.errors import ConfigError
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Context, Emb, Heads
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, both_ways, one_way


@dataclass(frozen=True, kw_only=True)
class MocoOptions:
    """``symmetric``: each view is a query once and a key once, the two losses are added, and the keys of both views
    enter the bank: the demo's symmetric variant, at twice the cost of the paper's."""

    name: str = "moco"
    tau: float = 0.2
    symmetric: bool = False
    ema: EmaOptions = field(default_factory=lambda: EmaOptions(momentum=0.999))

    def __post_init__(self):
        if not self.tau > 0:
            raise ConfigError("method.tau", got=self.tau, expected="a temperature above 0", mend="set method.tau=0.2")


class Moco:
    """Plan: query → key, one way (or both). Target: moving average. Bank: negatives, fed after the step."""

    target = "ema"
    heads = Heads()
    in_batch = False

    def __init__(self, options: MocoOptions, views: ViewOptions):
        self.options = options
        self.plan = both_ways(*views.pair()) if options.symmetric else one_way(*views.pair())
        self.bank = BankSpec(push="after", views=self.plan.targets)

    def aim(self, target: Emb, ctx: Context) -> tuple[Tensor, Tensor]:
        return target.z, ctx.bank.everything("key")

    def agree(self, query: Emb, aim: tuple[Tensor, Tensor], pos_B: Tensor, ctx: Context) -> Tensor:
        key_BD, negative_ND = aim
        return equations.info_nce(query.z, key_BD[pos_B], negative_ND, self.options.tau)
