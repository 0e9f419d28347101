"""Mixtures of two images as queries, for any method: BSIM and WBSIM (Chu et al., "BSIM").

    x_ij = λ-mixture of x_i and x_j,    λ ~ Beta(α, α)
    L_BSIM = λ · L(x_ij → target of i) + (1 − λ) · L(x_ij → target of j)                      (eq. 2-4)
    L_WBSIM = L + w · L_BSIM

Each term of a view plan becomes two: *own* (share λ) and *partner* (share 1 − λ), whose query is the mixed view. The
targets stay unmixed. ``cutmix`` pastes a box of the partner (Yun et al. 2019); λ is the area of image i that remains
after the box was clipped. ``mixup`` blends the pixels. Views are augmented first and mixed afterwards. Eq. 2 has one λ
for the losses of both views, which then share the box as well, since λ depends on where it was clipped.

The paper does not state which two images are mixed. There are three choices:

* ``adjacent`` images of the batch swap places (2m with 2m + 1). Since the order of samples is random, the pairs are
  random too, and exactly two mixtures share an image. Adjacent images never lie on two ranks, so that nothing is sent.
* ``flip`` pairs image m with N − 1 − m of the global batch.
* ``permutation`` is CutMix's own choice. An image may be mixed with itself.

The last two gather every image of the global batch on every rank, and need the whole batch in one pass (no gradient
accumulation). Any number of processes mixes the same images.

Letters in shapes: N rows of the global batch, b rows of this rank, S pixels per side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.distributed.devices import to_device
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, suggest
from hpcssl.views.plan import Role, Term, ViewPlan

KINDS, LOSSES = ("none", "cutmix", "mixup"), ("bsim", "wbsim", "augment")
PAIRINGS = ("adjacent", "flip", "permutation")
LAMBDA_SCOPES = ("step", "view")


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """Whether and how the queries of two images are mixed.

    Attributes:
        kind: ``none`` for no mixing, ``cutmix`` or ``mixup``.
        loss: ``bsim`` replaces the plain terms of the loss by the mixed ones. ``wbsim`` keeps the plain terms and adds
            the mixed ones. ``augment`` mixes the query but keeps image i as its only target (the control in the
            paper's Table 1).
        pairing: Which images are mixed: ``adjacent``, ``flip`` or ``permutation``.
        lambda_scope: Which mixed views share λ and the box: all those of a ``step``, as in eq. 2, or none (``view``).
        alpha: Parameter of the Beta distribution of λ, above 0. The paper's main tables do not state it; its Tables 2-3
            name 1.
        weight: Weight of the mixed terms of ``wbsim``, above 0.

    Raises:
        ConfigError: If a value is unknown or out of its range.
    """

    kind: str = "none"
    loss: str = "bsim"
    pairing: str = "adjacent"
    lambda_scope: str = "step"
    alpha: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("loss", LOSSES), ("pairing", PAIRINGS), ("lambda_scope", LAMBDA_SCOPES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"mix.{name}", got=repr(value), expected=" or ".join(known), fix=suggest(str(value), known)
                )
        for name in ("alpha", "weight"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"mix.{name}", got=value, expected="a number above 0", fix=f"set mix.{name}=1")


def add_mixed_views(plan: ViewPlan, options: MixOptions) -> ViewPlan:
    """Add mixed views to a plan, and terms of the loss whose queries they are.

    Args:
        plan: A plan without mixed views.
        options: How to mix.

    Returns:
        The new plan; ``plan`` itself for ``kind="none"``.
    """
    if options.kind == "none":
        return plan
    sources = plan.queries
    mixed = {view: len(plan.views) + place for place, view in enumerate(sources)}
    weight = options.weight if options.loss == "wbsim" else 1.0
    roles: tuple[Role, ...] = ("plain",) if options.loss == "augment" else ("own", "partner")
    terms = tuple(Term(mixed[t.query], t.target, t.share * weight, role) for t in plan.terms for role in roles)
    return replace(plan, terms=plan.terms * (options.loss == "wbsim") + terms, mixed=sources)


@dataclass(frozen=True)
class Mixture:
    """How the images of one mixed view are mixed in one step, the same for the whole batch.

    Attributes:
        lam: λ, the share of an image's own pixels.
        box: Top, bottom, left and right, in pixels, of the box that the partner fills; None for mixup. The bottom row
            and the right column are outside of the box.
    """

    lam: float
    box: tuple[int, int, int, int] | None


def draw_mixture(options: MixOptions, key: int, size: int) -> Mixture:
    """Draw λ and the box for a whole batch, as CutMix's code does.

    Args:
        options: How to mix.
        key: Random key. Views of one size with the same key have the same λ and box.
        size: Side of the view in pixels.
    """
    from scipy.special import betaincinv  # scikit-learn depends on scipy

    u, y, x = rng.uniform(key, 3)
    lam = float(betaincinv(options.alpha, options.alpha, u))
    if options.kind == "mixup":
        return Mixture(lam, None)
    half = size * math.sqrt(1 - lam) / 2
    top, bottom, left, right = (
        min(max(round(center * size + side), 0), size) for center in (y, x) for side in (-half, half)
    )
    return Mixture(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def mix_images(images: Tensor, mixture: Mixture, partners: Tensor) -> Tensor:
    """Mix each image with its partner.

    Args:
        images: [b, 3, S, S].
        mixture: How to mix them.
        partners: [b, 3, S, S], the partner of each image.

    Returns:
        [b, 3, S, S], in new memory.
    """
    if mixture.box is None:
        return torch.lerp(partners, images, mixture.lam)
    top, bottom, left, right = mixture.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return mixed


@dataclass(frozen=True)
class MixPairing:
    """Which images are mixed with each other in one step.

    Attributes:
        world: The processes that train together.
        order: int64 [N]; for each row of the global batch, the row of its partner. None for adjacent pairs, where rows
            0, 1, 2, 3, … have the partners 1, 0, 3, 2, …; b is then even on every rank and in every micro-batch.
    """

    world: World
    order: Tensor | None = None

    @classmethod
    def draw(cls, options: MixOptions, key: int, batch: int, world: World) -> MixPairing:
        """Draw the pairs of one step.

        Args:
            options: How to mix; ``pairing`` is used.
            key: Random key of the step.
            batch: N, rows of the global batch.
            world: The processes that train together.
        """
        if options.pairing == "adjacent":
            return cls(world)
        flip = options.pairing == "flip"
        order = np.arange(batch)[::-1].copy() if flip else rng.permutation(key, batch)
        return cls(world, to_device(order, world.device))

    def partner_images(self, images: Tensor) -> Tensor:
        """The partners of this rank's images, [b, …] like ``images``. A collective unless pairs are adjacent."""
        if self.order is None:
            return images[torch.arange(len(images), device=images.device) ^ 1]
        return self.world.shuffle(images, self.order)

    def to_partner_order(self, x: Tensor) -> Tensor:
        """Bring results of the mixtures into the order of their partners, with gradient.

        A collective unless pairs are adjacent.

        Args:
            x: [b, …], computed from the mixtures, in the order of their own images.

        Returns:
            [b, …], whose row j belongs to the mixture whose partner is image j.
        """
        if self.order is None:
            return x[torch.arange(len(x), device=x.device) ^ 1]
        return self.world.all_gather_with_grad(x)[self.world.local_rows(torch.argsort(self.order))]

    def same_image_rows(self, row_B: Tensor) -> Tensor:
        """Rows of the global batch whose mixtures contain one of the same images, each row itself included.

        Args:
            row_B: int64 [b], rows of the global batch.

        Returns:
            int64 [b, M], M rows per row. The same in the order of ``to_partner_order``.
        """
        if self.order is None:
            return torch.stack((row_B, row_B ^ 1), 1)
        return torch.stack((row_B, self.order[row_B], torch.argsort(self.order)[row_B]), 1)
