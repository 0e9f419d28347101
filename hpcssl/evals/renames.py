"""Former names of evaluation options, which are refused with their current names."""

from __future__ import annotations

from hpcssl.config import Renames

_FEATURE_OPTIONS = {"batch": "forward_batch", "store": "feature_dtype"}

_OPTIONS: dict[str, dict[str, str]] = {
    "knn": _FEATURE_OPTIONS | {"tau": "temperature", "one_label": "one_label_draws"},
    "linear": _FEATURE_OPTIONS | {"sweep": "lr_sweep"},
    "finetune": {"batch": "forward_batch"},
    "svm": _FEATURE_OPTIONS,
    "lowshot": _FEATURE_OPTIONS | {"k": "shots"},
    "transfer": _FEATURE_OPTIONS,
    "detect": {
        "warmup": "warmup_iterations",
        "sizes": "train_sizes",
        "anchors": "anchor_sizes",
        "regions": "regions_per_image",
        "precise_bn": "precise_bn_batches",
    },
}

SECTION_RENAMES = Renames(
    keys={
        "every_epochs": "knn_every_epochs",
        **{f"{name}.{old}": f"{name}.{new}" for name, keys in _OPTIONS.items() for old, new in keys.items()},
    }
)
"""For the ``evals`` section of a recipe."""

OPTION_RENAMES = {name: Renames(keys=keys) for name, keys in _OPTIONS.items()}
"""For the options of one evaluation, by its name."""
