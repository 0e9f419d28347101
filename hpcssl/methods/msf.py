"""Mean Shift for Self-Supervised Learning (MSF), Koohpayegani, Tejankar, Pirsiavash. ICCV 2021.

    L = 1/k · Σ_{j=1..k} dist(v, z_j),    {z_j} = NN_k(u, M),    dist(a, b) = ‖a − b‖² = 2 − 2 a·b

    paper  here         meaning
    v      query.u      h(g(T1(x))): prediction of the online network for one view, unit length
    u      target.z     f(T2(x)): embedding of the target network for the other view, unit length
    M      ctx.bank     the last N target embeddings, first in, first out; u is pushed before the search
    z_j    aim.rows     the k rows of M nearest to u: u itself is the nearest, at distance 0
    k      options.k    5 in the paper, 10 in its README's command

The target network f is a moving average of g (0.99). One direction per step: the query is strongly augmented, the
target weakly ("w/s", the paper's best). The paper prints the sum over j, its code and poster the mean: the mean is
taken. With k = 1 the only neighbour is u itself, and the method is the asymmetric BYOL.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.errors import ConfigError
from hpcssl.memory.bank import Hits
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Context, Emb, Heads
from hpcssl.methods.diagnostics import purity
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, one_way


@dataclass(frozen=True, kw_only=True)
class MsfOptions:
    """``k``: neighbours, the image itself included. ``include_self=False`` searches before u is pushed, so that
    the image is none of its own neighbours (not the paper's; an ablation)."""

    name: str = "msf"
    k: int = 5
    include_self: bool = True
    ema: EmaOptions = field(default_factory=EmaOptions)


class Msf:
    """Plan: query → target, one way. Target: moving average. Bank: fed before the lookup."""

    target = "ema"
    heads = Heads(predictor="mlp")
    in_batch = False

    def __init__(self, options: MsfOptions, views: ViewOptions):
        if options.k < 1:
            raise ConfigError("method.k", got=options.k, expected="1 or more neighbours", mend="set method.k=5")
        self.options = options
        self.plan = one_way(*views.pair())
        self.bank = BankSpec(push="before" if options.include_self else "after", views=(1,))

    def aim(self, target: Emb, ctx: Context) -> Hits:
        hits = ctx.bank.nearest(target.z, self.options.k)
        purity(hits, ctx)
        return hits

    def agree(self, query: Emb, aim: Hits, pos_B: Tensor, ctx: Context) -> Tensor:
        return equations.mean_shift(query.u, aim.rows[pos_B], aim.valid[pos_B])
