"""With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations (NNCLR),
Dwibedi, Aytar, Tompson, Sermanet, Zisserman. ICCV 2021.

    L_i = − log [ exp(NN(z_i, Q)·p_i⁺/τ) / Σ_{k=1..n} exp(NN(z_i, Q)·p_k⁺/τ) ]                       (eq. 3, with g)
    L   = 1/2 · L(NN(z_1, Q), p_2) + 1/2 · L(NN(z_2, Q), p_1)                                        (Algorithm 1)

    paper     here         meaning
    z_i       target.z     projection of one view, unit length; the look-up stops its gradient
    p_i⁺      query.u      g(z_i⁺): prediction for the other view, unit length; z_i⁺ itself without ``predictor``
    NN(·, Q)  aim          nearest row of the support set Q (``neighbours.py``): the last N z of the first view
    n         whole batch  rows of the global batch: all ranks' p are negatives
    τ         options.tau  0.1

Text and Algorithm 1 differ on how the loss is made symmetric: the text keeps one direction and adds the softmax over
the columns, −log [exp(NN(z_i)·p_i⁺/τ) / Σ_k exp(NN(z_k)·p_i⁺/τ)]: ``contrast=columns symmetric=false``. The paper finds
no difference. ``nt_xent`` adds the nn–nn and p–p negatives (2n − 2 of them), which lightly's implementation has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.errors import ConfigError, nearest
from hpcssl.methods import equations
from hpcssl.methods.base import Context, Emb, Heads
from hpcssl.methods.neighbours import NeighbourOptions, look_up
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, both_ways, one_way

CONTRASTS = ("rows", "columns", "nt_xent")
_EMA = EmaOptions(momentum=0.99, shape="cosine")


@dataclass(frozen=True, kw_only=True)
class NnclrOptions:
    """``momentum_encoder``: z and Q come from a moving average (the paper's Table 4; it states no momentum: ``ema`` is
    BYOL's form from 0.99, our reading). ``predictor=False`` leaves g away (Table 7f)."""

    name: str = "nnclr"
    tau: float = 0.1
    symmetric: bool = True
    contrast: str = "rows"
    predictor: bool = True
    neighbours: NeighbourOptions = field(default_factory=NeighbourOptions)
    momentum_encoder: bool = False
    ema: EmaOptions = field(default_factory=lambda: _EMA)

    def __post_init__(self):
        if not self.tau > 0:
            raise ConfigError("method.tau", got=self.tau, expected="a temperature above 0", mend="set method.tau=0.1")
        if self.contrast not in CONTRASTS:
            raise ConfigError("method.contrast", got=repr(self.contrast), expected="one of " + ", ".join(CONTRASTS),
                              mend=nearest(str(self.contrast), CONTRASTS))
        if self.ema != _EMA and not self.momentum_encoder:
            raise ConfigError("method.ema", got=f"momentum {self.ema.momentum:g}, {self.ema.shape}", expected="it with "
                              "a momentum encoder alone", mend="set method.momentum_encoder=true, or leave method.ema")


class Nnclr:
    """Plan: both ways, half each (or one way). Target: the online network without gradient (or its moving average).
    Bank: fed after the step, so that no view finds itself."""

    in_batch = True

    def __init__(self, options: NnclrOptions, views: ViewOptions):
        self.options = options
        self.plan = both_ways(*views.pair(), share=0.5) if options.symmetric else one_way(*views.pair())
        self.target = "ema" if options.momentum_encoder else "stop"
        self.heads = Heads(predictor="mlp" if options.predictor else "none")
        self.bank = options.neighbours.bank(self.plan.targets)

    def aim(self, target: Emb, ctx: Context) -> Tensor:
        return look_up(target, ctx, self.options.neighbours)

    def agree(self, query: Emb, aim: Tensor, pos_B: Tensor, ctx: Context) -> Tensor:
        p_BD, nn_BD, own_B = query.u if self.options.predictor else query.z, aim[pos_B], ctx.rows()
        p_ND, tau = ctx.everyone(p_BD), self.options.tau
        if self.options.contrast == "rows":
            return equations.contrast(nn_BD, p_ND, own_B, tau)
        nn_ND = ctx.everyone(nn_BD)
        if self.options.contrast == "columns":
            return equations.contrast(nn_BD, p_ND, own_B, tau) + equations.contrast(p_BD, nn_ND, own_B, tau)
        return (equations.nt_xent(nn_BD, p_ND, nn_ND, own_B, own_B[:, None], tau)
                + equations.nt_xent(p_BD, nn_ND, p_ND, own_B, own_B[:, None], tau)) / 2
