"""The positives of NNCLR and NNSiam: nearest neighbors from a support set, in place of the view itself.

    NN(z, Q) = argmin_{q ∈ Q} ‖z − q‖                                                        (NNCLR eq. 4)

    paper  here      meaning
    z      target.z  projection of one view, unit length
    Q      ctx.bank  the support set: past projections, unit length, first in, first out

Projections enter Q after the step, so that no image finds its own present view. Or Q is refilled before each step with
random images, embedded by the current encoder (the paper's Table 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.errors import ConfigError, require_choice
from hpcssl.memory.bank import Neighbors
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Embedding, StepContext
from hpcssl.methods.diagnostics import record_purity

RULES = ("nearest", "oracle", "soft", "self")
REPLACE = ("oldest", "random")
SUPPORTS = ("queue", "encoder")


@dataclass(frozen=True, kw_only=True)
class NeighborOptions:
    """Which positives NNCLR and NNSiam use.

    Attributes:
        rule: ``nearest``: the nearest row of Q. ``oracle``: the nearest row with the image's label, or the plain
            nearest where Q has none (our reading; the paper does not say). ``soft``: all of Q, weighted by
            softmax(z·q/temperature). ``self``: the view itself and no bank, "View 1" of the paper's Table 4.
        k: number of neighbors, 1 or more; the positive is one of the k nearest, each equally likely. 1 with the rules
            ``soft`` and ``self``.
        temperature: temperature of the rule ``soft``, above 0. The paper states neither temperature nor distance: 0.1
            and cosine are our choice.
        both_views: true: the projections of both views enter Q. false: only those of the first (Algorithm 1).
        replace: new rows replace the ``oldest`` rows, or rows drawn at ``random`` once Q is full.
        support: ``queue``: Q holds past projections. ``encoder``: Q holds ``bank.size`` random images that the current
            encoder embeds before every step.
    """

    rule: str = "nearest"
    k: int = 1
    temperature: float = 0.1
    both_views: bool = False
    replace: str = "oldest"
    support: str = "queue"

    def __post_init__(self) -> None:
        for name, choices in (("rule", RULES), ("replace", REPLACE), ("support", SUPPORTS)):
            require_choice(f"method.neighbors.{name}", getattr(self, name), choices)
        if self.k < 1 or not self.temperature > 0:
            raise ConfigError(
                "method.neighbors",
                got=f"k={self.k}, temperature={self.temperature}",
                expected="k of 1 or more and a temperature above 0",
                fix="set method.neighbors.k=1 method.neighbors.temperature=0.1",
            )
        if self.k > 1 and self.rule in ("soft", "self"):
            raise ConfigError(
                "method.neighbors.k",
                got=f"{self.k} with rule {self.rule}",
                expected="1, since this rule does not choose from k neighbors",
                fix="set method.neighbors.k=1, or method.neighbors.rule=nearest",
            )
        if self.temperature != 0.1 and self.rule != "soft":
            raise ConfigError(
                "method.neighbors.temperature",
                got=f"{self.temperature:g} with rule {self.rule}",
                expected="the default of 0.1 with any rule but soft",
                fix="remove it, or set method.neighbors.rule=soft",
            )
        if self.rule == "self" and (self.both_views or self.replace != "oldest" or self.support != "queue"):
            raise ConfigError(
                "method.neighbors.rule",
                got="self with options of a support set",
                expected="a rule that uses a support set",
                fix="remove both_views, replace and support, or set method.neighbors.rule=nearest",
            )

    def bank_spec(self, targets: tuple[int, ...]) -> BankSpec | None:
        """Return what the bank keeps for a view plan with these target views.

        Raises:
            ConfigError: if the plan or other options contradict ``both_views`` or ``support``.
        """
        if self.rule == "self":
            return None
        if self.both_views and len(targets) < 2:
            raise ConfigError(
                "method.neighbors.both_views",
                got="true with one target view",
                expected="a symmetric loss, which embeds both views as targets",
                fix="set method.symmetric=true",
            )
        refill = self.support == "encoder"
        if refill and (self.both_views or self.replace == "random"):
            raise ConfigError(
                "method.neighbors.support",
                got="encoder with both_views or replace=random",
                expected="neither of them, since no past projections are kept",
                fix="set method.neighbors.both_views=false method.neighbors.replace=oldest",
            )
        return BankSpec(
            push="refill" if refill else "after",
            views=targets if self.both_views else targets[:1],
            replace="random" if self.replace == "random" else "oldest",
        )


def search_bank(target: Embedding, ctx: StepContext, k: int) -> Neighbors:
    """Find the k nearest rows of the bank for each row of a target view.

    On a CPU, all target views of the step are searched for together, which reads the bank once. The answer is the same,
    since it is certified there (``search.nearest``). On a GPU each view is searched for alone.
    """
    views = ctx.target_embeddings
    if target.z.device.type != "cpu" or views.get(target.view) is not target:
        return ctx.bank.nearest(target.z, k)
    if k not in ctx.searches:
        together = ctx.bank.nearest(torch.cat([embedding.z for embedding in views.values()]), k)
        lengths = [len(embedding.z) for embedding in views.values()]
        columns = (together.slot, together.similarity, together.valid, together.rows)
        parts = zip(*(torch.split(column, lengths) for column in columns), strict=True)
        ctx.searches[k] = {view: Neighbors(*part) for view, part in zip(views, parts, strict=True)}
    neighbors: Neighbors = ctx.searches[k][target.view]
    return neighbors


@torch.no_grad()
def find_positives(target: Embedding, ctx: StepContext, options: NeighborOptions) -> Tensor:
    """Return the positive of each target row: NN(z, Q), or the row itself where an empty bank has none.

    Returns:
        [b, D], unit length, without gradient.
    """
    if options.rule == "self":
        return target.z.detach()
    if options.rule == "soft":
        bank_ND = ctx.bank.all_rows("key")
        if not len(bank_ND):
            return target.z.detach()
        return equations.soft_nearest_neighbor(target.z, bank_ND, options.temperature)
    neighbors = search_bank(target, ctx, options.k)
    rows_BKD, valid_BK = neighbors.rows, neighbors.valid
    if options.rule == "oracle":
        same_label = ctx.bank.nearest(target.z, options.k, among=("label", ctx.label_B))
        has_some_B = same_label.valid[:, 0]  # valid neighbors come first
        rows_BKD = torch.where(has_some_B[:, None, None], same_label.rows, rows_BKD)
        valid_BK = torch.where(has_some_B[:, None], same_label.valid, valid_BK)
    else:
        record_purity(neighbors, ctx)
    positive_BD = rows_BKD[:, 0]
    if options.k > 1:
        choice_B = (ctx.uniform("neighbour", target.view) * valid_BK.sum(1)).long()
        positive_BD = rows_BKD[torch.arange(len(choice_B), device=choice_B.device), choice_B]
    return torch.where(valid_BK[:, :1], positive_BD.to(target.z.dtype), target.z)
