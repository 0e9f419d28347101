"""Which views of an image exist, and who must agree with whom."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """One view: the name of its augmentation (``views/augment.py``) and its side in pixels."""

    augment: str
    size: int


@dataclass(frozen=True)
class Term:
    """The online embedding of view ``query`` must agree with the target embedding of view ``target``.

    ``share`` weighs the term in the loss. Numbers are positions in ``ViewPlan.views``.
    """

    query: int
    target: int
    share: float = 1.0


@dataclass(frozen=True)
class ViewPlan:
    """The views that are cut from each image, and the terms of the loss between them."""

    views: tuple[View, ...]
    terms: tuple[Term, ...]

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
