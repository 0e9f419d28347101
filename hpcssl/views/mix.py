"""Mixtures of two images as queries: BSIM and WBSIM (Chu et al., "BSIM"), as a rewrite of any plan.

    x_ij = λ-mixture of x_i and x_j,    λ ~ Beta(α, α)
    L_BSIM = λ · L(x_ij → target of i) + (1 − λ) · L(x_ij → target of j)                      (eq. 2-4)
    L_WBSIM = L + w · L_BSIM

Each term of a plan becomes *own* (share λ) and *partner* (share 1 − λ), whose query is the mixed view; targets stay
clean. ``cutmix`` pastes a box of the partner (Yun et al. 2019; λ is the area that is left of image i after the box was
clipped), ``mixup`` adds the pixels. Views are augmented first and mixed afterwards.

The paper leaves open which two images are mixed. ``neighbours`` in the batch swap places (2m with 2m + 1), an
involution like a ``flip`` of the batch (m with N − 1 − m): since the order of samples is random they pair as randomly,
and the mixtures that share an image are exactly two. Neighbours never stand on two ranks, so that nothing is sent; the
flip and CutMix's own random ``permutation`` (where an image may be mixed with itself) gather every image of the global
batch on every rank. Any world size mixes the same images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.errors import ConfigError, nearest
from hpcssl.views.plan import Term, ViewPlan
from hpcssl.world import World

KINDS, LOSSES = ("none", "cutmix", "mixup"), ("bsim", "wbsim", "augment")
PAIRINGS = ("neighbours", "flip", "permutation")


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """``kind`` none, cutmix or mixup. ``loss``: ``bsim``; ``wbsim`` keeps the plain terms and adds ``weight`` times the
    mixed ones; ``augment`` mixes the query and asks for image i alone (the control of the paper's Table 1).
    ``alpha`` of the Beta distribution: the paper's main tables do not state it; 1 is named in its Tables 2-3.
    ``pairing``: who is mixed with whom.
    """

    kind: str = "none"
    loss: str = "bsim"
    pairing: str = "neighbours"
    alpha: float = 1.0
    weight: float = 1.0

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("loss", LOSSES), ("pairing", PAIRINGS)):
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


def apply(images: Tensor, mixture: Mixture, partners: Tensor) -> Tensor:
    """Each image of [b, 3, S, S] mixed with its partner's."""
    if mixture.box is None:
        return torch.lerp(partners, images, mixture.lam)
    top, bottom, left, right = mixture.box
    made = images.clone()
    made[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return made


@dataclass(frozen=True)
class Pairs:
    """Who is mixed with whom in one step. ``order`` [N] int64: for each row of the global batch its partner's, or None
    for neighbours, 1, 0, 3, 2, … for 0, 1, 2, 3, …; then b is even, on every rank and in every micro-batch."""

    world: World
    order: Tensor | None = None

    @classmethod
    def draw(cls, options: MixOptions, key: int, batch: int, world: World) -> Pairs:
        if options.pairing == "neighbours":
            return cls(world)
        flip = options.pairing == "flip"
        order = torch.arange(batch).flip(0) if flip else torch.from_numpy(rng.permutation(key, batch))
        return cls(world, order.to(world.device))

    def partners(self, images: Tensor) -> Tensor:
        """The images that this rank's [b, …] are mixed with."""
        if self.order is None:
            return images[torch.arange(len(images), device=images.device) ^ 1]
        return self.world.shuffle(images, self.order)

    def to_partner(self, x: Tensor) -> Tensor:
        """What was made of the mixtures, [b, …] in the order of their own images, in the order of their partners: row j
        belongs to the mixture whose partner is image j. With gradient."""
        if self.order is None:
            return x[torch.arange(len(x), device=x.device) ^ 1]
        return self.world.gather_grad(x)[self.world.part(torch.argsort(self.order))]

    def kin(self, row_B: Tensor) -> Tensor:
        """[b, M] int64: of the rows ``row_B`` of the global batch, those whose mixtures show one of the same images,
        themselves included. The same in either order of ``to_partner``."""
        if self.order is None:
            return torch.stack((row_B, row_B ^ 1), 1)
        return torch.stack((row_B, self.order[row_B], torch.argsort(self.order)[row_B]), 1)
