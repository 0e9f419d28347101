"""Which views of an image exist, and who must agree with whom."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from hpcssl.errors import ConfigError
from hpcssl.views.augment import IMAGENET_MEAN, IMAGENET_STD, NAMED, Augment


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """Small crops as further queries (multi-crop, SwAV section 3.3): ``number`` of them, 0 for none, of ``size`` pixels
    and ``scale`` shares of the image's area, augmented like the query or by ``augment``. The large views then have
    ``large_scale``."""

    number: int = 0
    size: int = 96
    augment: str = ""
    scale: list[float] = field(default_factory=lambda: [0.05, 0.14])
    large_scale: list[float] = field(default_factory=lambda: [0.14, 1.0])

    def __post_init__(self):
        if self.number < 0 or self.size < 8:
            raise ConfigError("views.crops", got=f"{self.number} crops of {self.size} pixels",
                              expected="0 or more, of 8 pixels or more", mend="set views.crops.number=0 for none")
        for key in ("scale", "large_scale"):
            value = getattr(self, key)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
                raise ConfigError(f"views.crops.{key}", got=value, expected="two rising shares of the area, up to 1",
                                  mend=f"set views.crops.{key}=[0.14,1.0], or another pair")


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Augmentations by name: of the ``query`` view (online network) and the ``target`` view; ``size`` in pixels.

    ``second_query``, ``second_target``: those of the second modality, where a method has one; "" as the first's.
    """

    query: str = "strong"
    target: str = "weak"
    second_query: str = ""
    second_target: str = ""
    size: int = 224
    crops: CropOptions = field(default_factory=CropOptions)
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))

    def pair(self, *, second: bool = False) -> tuple[View, View]:
        """The query's view and the target's, of the images or of their ``second`` modality. Raises ``ConfigError``."""
        for key in ("mean", "std"):
            if len(getattr(self, key)) != 3:
                raise ConfigError(f"views.{key}", got=getattr(self, key),
                                  expected="three numbers, for red, green, blue", mend=f"set views.{key}=[0.5,0.5,0.5]")
        names = [(second and getattr(self, f"second_{key}")) or getattr(self, key) for key in ("query", "target")]
        scale = tuple(self.crops.large_scale) if self.crops.number else None
        made = tuple(View(name, self.size, second, scale) for name in names)
        for key, view in zip(("query", "target"), made, strict=True):
            view.check(f"views.second_{key}" if second else f"views.{key}")
        return made


@dataclass(frozen=True)
class View:
    """One view: the name of its augmentation (``views/augment.py``), its side in pixels, whether it shows the image's
    ``second`` modality, and the share of the area of its crop where that is not the augmentation's own."""

    augment: str
    size: int
    second: bool = False
    scale: tuple[float, float] | None = None

    @property
    def augmentation(self) -> Augment:
        """What is drawn and applied."""
        named = NAMED[self.augment]
        return named if self.scale is None else replace(named, scale=self.scale)

    def check(self, key: str) -> None:
        """Raise ``ConfigError`` for an augmentation of unknown name."""
        if self.augment not in NAMED:
            raise ConfigError(key, got=repr(self.augment), expected="a named augmentation",
                              mend="choose one of " + ", ".join(sorted(NAMED)))


@dataclass(frozen=True)
class Term:
    """The online embedding of view ``query`` must agree with the target embedding of view ``target``.

    ``share`` weighs the term in the loss. Numbers are positions in ``ViewPlan.views``, and past its end in ``mixed``.
    ``role``: a mixed query has two targets, its ``own`` image's with share λ and its ``partner``'s with 1 − λ.
    """

    query: int
    target: int
    share: float = 1.0
    role: Literal["plain", "own", "partner"] = "plain"


@dataclass(frozen=True)
class ViewPlan:
    """The views that are cut from each image, and the terms of the loss between them.

    ``mixed``: views that are made of others by mixing two images (``views/mix.py``); each is given by its source.
    """

    views: tuple[View, ...]
    terms: tuple[Term, ...]
    mixed: tuple[int, ...] = ()

    @property
    def queries(self) -> tuple[int, ...]:
        """Views that the online network sees, ascending."""
        return tuple(sorted({term.query for term in self.terms}))

    @property
    def targets(self) -> tuple[int, ...]:
        """Views that the target network sees, ascending."""
        return tuple(sorted({term.target for term in self.terms}))


def one_way(query: View, target: View) -> ViewPlan:
    """One direction per step: ``query`` follows ``target`` (MSF, MoCo)."""
    return ViewPlan((query, target), (Term(0, 1),))


def both_ways(first: View, second: View, share: float = 1.0) -> ViewPlan:
    """The symmetric loss: each view follows the other (BYOL, SimSiam)."""
    return ViewPlan((first, second), (Term(0, 1, share), Term(1, 0, share)))


def side_by_side(first: ViewPlan, second: ViewPlan) -> ViewPlan:
    """Both plans at once, of views that know nothing of one another (two modalities)."""
    moved = tuple(replace(t, query=t.query + len(first.views), target=t.target + len(first.views))
                  for t in second.terms)
    return ViewPlan(first.views + second.views, first.terms + moved)


def multi_crop(plan: ViewPlan, options: ViewOptions) -> ViewPlan:
    """The plan with small crops as further queries of every target of their modality; the plan itself without any.

    A target's share is divided evenly over all its queries: SwAV averages over the other crops, NNCLR's multi-crop
    variant and CMSF's are read likewise (neither says). Targets stay the large views.
    """
    crops, terms, views = options.crops, [], list(plan.views)
    if not crops.number:
        return plan
    for second in sorted({plan.views[view].second for view in plan.targets}):
        like = next(view for view in plan.views if view.second == second)
        small = View(crops.augment or like.augment, crops.size, second, tuple(crops.scale))
        small.check("views.crops.augment")
        numbers = range(len(views), len(views) + crops.number)
        views += [small] * crops.number
        for target in (view for view in plan.targets if plan.views[view].second == second):
            large = [term for term in plan.terms if term.target == target]
            thinned = len(large) / (len(large) + crops.number)
            terms += [replace(term, share=term.share * thinned) for term in large]
            share = sum(term.share for term in large) / len(large) * thinned
            terms += [Term(number, target, share) for number in numbers]
    return replace(plan, views=tuple(views), terms=tuple(terms))
