"""View plans: which views are cut from an image, and which pairs of them the loss compares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from hpcssl.errors import ConfigError
from hpcssl.views.augment import AUGMENTATIONS, IMAGENET_MEAN, IMAGENET_STD, Augmentation


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """Small crops as further queries (multi-crop, SwAV section 3.3).

    Attributes:
        count: Number of small crops per image; 0 for none.
        size: Side of a small crop in pixels, 8 or more.
        augment: Name of the small crops' augmentation; empty for that of the query view.
        scale: Smallest and largest area of a small crop, as fractions of the image's area.
        large_scale: Smallest and largest area of the large views' crops, used where ``count`` is not 0.

    Raises:
        ConfigError: If a value is out of its range.
    """

    count: int = 0
    size: int = 96
    augment: str = ""
    scale: list[float] = field(default_factory=lambda: [0.05, 0.14])
    large_scale: list[float] = field(default_factory=lambda: [0.14, 1.0])

    def __post_init__(self) -> None:
        if self.count < 0 or self.size < 8:
            raise ConfigError(
                "views.crops",
                got=f"{self.count} crops of {self.size} pixels",
                expected="0 or more crops, of 8 pixels or more",
                fix="set views.crops.count=0 for none",
            )
        for key in ("scale", "large_scale"):
            value = getattr(self, key)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
                raise ConfigError(
                    f"views.crops.{key}",
                    got=value,
                    expected="two fractions of the area in rising order, up to 1",
                    fix=f"set views.crops.{key}=[0.14,1.0], or another pair",
                )


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """The views of an image and their augmentations, by the names in ``augment.AUGMENTATIONS``.

    Attributes:
        query: Augmentation of the query view, which the online network sees.
        target: Augmentation of the target view.
        second_query: Augmentation of the query view of the second modality, for methods that use one; empty for the
            same as ``query``.
        second_target: Augmentation of the target view of the second modality; empty for the same as ``target``.
        size: Side of the views in pixels.
        crops: Small crops as further queries (multi-crop).
        mean: Mean of the red, green and blue channels on the scale 0-1, subtracted from the images.
        std: Standard deviation of the three channels on the scale 0-1, by which the images are divided.
    """

    query: str = "strong"
    target: str = "weak"
    second_query: str = ""
    second_target: str = ""
    size: int = 224
    crops: CropOptions = field(default_factory=CropOptions)
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))

    def make_views(self, *, second: bool = False) -> tuple[View, View]:
        """Make the query view and the target view.

        Args:
            second: Whether to make the views of the second modality rather than those of the images.

        Raises:
            ConfigError: If an augmentation is unknown, or ``mean`` or ``std`` has not three numbers.
        """
        for key in ("mean", "std"):
            if len(getattr(self, key)) != 3:
                raise ConfigError(
                    f"views.{key}",
                    got=getattr(self, key),
                    expected="three numbers, for red, green and blue",
                    fix=f"set views.{key}=[0.5,0.5,0.5]",
                )
        return self._make_view("query", second), self._make_view("target", second)

    def _make_view(self, role: Literal["query", "target"], second: bool) -> View:
        name = (second and getattr(self, f"second_{role}")) or getattr(self, role)
        low, high = self.crops.large_scale
        view = View(name, self.size, second, (low, high) if self.crops.count else None)
        view.check(f"views.second_{role}" if second else f"views.{role}")
        return view


@dataclass(frozen=True)
class View:
    """One view of an image.

    Attributes:
        augment: Name of the augmentation (``augment.AUGMENTATIONS``).
        size: Side in pixels.
        second: Whether the view shows the image's second modality.
        scale: Smallest and largest area of the crop where they are not the augmentation's own; else None.
    """

    augment: str
    size: int
    second: bool = False
    scale: tuple[float, float] | None = None

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation with this view's own ``scale``."""
        named = AUGMENTATIONS[self.augment]
        return named if self.scale is None else replace(named, scale=self.scale)

    def check(self, key: str) -> None:
        """Raise ``ConfigError`` where the augmentation is unknown. ``key`` is the recipe key to name in the error."""
        if self.augment not in AUGMENTATIONS:
            raise ConfigError(
                key,
                got=repr(self.augment),
                expected="a named augmentation",
                fix="choose one of " + ", ".join(sorted(AUGMENTATIONS)),
            )


