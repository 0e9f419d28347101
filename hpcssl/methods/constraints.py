"""The options of CMSF: which rule says who may be a neighbour."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from hpcssl.errors import ConfigError, nearest
from hpcssl.memory.pseudo import PseudoOptions
from hpcssl.methods import rules
from hpcssl.methods.modalities import Modalities
from hpcssl.methods.pseudo import Pseudo
from hpcssl.optim.schedule import EmaOptions

Rule = rules.Labels | rules.Clusters | rules.Twins | Modalities | Pseudo
RULES = ("twin", "kmeans", "label", "pseudo", "modality")
_OF_RULES = {"twins": ("twin", "modality"), "clusters": ("kmeans",), "iterations": ("kmeans",), "pseudo": ("pseudo",)}


@dataclass(frozen=True, kw_only=True)
class CmsfOptions:
    """``rule``: what constrains the neighbours. ``k`` of them, or with ``every`` all that are allowed ("top-all").
    ``twins``: k' of 2Q. ``clusters`` of k-means (0: one per 25.6 images) after ``iterations`` of Lloyd's.
    ``pseudo``: how classes are guessed. ``legacy_fill``: as the official code, take forbidden rows where fewer than k
    are allowed (those of the lowest slots; which ones a top-k takes among equals is the library's own affair)."""

    name: str = "cmsf"
    rule: str = "twin"
    k: int = 5
    every: bool = False
    twins: int = 5
    clusters: int = 0
    iterations: int = 20
    legacy_fill: bool = False
    pseudo: PseudoOptions = field(default_factory=PseudoOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)

    def __post_init__(self):
        twin = self.rule in ("twin", "modality")
        for key, wrong, expected, mend in (
                ("rule", self.rule not in RULES, "one of " + ", ".join(RULES), nearest(str(self.rule), RULES)),
                ("k", self.k < 1, "1 or more neighbours", "set method.k=5"),
                ("twins", twin and self.twins < self.k, "at least method.k", f"set method.twins={self.k}"),
                ("clusters", self.clusters < 0, "0 or more", "set method.clusters=0 for one per 25.6 images"),
                ("iterations", self.iterations < 1, "1 or more", "set method.iterations=20"),
                ("every", twin and self.every, "false, since k' is what this rule allows", "set method.every=false"),
                ("legacy_fill", self.legacy_fill and (twin or self.every), "false where nothing can be too few",
                 "set method.legacy_fill=false")):
            if wrong:
                raise ConfigError(f"method.{key}", got=repr(getattr(self, key)), expected=expected, mend=mend)
        usual = {field.name: field.default for field in fields(self)} | {"pseudo": PseudoOptions()}
        for key, rules_of in _OF_RULES.items():
            if self.rule not in rules_of and getattr(self, key) != usual[key]:
                raise ConfigError(f"method.{key}", got=f"{getattr(self, key)} with rule {self.rule}", expected="it with"
                                  f" {' or '.join(rules_of)} alone", mend=f"leave method.{key}, or set method.rule")

    def made(self) -> Rule:
        if self.rule == "twin":
            return rules.Twins(self.k, self.twins)
        if self.rule == "modality":
            return Modalities(self.k, self.twins)
        if self.rule == "pseudo":
            return Pseudo(self.k, self.every, self.legacy_fill, self.pseudo)
        if self.rule == "kmeans":
            return rules.Clusters(self.k, self.every, self.legacy_fill, self.clusters, self.iterations)
        return rules.Labels(self.k, self.every, self.legacy_fill)
