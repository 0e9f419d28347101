"""Mean Shift for Self-Supervised Learning (MSF), Koohpayegani, Tejankar, Pirsiavash. ICCV 2021.

    L = 1/k · Σ_{j=1..k} dist(v, z_j),    {z_j} = NN_k(u, M),    dist(a, b) = ‖a − b‖² = 2 − 2 a·b

    paper  here              meaning
    v      query.prediction  h(g(T1(x))): prediction of the online network for one view, unit length
    u      target.z          f(T2(x)): embedding of the target network for the other view, unit length
    M      ctx.bank          the last N target embeddings, first in, first out; u is pushed before the search
    z_j    targets.rows      the k rows of M nearest to u: u itself is the nearest, at distance 0
    k      options.k         5 in the paper, 10 in its README's command

The target network f is a moving average of g (0.99). There is one direction per step: the query is strongly augmented,
the target weakly ("w/s", the paper's best). The paper prints the sum over j, its code and poster the mean; this is the
mean. With k = 1 the only neighbor is u itself, and the method is the asymmetric BYOL.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.errors import ConfigError
from hpcssl.memory.bank import Neighbors
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Embedding, HeadSpec, StepContext
from hpcssl.methods.diagnostics import record_purity
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, one_way_plan


@dataclass(frozen=True, kw_only=True)
class MsfOptions:
    """Options of MSF.

    Attributes:
        name: ``msf``, the name of the method.
        k: number of neighbors, 1 or more, the image itself included.
        include_self: true: u is pushed before the search, as in the paper. false: after it, so that an image is none of
            its own neighbors (an ablation).
        ema: momentum of the target network.
    """

    name: str = "msf"
    k: int = 5
    include_self: bool = True
    ema: EmaOptions = field(default_factory=EmaOptions)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError("method.k", got=self.k, expected="1 or more neighbors", fix="set method.k=5")


class Msf:
    """View plan: query → target, one way. Target encoder: moving average. Bank: fed before the lookup.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "ema"
    heads = HeadSpec(predictor="mlp")
    needs_whole_batch = False

    def __init__(self, options: MsfOptions, views: ViewOptions):
        self.options = options
        self.plan = one_way_plan(*views.make_views())
        self.bank = BankSpec(push="before" if options.include_self else "after", views=(1,))

    def targets(self, target: Embedding, ctx: StepContext) -> Neighbors:
        """Return NN_k(u, M)."""
        neighbors = ctx.bank.nearest(target.z, self.options.k)
        record_purity(neighbors, ctx, with_self=True)
        return neighbors

    def loss(self, query: Embedding, targets: Neighbors, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Mean of dist(v, z_j) over the neighbors."""
        return equations.mean_shift(query.prediction, targets.rows[rows_B], targets.valid[rows_B])
