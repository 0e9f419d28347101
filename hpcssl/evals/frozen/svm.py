"""Linear SVMs on frozen features, one class against the rest, scored by mean average precision (VOC 2007).

``svm`` trains on all training images; the cost of each class is chosen by three-fold cross-validation. ``lowshot.py``
trains on a few images. Both take images of several classes (``ShardSet.targets``) as well as of one.

Features are the map of the last stage, averaged to 2 × 2 (``feature_maps.py``), of the whole image squashed into the
square; for images up to 64 pixels the view is the whole image.
Sources: see ``linear_svc.py`` and ``PROTOCOLS``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, EvalError, require_choice
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.context import EvalContext
from hpcssl.evals.frozen import feature_maps, linear_svc
from hpcssl.nets.weights import WHOLE_IMAGE_MAX_SIZE


@dataclass(frozen=True, kw_only=True)
class SvmProtocol:
    """One published protocol.

    Attributes:
        costs: Costs C to choose among.
        view: Crop of the images.
        view_lowshot: Crop of the images in the low-shot evaluation.
        feature: Feature, one of ``feature_maps.NAMES``.
        ap: Definition of average precision, see ``metrics.average_precision``.
    """

    costs: tuple[float, ...]
    view: str = "eval_squash"
    view_lowshot: str = "eval_squash"
    feature: str = "res5"
    ap: str = "area"


PROTOCOLS = {
    # OpenSelfSup, and with it BSIM: benchmarks/svm_tools/eval_svm_full.sh, svm_helper.py ``parse_cost_list``
    "oss": SvmProtocol(costs=(1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))),
    # VISSL: configs/config/benchmark/{linear_image_classification,low_shot_transfer}/voc07/eval_resnet_8gpu_*
    "vissl": SvmProtocol(
        costs=(0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0), view_lowshot="eval_squash_once"
    ),
}


@dataclass(frozen=True, kw_only=True)
class SvmOptions(FeatureOptions):
    """Options of the SVM evaluation. ``costs``, ``feature`` and ``ap`` replace the protocol's values where set.

    Attributes:
        view: Crop of the images; ``auto`` for the protocol's.
        interpolation: Filter of the resize, see ``EvalViewOptions``.
        forward_batch: Images per forward pass, see ``EvalViewOptions``.
        precision: Precision of the forward pass, see ``FeatureOptions``.
        feature_dtype: Precision of stored features, see ``FeatureOptions``.
        protocol: Name of a published protocol, a key of ``PROTOCOLS``.
        costs: Costs C to choose among, each above 0.
        feature: Feature: ``res2`` to ``res5`` for the map of a stage, ``pooled`` for the usual pooled feature.
        ap: Definition of average precision: ``area`` under the curve, or ``voc11`` for eleven points.
        seed: Seed of liblinear's order, and of low-shot samples.
    """

    protocol: str = "oss"
    costs: list[float] | None = None
    feature: str | None = None
    ap: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        super().__post_init__()
        require_choice("evaluation option protocol", self.protocol, PROTOCOLS)
        require_choice("evaluation option feature", self.feature or "res5", feature_maps.NAMES)
        require_choice("evaluation option ap", self.ap or "area", ("area", "voc11"))
        if self.costs is not None and not (self.costs and min(self.costs) > 0):
            raise ConfigError(
                "evaluation option costs",
                got=self.costs,
                expected="costs above 0",
                fix="set costs=[1,10,100], or remove it to use the protocol's value",
            )

    def resolve(self) -> SvmProtocol:
        """Return the protocol with the options that are set in place of its values."""
        values: dict[str, Any] = {
            "costs": self.costs and tuple(self.costs),
            "feature": self.feature,
            "ap": self.ap,
        }
        return replace(PROTOCOLS[self.protocol], **{name: v for name, v in values.items() if v is not None})


def run(context: EvalContext[SvmOptions]) -> dict[str, float]:
    """SVM classification: mean average precision in percent on the validation set. A collective.

    Returns:
        ``svm_map``, the mean over classes. The row's details hold the average precision and the cost of each class.
    """
    protocol, seed = context.options.resolve(), context.options.seed
    targets, test_targets = class_targets(context.train), class_targets(context.val)
    check_examples(context, positives=linear_svc.FOLDS, negatives=linear_svc.FOLDS)
    x, test_x = extract_svm_features(context, protocol.feature, protocol.view)
    fits, classes, costs = context.parallel_fits("SVM"), targets.shape[1], protocol.costs
    validation = fits.table(
        "cross-validation",
        classes * len(costs),
        1,
        linear_svc.cross_validate,
        x,
        targets,
        costs,
        seed,
        workers=context.threads,
    )
    best = validation.view(len(costs), classes).numpy().argmax(0)  # the first of equal ones, as in the original
    chosen = [costs[i] for i in best]
    precision = fits.table(
        "test",
        classes,
        1,
        linear_svc.fit_class,
        x,
        targets,
        test_x,
        test_targets,
        chosen,
        seed,
        protocol.ap,
        workers=context.threads,
    )[:, 0]
    context.details.update(
        ap=dict(zip(context.train.classes, (100 * precision).tolist(), strict=True)),
        cost=dict(zip(context.train.classes, chosen, strict=True)),
    )
    return {"svm_map": 100 * float(precision.mean())}


def extract_svm_features(
    context: EvalContext[SvmOptions], feature: str, view: str
) -> tuple[linear_svc.Matrix, linear_svc.Matrix]:
    """Compute training and validation features, float64 [N, D], of length about 1. A collective.

    Args:
        context: Encoder, data, options and processes.
        feature: One of ``feature_maps.NAMES``.
        view: Crop of images above 64 pixels, unless the options name another one.
    """
    options, encoder = context.options, feature_maps.select_feature(context.encoder, feature)
    if options.view == "auto" and encoder.meta["size"] > WHOLE_IMAGE_MAX_SIZE:
        options = replace(options, view=view)
    train, val = (
        extract_features(
            encoder,
            data,
            options,
            context.world,
            root=context.feature_dir,
            threads=context.threads,
            stop=context.stop,
        )
        for data in (context.train, context.val)
    )
    x, val_x = (linear_svc.normalize_rows(f.rows(torch.arange(len(f))).numpy()) for f in (train, val))
    return x, val_x


def class_targets(data: ShardSet) -> npt.NDArray[np.int8]:
    """Return which image shows which class: int8 [N, C], 1 present, -1 absent, 0 difficult.

    In a set with one class per image, that class is present and the others are absent.
    """
    if data.targets is not None:
        return data.targets
    return np.where(data.labels[:, None] == np.arange(len(data.classes)), 1, -1).astype(np.int8)


def check_examples(context: EvalContext[SvmOptions], *, positives: int, negatives: int) -> None:
    """Raise ``EvalError`` unless every class has enough training images, and one validation image.

    Args:
        context: The sets.
        positives: Least number of training images that show the class.
        negatives: Least number of training images that do not show it.
    """
    for data, least_with, least_without in ((context.train, positives, negatives), (context.val, 1, 0)):
        targets = class_targets(data)
        for symbol, least, word in ((1, least_with, "with"), (-1, least_without, "without")):
            counts = (targets == symbol).sum(0)
            if counts.min() < least:
                c = int(counts.argmin())
                raise EvalError(
                    f"shard folder {data.root}",
                    got=f"{counts[c]} images {word} class {data.classes[c]}",
                    expected=f"at least {least}",
                    fix="name larger shards, or, for lowshot, fewer images per class: shots=[1,2]",
                )