Role = Literal["plain", "own", "partner"]


@dataclass(frozen=True)
class Term:
    """One term of the loss: compare the online embedding of one view with the target computed from another.

    Attributes:
        query: Position of the query view in ``ViewPlan.views``; past its end, a position in ``ViewPlan.mixed``.
        target: Position of the target view in ``ViewPlan.views``.
        share: Weight of the term in the loss.
        role: ``plain`` for a query of one image. A mixed query has two targets: that of its ``own`` image, with share
            λ, and that of its ``partner``, with share 1 − λ (``views/mix.py``).
    """

    query: int
    target: int
    share: float = 1.0
    role: Role = "plain"


@dataclass(frozen=True)
class ViewPlan:
    """The views that are cut from each image, and the terms of the loss between them.

    Attributes:
        views: The views to cut.
        terms: The terms of the loss.
        mixed: Views that are made by mixing two images (``views/mix.py``); each entry is the position of the view that
            it is made from.
    """

    views: tuple[View, ...]
    terms: tuple[Term, ...]
    mixed: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[int, ...]:
        """For each view that a network sees, the position of the view to cut: its own, or that a mixed view is of."""
        return (*range(len(self.views)), *self.mixed)

    @property
    def queries(self) -> tuple[int, ...]:
        """Positions of the views that the online network sees, ascending."""
        return tuple(sorted({term.query for term in self.terms}))

    @property
    def targets(self) -> tuple[int, ...]:
        """Positions of the views that the target network sees, ascending."""
        return tuple(sorted({term.target for term in self.terms}))

    def online_views(self, *, has_target_encoder: bool) -> tuple[int, ...]:
        """Return the positions of the views that the online encoder embeds with gradients, ascending.

        Args:
            has_target_encoder: Whether targets come from an encoder of their own. Else they come from the online one.
        """
        return self.queries if has_target_encoder else tuple(sorted({*self.queries, *self.targets}))


def one_way_plan(query: View, target: View) -> ViewPlan:
    """Make a plan with one term per image: ``query`` is trained toward ``target`` (MSF, MoCo)."""
    return ViewPlan((query, target), (Term(0, 1),))


def symmetric_plan(first: View, second: View, share: float = 1.0) -> ViewPlan:
    """Make a plan in which each of two views is trained toward the other (BYOL, SimSiam).

    Args:
        first: One view.
        second: The other view.
        share: Weight of each of the two terms.
    """
    return ViewPlan((first, second), (Term(0, 1, share), Term(1, 0, share)))


def join_plans(first: ViewPlan, second: ViewPlan) -> ViewPlan:
    """Make a plan of the views and terms of two plans, such as those of two modalities, without terms between them."""
    offset = len(first.views)
    terms = tuple(replace(term, query=term.query + offset, target=term.target + offset) for term in second.terms)
    return ViewPlan(first.views + second.views, first.terms + terms)


def add_small_crops(plan: ViewPlan, options: ViewOptions) -> ViewPlan:
    """Add small crops as further queries of every target of their modality (multi-crop).

    A target's share is divided evenly among all its queries. SwAV averages over the other crops; NNCLR and CMSF do not
    state it, and are read likewise. The targets stay the large views.

    Args:
        plan: A plan without small crops.
        options: The views' options, of which ``crops`` is used.

    Returns:
        The extended plan; ``plan`` itself where ``options.crops.count`` is 0.

    Raises:
        ConfigError: If ``options.crops.augment`` is unknown.
    """
    crops, views = options.crops, list(plan.views)
    if not crops.count:
        return plan
    terms: list[Term] = []
    low, high = crops.scale
    for second in sorted({plan.views[view].second for view in plan.targets}):
        like = next(view for view in plan.views if view.second == second)
        small = View(crops.augment or like.augment, crops.size, second, (low, high))
        small.check("views.crops.augment")
        numbers = range(len(views), len(views) + crops.count)
        views += [small] * crops.count
        for target in (view for view in plan.targets if plan.views[view].second == second):
            large = [term for term in plan.terms if term.target == target]
            factor = len(large) / (len(large) + crops.count)
            terms += [replace(term, share=term.share * factor) for term in large]
            share = sum(term.share for term in large) / len(large) * factor
            terms += [Term(number, target, share) for number in numbers]
    return replace(plan, views=tuple(views), terms=tuple(terms))
