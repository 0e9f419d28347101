"""The options of CMSF."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from hpcssl.errors import ConfigError, require_choice
from hpcssl.methods.cmsf.pseudo_labels import PseudoLabelOptions
from hpcssl.optim.schedule import EmaOptions

RULES = ("two_queues", "kmeans", "supervised", "semi_supervised", "cross_modal")
LABELED_RULES = ("supervised", "semi_supervised")
"""Those that train with labels: the allowed rows are those of the query's class."""
_ONLY_WITH_RULES = {
    "k_constraint": ("two_queues", "cross_modal"),
    "num_clusters": ("kmeans",),
    "kmeans_iterations": ("kmeans",),
    "pseudo_labels": ("semi_supervised",),
}


@dataclass(frozen=True, kw_only=True)
class CmsfOptions:
    """Options of CMSF.

    Attributes:
        name: ``cmsf``, the name of the method.
        rule: which bank rows may be neighbors of a query: ``two_queues`` (2Q), ``kmeans`` (KM), ``supervised`` (sup),
            ``semi_supervised`` (semi) or ``cross_modal``.
        k: number of neighbors, 1 or more.
        all_allowed: true: the mean of all allowed rows takes the place of the k nearest ("top-all"). Not with
            ``two_queues`` and ``cross_modal``.
        k_constraint: k' of 2Q, the number of rows that the second queue or the other modality allows; at least ``k``.
            Only with ``two_queues`` and ``cross_modal``.
        num_clusters: number of clusters of k-means; 0 means one per 25.6 images. Only with ``kmeans``.
        kmeans_iterations: Lloyd's iterations of k-means, 1 or more. Only with ``kmeans``.
        legacy_fill: true: as the official code, take forbidden rows where fewer than k are allowed. They come from the
            lowest slots; which of equal rows a top-k takes depends on the library. Not with ``two_queues``,
            ``cross_modal`` or ``all_allowed``, where there are always enough.
        pseudo_labels: how classes are predicted. Only with ``semi_supervised``.
        ema: momentum of the target network.
    """

    name: str = "cmsf"
    rule: str = "two_queues"
    k: int = 5
    all_allowed: bool = False
    k_constraint: int = 5
    num_clusters: int = 0
    kmeans_iterations: int = 20
    legacy_fill: bool = False
    pseudo_labels: PseudoLabelOptions = field(default_factory=PseudoLabelOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)

    def __post_init__(self) -> None:
        require_choice("method.rule", self.rule, RULES)
        by_similarity = self.rule in ("two_queues", "cross_modal")
        for key, wrong, expected, fix in (
            ("k", self.k < 1, "1 or more neighbors", "set method.k=5"),
            (
                "k_constraint",
                by_similarity and self.k_constraint < self.k,
                "at least method.k",
                f"set method.k_constraint={self.k}",
            ),
            ("num_clusters", self.num_clusters < 0, "0 or more", "set method.num_clusters=0 for one per 25.6 images"),
            ("kmeans_iterations", self.kmeans_iterations < 1, "1 or more", "set method.kmeans_iterations=20"),
            (
                "all_allowed",
                by_similarity and self.all_allowed,
                "false, since this rule allows k_constraint rows",
                "set method.all_allowed=false",
            ),
            (
                "legacy_fill",
                self.legacy_fill and (by_similarity or self.all_allowed),
                "false where there are always enough rows",
                "set method.legacy_fill=false",
            ),
        ):
            if wrong:
                raise ConfigError(f"method.{key}", got=repr(getattr(self, key)), expected=expected, fix=fix)
        self._check_rule_keys()

    def _check_rule_keys(self) -> None:
        """Refuse a key that the rule does not read."""
        defaults = {field.name: field.default for field in fields(self)} | {"pseudo_labels": PseudoLabelOptions()}
        for key, rules in _ONLY_WITH_RULES.items():
            if self.rule not in rules and getattr(self, key) != defaults[key]:
                raise ConfigError(
                    f"method.{key}",
                    got=f"{getattr(self, key)} with rule {self.rule}",
                    expected=f"no value with any rule but {' and '.join(rules)}",
                    fix=f"remove method.{key}, or set method.rule={rules[0]}",
                )
