"""With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations (NNCLR).

Dwibedi, Aytar, Tompson, Sermanet, Zisserman. ICCV 2021.

    L_i = − log [ exp(NN(z_i, Q)·p_i⁺/τ) / Σ_{k=1..n} exp(NN(z_i, Q)·p_k⁺/τ) ]                       (eq. 3, with g)
    L   = 1/2 · L(NN(z_1, Q), p_2) + 1/2 · L(NN(z_2, Q), p_1)                                        (Algorithm 1)

    paper     here                 meaning
    z_i       target.z             projection of one view, unit length; the lookup stops its gradient
    p_i⁺      query.prediction     g(z_i⁺): prediction for the other view, unit length; without ``predictor``: z_i⁺
    NN(·, Q)  targets              nearest row of the support set Q (``neighbors.py``): the last N z of the first view
    n         whole batch          rows of the global batch: the p of all ranks are negatives
    τ         options.temperature  0.1

The text and Algorithm 1 differ in how the loss is made symmetric. The text keeps one direction and adds the softmax
over columns, −log [exp(NN(z_i)·p_i⁺/τ) / Σ_k exp(NN(z_k)·p_i⁺/τ)]: ``contrast=columns symmetric=false``. The paper
finds no difference. ``nt_xent`` adds the nn–nn and p–p negatives (2n − 2 of them), which lightly's implementation has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.errors import ConfigError, require_choice
from hpcssl.methods import equations
from hpcssl.methods.base import Embedding, HeadSpec, StepContext
from hpcssl.methods.checks import check_positive
from hpcssl.methods.neighbors import NeighborOptions, find_positives
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, one_way_plan, symmetric_plan

CONTRASTS = ("rows", "columns", "nt_xent")
_EMA = EmaOptions(momentum=0.99, shape="cosine")


@dataclass(frozen=True, kw_only=True)
class NnclrOptions:
    """Options of NNCLR.

    Attributes:
        name: ``nnclr``, the name of the method.
        temperature: τ, above 0.
        symmetric: true: each view is query once and target once, with half the loss each. false: only the first view is
            a query.
        contrast: which negatives enter the loss. ``rows``: the p of the batch (eq. 3). ``columns``: adds the softmax
            over neighbors. ``nt_xent``: the negatives of SimCLR.
        predictor: false leaves out the predictor g (Table 7f).
        neighbors: which positives replace the view itself.
        momentum_encoder: true: z and Q come from a moving average of the online encoder (Table 4).
        ema: momentum of that encoder; only with ``momentum_encoder``. The paper states none: BYOL's cosine from 0.99 is
            our choice.
    """

    name: str = "nnclr"
    temperature: float = 0.1
    symmetric: bool = True
    contrast: str = "rows"
    predictor: bool = True
    neighbors: NeighborOptions = field(default_factory=NeighborOptions)
    momentum_encoder: bool = False
    ema: EmaOptions = field(default_factory=lambda: _EMA)

    def __post_init__(self) -> None:
        check_positive("method.temperature", self.temperature, default=0.1)
        require_choice("method.contrast", self.contrast, CONTRASTS)
        if self.ema != _EMA and not self.momentum_encoder:
            raise ConfigError(
                "method.ema",
                got=f"momentum {self.ema.momentum:g}, {self.ema.shape}",
                expected="no value without a momentum encoder",
                fix="set method.momentum_encoder=true, or remove method.ema",
            )


class Nnclr:
    """View plan: symmetric, half each (or one way). Target encoder: online without gradient (or a moving average).

    The bank is fed after the step, so that no view finds itself.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    needs_whole_batch = True

    def __init__(self, options: NnclrOptions, views: ViewOptions):
        self.options = options
        first, second = views.make_views()
        self.plan = symmetric_plan(first, second, share=0.5) if options.symmetric else one_way_plan(first, second)
        self.target_encoder = "ema" if options.momentum_encoder else "stop_gradient"
        self.heads = HeadSpec(predictor="mlp" if options.predictor else "none")
        self.bank = options.neighbors.bank_spec(self.plan.targets)

    def targets(self, target: Embedding, ctx: StepContext) -> Tensor:
        """Return NN(z, Q), [b, D]."""
        return find_positives(target, ctx, self.options.neighbors)

    def loss(self, query: Embedding, targets: Tensor, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Eq. 3, or one of its variants."""
        p_BD = query.prediction if self.options.predictor else query.z
        nn_BD, own_B, temperature = targets[rows_B], ctx.global_rows(), self.options.temperature
        p_ND = ctx.all_gather_rows(p_BD)
        if self.options.contrast == "rows":
            return equations.in_batch_info_nce(nn_BD, p_ND, own_B, temperature)
        nn_ND = ctx.all_gather_rows(nn_BD)
        if self.options.contrast == "columns":
            rows_loss_B = equations.in_batch_info_nce(nn_BD, p_ND, own_B, temperature)
            return rows_loss_B + equations.in_batch_info_nce(p_BD, nn_ND, own_B, temperature)
        nn_loss_B = equations.nt_xent(nn_BD, p_ND, nn_ND, own_B, own_B[:, None], temperature)
        return (nn_loss_B + equations.nt_xent(p_BD, nn_ND, p_ND, own_B, own_B[:, None], temperature)) / 2
