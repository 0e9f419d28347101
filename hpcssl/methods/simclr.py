"""A Simple Framework for Contrastive Learning of Visual Representations (SimCLR), Chen et al. ICML 2020.

    l_{i,j} = − log [ exp(z_i·z_j/τ) / Σ_{k=1..2N, k≠i} exp(z_i·z_k/τ) ]                             (eq. 1)
    L       = 1/2N · Σ over the 2N views of l_{view, its partner}                                    (Algorithm 1)

    paper  here                 meaning
    z_i    query.z              g(f(x_i)): projection of one view, unit length, with gradient
    z_j    target.z             projection of the same image's other view by the same network, with gradient too
    z_k    whole batch          both views of all N images of the global batch, those of other ranks included
    τ      options.temperature  0.1

The official code adds the losses of the two views, each a mean over N (loss_a + loss_b): twice Algorithm 1.

OpenSelfSup computes the whole loss on each of R GPUs from gathered projections. The backward pass of its gather returns
the gradient with respect to the GPU's own projections alone, and the R gradients of the weights are averaged, not
added. So weights move by 1/R of the gradient of L. ``gradient_factor`` reproduces it on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hpcssl.errors import require_choice
from hpcssl.methods import equations
from hpcssl.methods.base import Embedding, HeadSpec, StepContext
from hpcssl.methods.checks import check_positive
from hpcssl.views.plan import ViewOptions, symmetric_plan

_SHARES = {"sum": 1.0, "mean": 0.5}


@dataclass(frozen=True, kw_only=True)
class SimClrOptions:
    """Options of SimCLR.

    Attributes:
        name: ``simclr``, the name of the method.
        temperature: τ, above 0.
        reduction: over the two views: ``sum``, as in the official code, or ``mean``, the paper's 1/2N. LARS without
            weight decay cannot tell them apart; SGD sees half the gradient.
        gradient_factor: factor of the gradient, above 0; the loss keeps its value. 1/8 for OpenSelfSup on 8 GPUs.
    """

    name: str = "simclr"
    temperature: float = 0.1
    reduction: str = "sum"
    gradient_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive("method.temperature", self.temperature, default=0.1)
        check_positive("method.gradient_factor", self.gradient_factor, default=1.0)
        require_choice("method.reduction", self.reduction, _SHARES)


class SimClr:
    """View plan: symmetric. Target encoder: online, with gradient. No predictor, no bank.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "shared"
    heads = HeadSpec()
    needs_whole_batch = True
    bank = None

    def __init__(self, options: SimClrOptions, views: ViewOptions):
        self.options = options
        self.plan = symmetric_plan(*views.make_views(), share=_SHARES[options.reduction])

    def targets(self, target: Embedding, ctx: StepContext) -> Tensor:
        """Return the target view's projections of the global batch, [N, D]."""
        return ctx.all_gather_rows(target.z)

    def loss(self, query: Embedding, targets: Tensor, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Eq. 1."""
        own_B = ctx.global_rows()
        excluded_BM = own_B[:, None]
        if ctx.same_image_rows is not None:  # BSIM eq. 1: rows that show one of the same images are not negatives
            excluded_BM = ctx.same_image_rows(own_B)
        query_ND = ctx.all_gather_rows(query.z)
        loss_B = equations.nt_xent(query.z, targets, query_ND, own_B, excluded_BM, self.options.temperature)
        if self.options.gradient_factor == 1:
            return loss_B
        return loss_B.detach() + self.options.gradient_factor * (loss_B - loss_B.detach())
