"""Mixtures of two images as queries: BSIM and WBSIM (Chu et al., "BSIM"), as a rewrite of any plan.

    x_ij = λ-mixture of x_i and x_j,    λ ~ Beta(α, α)
    L_BSIM = λ · L(x_ij → target of i) + (1 − λ) · L(x_ij → target of j)                      (eq. 2-4)
    L_WBSIM = L + w · L_BSIM

Each term of a plan becomes *own* (share λ) and *partner* (share 1 − λ), whose query is the mixed view; targets stay
clean. ``cutmix`` pastes a box of the partner (Yun et al. 2019; λ is the area that is left of image i after the box was
clipped), ``mixup`` adds the pixels. Views are augmented first and mixed afterwards.

The paper leaves open which two images are mixed. Here neighbours in the batch swap places (2m with 2m + 1), an
involution like a flip of the batch: since the order of samples is random it pairs as randomly, the mixtures that share
an image are exactly two, and no pair crosses a rank or a micro-batch, so that any world size mixes the same images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.errors import ConfigError, nearest
from hpcssl.views.plan import Term, ViewPlan

KINDS, LOSSES = ("none", "cutmix", "mixup"), ("bsim", "wbsim", "augment")


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """``kind`` none, cutmix or mixup. ``loss``: ``bsim``; ``wbsim`` keeps the plain terms and adds ``weight`` times the
    mixed ones; ``augment`` mixes the query and asks for image i alone (the control of the paper's Table 1).
    ``alpha`` of the Beta distribution: the paper's main tables do not state it; 1 is named in its Tables 2-3.
    """

    kind: str = "none"
    loss: str = "bsim"
    alpha: float = 1.0
    weight: float = 1.0

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"mix.{name}", got=repr(getattr(self, name)), expected=" or ".join(known),
                                  mend=nearest(str(getattr(self, name)), known))
        for name in ("alpha", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"mix.{name}", got=getattr(self, name), expected="a number above 0",
                                  mend=f"set mix.{name}=1")


def rewrite(plan: ViewPlan, options: MixOptions) -> ViewPlan:
    """The plan with mixed queries; the plan itself for ``kind="none"``."""
    if options.kind == "none":
        return plan
    sources = plan.queries
    mixed = {view: len(plan.views) + place for place, view in enumerate(sources)}
    weight = options.weight if options.loss == "wbsim" else 1.0
    roles = ("plain",) if options.loss == "augment" else ("own", "partner")
    terms = tuple(Term(mixed[t.query], t.target, t.share * weight, role) for t in plan.terms for role in roles)
    return replace(plan, terms=plan.terms * (options.loss == "wbsim") + terms, mixed=sources)


@dataclass(frozen=True)
class Mixture:
    """λ of one mixed view of one step, and the box [top, bottom, left, right) that the partner fills (cutmix)."""

    lam: float
    box: tuple[int, int, int, int] | None


def draw(options: MixOptions, key: int, size: int) -> Mixture:
    """λ and box at an address, the same for the whole batch: eq. 2 has one λ, and CutMix's code one box."""
    from scipy.special import betaincinv  # scikit-learn brings it

    u, y, x = rng.uniform(key, 3)
    lam = float(betaincinv(options.alpha, options.alpha, u))
    if options.kind == "mixup":
        return Mixture(lam, None)
    half = size * math.sqrt(1 - lam) / 2
    top, bottom, left, right = (min(max(round(center * size + side), 0), size)
                                for center in (y, x) for side in (-half, half))
    return Mixture(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def apply(images: Tensor, mixture: Mixture) -> Tensor:
    """Each image of [b, 3, S, S] mixed with its neighbour's. b is even."""
    partner = images[partner_of(torch.arange(len(images), device=images.device))]
    if mixture.box is None:
        return torch.lerp(partner, images, mixture.lam)
    top, bottom, left, right = mixture.box
    made = images.clone()
    made[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    return made


def partner_of(pos_B: Tensor) -> Tensor:
    """Whose image the rows at these positions are mixed with: 1, 0, 3, 2, … for 0, 1, 2, 3, … int64 [b]."""
    return pos_B ^ 1
