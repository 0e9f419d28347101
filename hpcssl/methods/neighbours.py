"""The positives that NNCLR and NNSiam look up in their support set instead of using the view itself.

    NN(z, Q) = argmin_{q ∈ Q} ‖z − q‖                                                        (NNCLR eq. 4)

    Q is the bank of past projections, unit length, fed after the step: no image finds its own present view. Or it is
    the present encoder's projections of random images, all made anew for every step (the paper's Table 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.errors import ConfigError, nearest
from hpcssl.methods import equations
from hpcssl.methods.base import BankSpec, Context, Emb
from hpcssl.methods.diagnostics import purity

RULES = ("nearest", "oracle", "soft", "self")
REPLACE = ("oldest", "random")
SUPPORTS = ("queue", "encoder")


@dataclass(frozen=True, kw_only=True)
class NeighbourOptions:
    """``rule``: ``nearest``; ``oracle``, the nearest of the image's own label, or the plain nearest where the bank
    holds none (our reading; the paper is silent); ``soft``, all of Q weighed by softmax(z·q/``tau``) (the paper
    states neither temperature nor distance: cosine and 0.1 are ours); ``self``, the view itself and no bank, the
    "View 1" of the paper's Table 4.

    ``k``: one of the k nearest, each as likely. ``both_views`` enter the bank, or only the first (Algorithm 1).
    ``replace``: the ``oldest`` rows, or rows drawn at ``random`` once the bank is full. ``support``: the ``queue`` of
    past projections, or ``encoder``: ``bank.size`` random images through the present encoder, in every step.
    """

    rule: str = "nearest"
    k: int = 1
    tau: float = 0.1
    both_views: bool = False
    replace: str = "oldest"
    support: str = "queue"

    def __post_init__(self):
        for name, known in (("rule", RULES), ("replace", REPLACE), ("support", SUPPORTS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"method.neighbours.{name}", got=repr(value), expected="one of " + ", ".join(known),
                                  mend=nearest(str(value), known))
        if self.k < 1 or not self.tau > 0:
            raise ConfigError("method.neighbours", got=f"k={self.k}, tau={self.tau}", expected="k from 1, tau above 0",
                              mend="set method.neighbours.k=1 method.neighbours.tau=0.1")
        if self.k > 1 and self.rule in ("soft", "self"):
            raise ConfigError("method.neighbours.k", got=f"{self.k} with rule {self.rule}", expected="1, since this "
                              "rule chooses among no few", mend="set method.neighbours.k=1, or rule=nearest")

        if self.tau != 0.1 and self.rule != "soft":
            raise ConfigError("method.neighbours.tau", got=f"{self.tau:g} with rule {self.rule}", expected="it with "
                              "the rule soft alone", mend="leave it, or set method.neighbours.rule=soft")
        if self.rule == "self" and (self.both_views or self.replace != "oldest" or self.support != "queue"):
            raise ConfigError("method.neighbours.rule", got="self with options of a support set", expected="these with "
                              "a rule that has one", mend="leave both_views, replace and support, or set rule=nearest")

    def bank(self, targets: tuple[int, ...]) -> BankSpec | None:
        """The support set for a plan with these target views."""
        if self.rule == "self":
            return None
        if self.both_views and len(targets) < 2:
            raise ConfigError("method.neighbours.both_views", got="true with one target view", expected="a symmetric "
                              "loss, whose views are both embedded as targets", mend="set method.symmetric=true")
        anew = self.support == "encoder"
        if anew and (self.both_views or self.replace == "random"):
            raise ConfigError("method.neighbours.support", got="encoder with both_views or replace=random",
                              expected="neither, since nothing of the past is kept",
                              mend="set method.neighbours.both_views=false method.neighbours.replace=oldest")
        return BankSpec(push="anew" if anew else "after", views=targets if self.both_views else targets[:1],
                        replace=self.replace)


@torch.no_grad()
def look_up(target: Emb, ctx: Context, options: NeighbourOptions) -> Tensor:
    """What each row of the target points at, [b, D] of unit length. Where an empty bank has no answer: itself."""
    if options.rule == "self":
        return target.z.detach()
    if options.rule == "soft":
        bank_ND = ctx.bank.everything("key")
        return equations.soft_neighbour(target.z, bank_ND, options.tau) if len(bank_ND) else target.z.detach()
    hits = ctx.bank.nearest(target.z, options.k)
    rows_BKD, valid_BK = hits.rows, hits.valid
    if options.rule == "oracle":
        same = ctx.bank.nearest(target.z, options.k, among=("label", ctx.label_B))
        some_B = same.valid[:, 0]  # valid ones come first
        rows_BKD = torch.where(some_B[:, None, None], same.rows, rows_BKD)
        valid_BK = torch.where(some_B[:, None], same.valid, valid_BK)
    else:
        purity(hits, ctx)
    chosen_BD = rows_BKD[:, 0]
    if options.k > 1:
        choice_B = (ctx.uniform("neighbour", target.view) * valid_BK.sum(1)).long()
        chosen_BD = rows_BKD[torch.arange(len(choice_B), device=choice_B.device), choice_B]
    return torch.where(valid_BK[:, :1], chosen_BD.to(target.z.dtype), target.z)
