"""Which views of an image exist, and who must agree with whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hpcssl.errors import ConfigError
from hpcssl.views.augment import IMAGENET_MEAN, IMAGENET_STD, NAMED


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Augmentations by name: of the ``query`` view (online network) and the ``target`` view; ``size`` in pixels."""

    query: str = "strong"
    target: str = "weak"
    size: int = 224
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))

    def pair(self) -> tuple[View, View]:
        """The query's view and the target's. Raises ``ConfigError`` for an augmentation of unknown name."""
        for key in ("query", "target"):
            if getattr(self, key) not in NAMED:
                raise ConfigError(f"views.{key}", got=repr(getattr(self, key)), expected="a named augmentation",
                                  mend="choose one of " + ", ".join(sorted(NAMED)))
        for key in ("mean", "std"):
            if len(getattr(self, key)) != 3:
                raise ConfigError(f"views.{key}", got=getattr(self, key),
                                  expected="three numbers, for red, green, blue", mend=f"set views.{key}=[0.5,0.5,0.5]")
        return View(self.query, self.size), View(self.target, self.size)


@dataclass(frozen=True)
class View:
    """One view: the name of its augmentation (``views/augment.py``) and its side in pixels."""

    augment: str
    size: int


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
