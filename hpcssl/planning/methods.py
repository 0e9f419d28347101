"""The methods for which ``hpcssl init`` writes recipes, and the packaged recipes that it starts from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from hpcssl.errors import ConfigError, DataError, suggest
from hpcssl.planning.data_summary import DataSummary


@dataclass(frozen=True)
class MethodChoice:
    """One method, as ``--method`` names it.

    Attributes:
        title: Name of the method in titles.
        small: Packaged recipe for small images.
        photos: Packaged recipe for photographs.
        photos_method: Section ``method`` that replaces the one of ``photos``; empty to keep that.
        mix: Section ``mix``; empty for none.
        needs: ``labels``, ``second modality``, or empty where plain images suffice.
    """

    title: str
    small: str
    photos: str
    photos_method: dict[str, Any] = field(default_factory=dict)
    mix: dict[str, Any] = field(default_factory=dict)
    needs: str = ""


def _cmsf(title: str, name: str, needs: str = "", **options: Any) -> MethodChoice:
    method = {"name": "cmsf", **options, "ema": {"momentum": 0.99}}
    return MethodChoice(title, f"cifar10_{name}", "imagenette_msf", method, needs=needs)


_PLAIN = {
    "byol": "BYOL",
    "moco_v2": "MoCo v2",
    "msf": "MSF",
    "nnclr": "NNCLR",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
    "swav": "SwAV",
}
METHODS: dict[str, MethodChoice] = {
    name: MethodChoice(title, f"cifar10_{name}", f"imagenette_{name}") for name, title in _PLAIN.items()
} | {
    "nnsiam": MethodChoice(
        "NNSiam", "cifar10_nnsiam", "imagenette_simsiam", {"name": "nnsiam", "fix_predictor_lr": False}
    ),
    "cmsf_2q": _cmsf("CMSF-2Q", "cmsf_2q", rule="two_queues", k=5, k_constraint=5),
    "cmsf_km": _cmsf("CMSF-KM", "cmsf_km", rule="kmeans", k=5),
    "cmsf_cross": _cmsf("Cross-modal CMSF", "cmsf_cross", "second modality", rule="cross_modal", k=5, k_constraint=10),
    "cmsf_sup": _cmsf("CMSF-sup", "cmsf_sup", "labels", rule="supervised", k=10),
    "cmsf_semi": _cmsf(
        "CMSF-semi",
        "cmsf_semi",
        "labels",
        rule="semi_supervised",
        k=10,
        pseudo_labels={"labeled_fraction": 0.1, "hidden": 256},
    ),
}
METHODS |= {
    f"{name}_{loss}": replace(
        METHODS[name],
        title=f"{METHODS[name].title}-{loss.upper()}",
        mix={"kind": "cutmix", "loss": loss, "alpha": 1.0},
    )
    for name in ("byol", "moco_v2", "simclr", "simsiam")
    for loss in ("bsim", "wbsim")
}
"""The values of ``--method``."""


def find_method(name: str) -> MethodChoice:
    """Return the method of a name; capitals, dashes and underscores do not matter.

    Raises:
        ConfigError: There is no such method.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    for known, choice in METHODS.items():
        if plain(known) == plain(name):
            return choice
    raise ConfigError(
        "--method",
        got=repr(name),
        expected="the name of a method",
        fix=suggest(name, METHODS),
    )


def check_method(choice: MethodChoice, data: DataSummary) -> None:
    """Check that the data have what a method needs.

    Raises:
        DataError: The method needs labels or a second modality, and the training images have none.
    """
    if choice.needs == "labels" and data.labeled == 0:
        raise DataError(
            f"shard folder {data.train.root}",
            got="images without labels",
            expected=f"labels, which {choice.title} learns from",
            fix="choose a method that needs none, such as --method msf or --method cmsf_2q, or write the shards again "
            "with --labels FILE or --classes-from folders",
        )
    if choice.needs == "labels" and data.train.targets is not None:
        raise DataError(
            f"shard folder {data.train.root}",
            got="several labels per image",
            expected=f"one label per image, which {choice.title} learns from",
            fix="choose a method that needs none, such as --method msf or --method cmsf_2q",
        )
    if choice.needs == "second modality" and not data.train.has_second:
        raise DataError(
            f"shard folder {data.train.root}",
            got="images without a second modality",
            expected=f"a second image of each sample, which {choice.title} learns from",
            fix="choose another method, such as --method cmsf_2q, or write the shards again with "
            "--second-modality edges",
        )
