"""Constrained Mean Shift Using Distant Yet Related Neighbors for Representation Learning (CMSF).

Navaneet, Koohpayegani, Tejankar, Pourahmadi, Subramanya, Pirsiavash. ECCV 2022.

    L = ½ · 1/k · Σ_{j ∈ NN_k(u, C)} dist(v, z_j)  +  ½ · 1/k · Σ_{j ∈ NN_k(u, M)} dist(v, z_j),    C ⊂ M
    dist(a, b) = ‖a − b‖²;    with labels or pseudo-labels only the first sum, without the ½

    paper  here              meaning
    v      query.prediction  prediction of the online network, unit length
    u      target.z          embedding of the target network, unit length, pushed to M before the search
    M      ctx.bank          the last N target embeddings, first in, first out
    C      options.rule      which rows of M may be neighbors:
             two_queues (2Q)         the k' rows whose images' embeddings of the previous epoch are nearest to u's own
             kmeans (KM)             images of u's cluster; clusters are recomputed after each epoch
             supervised (sup)        images of u's class, whose label may be noisy
             semi_supervised (semi)  the same, where the class is a label or a confident pseudo-label
             cross_modal             the k' rows whose other modality is nearest to u's own other modality
    M'     previous_epoch    bank column: the image's embedding of the previous epoch, of another augmentation

Where C is not known (the first epoch, an image that is new, no label), it is M; the official script searches random
rows there. That script also fills up fewer than k allowed rows with forbidden ones at an equal "distance 5". Here the
mean is over the allowed ones, of which u is always one, unless ``legacy_fill`` is set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.memory.bank import Neighbors
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Embedding, HeadSpec, StateHooks, StepContext
from hpcssl.methods.cmsf.constraint import ConstrainedNeighbors
from hpcssl.methods.cmsf.cross_modal import COLUMNS, CrossModalRule
from hpcssl.methods.cmsf.kmeans import KMeansRule
from hpcssl.methods.cmsf.options import LABELED_RULES, CmsfOptions
from hpcssl.methods.cmsf.semi_supervised import SemiSupervisedRule
from hpcssl.methods.cmsf.supervised import SupervisedRule
from hpcssl.methods.cmsf.two_queues import TwoQueuesRule
from hpcssl.methods.diagnostics import record_purity
from hpcssl.views.plan import ViewOptions, join_plans, one_way_plan

Rule = TwoQueuesRule | KMeansRule | SupervisedRule | SemiSupervisedRule | CrossModalRule
RULES: dict[str, type[Rule]] = {
    "two_queues": TwoQueuesRule,
    "kmeans": KMeansRule,
    "supervised": SupervisedRule,
    "semi_supervised": SemiSupervisedRule,
    "cross_modal": CrossModalRule,
}
"""The value of ``method.rule`` → its class."""


@dataclass(frozen=True)
class CmsfTargets:
    """What queries are trained toward.

    Attributes:
        unconstrained: NN_k(u, M).
        constrained: NN_k(u, C).
    """

    unconstrained: Neighbors
    constrained: ConstrainedNeighbors


class Cmsf:
    """View plan: query → target, one way. Target encoder: moving average. Bank: fed before the lookup.

    The rule has the memories, and its hooks are the method's hooks.

    Args:
        options: options of the method.
        views: how the views are augmented.
    """

    target_encoder = "ema"
    heads = HeadSpec(predictor="mlp")
    needs_whole_batch = False

    def __init__(self, options: CmsfOptions, views: ViewOptions):
        self.options = options
        self.plan = one_way_plan(*views.make_views())
        if options.rule == "cross_modal":
            self.plan = join_plans(self.plan, one_way_plan(*views.make_views(second=True)))
        self.rule = RULES[options.rule](options)
        hooks = StateHooks.of(self.rule)
        self.build_memories, self.before_step = hooks.build_memories, hooks.before_step
        self.bank_columns, self.after_step = hooks.bank_columns, hooks.after_step
        self.heeds_taken = hooks.heeds_taken
        self.bank = BankSpec(push="before", views=(1,), vectors=self.rule.vectors, numbers=self.rule.numbers)

    def targets(self, target: Embedding, ctx: StepContext) -> CmsfTargets:
        """Return the neighbors in M and in C. Logs ``allowed_neighbors``, the mean number of rows in C."""
        column = COLUMNS[target.view]
        unconstrained = ctx.bank.nearest(target.z, self.options.k, column=column)
        constrained = self.rule.neighbors(target, ctx)
        record_purity(unconstrained, ctx, with_self=True)
        ctx.metrics["allowed_neighbors"] = constrained.count.double().mean()
        return CmsfTargets(unconstrained, constrained)

    def loss(self, query: Embedding, targets: CmsfTargets, rows_B: Tensor, ctx: StepContext) -> Tensor:
        """Mean of the two sums, or the first sum alone with classes."""
        v_BD, in_M, in_C = query.prediction, targets.unconstrained, targets.constrained
        loss_M_B = equations.mean_shift(v_BD, in_M.rows[rows_B], in_M.valid[rows_B])
        loss_C_B = equations.mean_shift(v_BD, in_C.rows[rows_B], in_C.valid[rows_B])
        loss_C_B = torch.where(in_C.known[rows_B], loss_C_B, loss_M_B)
        if self.options.rule in LABELED_RULES:
            return loss_C_B
        return (loss_C_B + loss_M_B) / 2
