"""A Simple Framework for Contrastive Learning of Visual Representations (SimCLR), Chen et al. ICML 2020.

    l_{i,j} = − log [ exp(z_i·z_j/τ) / Σ_{k=1..2N, k≠i} exp(z_i·z_k/τ) ]                             (eq. 1)
    L       = 1/2N · Σ over the 2N views of l_{view, its partner}                                    (Algorithm 1)

    paper  here         meaning
    z_i    query.z      g(f(x_i)): projection of one view, unit length, with gradient
    z_j    target.z     projection of the same image's other view by the same network, with gradient too
    z_k    whole batch  both views of all N images of the global batch: those of other ranks as well
    τ      options.tau  0.1

The official code adds the losses of the two views, each a mean over N (loss_a + loss_b): twice Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hpcssl.errors import ConfigError
from hpcssl.methods import equations
from hpcssl.methods.base import Context, Emb, Heads
from hpcssl.views.plan import ViewOptions, both_ways

_SHARE = {"sum": 1.0, "mean": 0.5}


@dataclass(frozen=True, kw_only=True)
class SimClrOptions:
    """``reduction`` over the two views: ``sum`` (official code) or ``mean`` (the paper's 1/2N). LARS without weight
    decay cannot tell them apart; SGD sees half the gradient."""

    name: str = "simclr"
    tau: float = 0.1
    reduction: str = "sum"

    def __post_init__(self):
        if not self.tau > 0:
            raise ConfigError("method.tau", got=self.tau, expected="a temperature above 0", mend="set method.tau=0.1")
        if self.reduction not in _SHARE:
            raise ConfigError("method.reduction", got=repr(self.reduction), expected="sum or mean",
                              mend="set method.reduction=sum")


class SimClr:
    """Plan: both ways. Target: the online network itself, with gradient. No predictor, no bank."""

    target = "same"
    heads = Heads()
    in_batch = True
    bank = None

    def __init__(self, options: SimClrOptions, views: ViewOptions):
        self.options = options
        self.plan = both_ways(*views.pair(), share=_SHARE[options.reduction])

    def aim(self, target: Emb, ctx: Context) -> Tensor:
        return ctx.everyone(target.z)

    def agree(self, query: Emb, aim: Tensor, pos_B: Tensor, ctx: Context) -> Tensor:
        row_B = ctx.rows()
        own_BM = row_B[:, None] if ctx.kin is None else ctx.kin(row_B)  # BSIM eq. 1: not those that show the same image
        return equations.nt_xent(query.z, aim, ctx.everyone(query.z), row_B, own_BM, self.options.tau)
