"""Improved Baselines with Momentum Contrastive Learning (MoCo v2), Chen, Fan, Girshick, He. arXiv 2003.04297, 2020.

The loss is that of Momentum Contrast for Unsupervised Visual Representation Learning (MoCo), He et al. CVPR 2020.

    L = − log [ exp(q·k₊/τ) / (exp(q·k₊/τ) + Σ_{i=1..K} exp(q·k_i/τ)) ]                              (eq. 1)

    paper  here                 meaning
    q      query.z              f_q(x_q): projection of one view by the online network, unit length
    k₊     target.z             f_k(x_k): projection of the other view by the moving average of f_q, unit length
    k_i    ctx.bank             the last K keys, first in, first out
    τ      options.temperature  0.2 in v2, 0.07 in v1, 0.1 in the authors' CIFAR-10 demo

The keys of a batch enter the bank after the step. Any earlier, the positive would be among its own negatives. v1 and v2
differ only in views and projector (v1: one linear layer), which the recipe states; there is no predictor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Embedding, HeadSpec, StepContext
from hpcssl.methods.checks import check_positive
from hpcssl.optim.schedule import EmaOptions
from hpcssl.views.plan import ViewOptions, one_way_plan, symmetric_plan


@dataclass(frozen=True, kw_only=True)
class MocoOptions:
    """Options of MoCo.

    Attributes:
        name: ``moco``, the name of the method.
        temperature: τ, above 0.
        symmetric: true: each view is query once and key once, the two losses are added, and the keys of both views
            enter the bank. This is the symmetric variant of the authors' demo, at twice the cost. false: as in the
            paper.
        ema: momentum of the key encoder.
    """

    name: str = "moco"
    temperature: float = 0.2
    symmetric: bool = False
    ema: EmaOptions = field(default_factory=lambda: EmaOptions(momentum=0.999))

    def __post_init__(self) -> None:
        check_positive("method.temperature", self.temperature, default=0.2)


class Moco:
    """View plan: query → key, one way (or symmetric). Target encoder: moving average. Bank: negatives, fed last.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "ema"
    heads = HeadSpec()
    needs_whole_batch = False

    def __init__(self, options: MocoOptions, views: ViewOptions):
        self.options = options
        query, key = views.make_views()
        self.plan = symmetric_plan(query, key) if options.symmetric else one_way_plan(query, key)
        self.bank = BankSpec(push="after", views=self.plan.targets)

    def targets(self, target: Embedding, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Return the positive keys k₊ [b, D] and the negative keys k_i [K, D]."""
        return target.z, ctx.bank.all_rows("key")

    def loss(self, query: Embedding, targets: tuple[Tensor, Tensor], rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Eq. 1."""
        key_BD, negative_ND = targets
        return equations.info_nce(query.z, key_BD[rows_B], negative_ND, self.options.temperature)
