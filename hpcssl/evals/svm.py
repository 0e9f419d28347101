"""Linear SVMs on frozen features, one class against the rest, scored by mean average precision (VOC 2007).

``svm``: on all training images, the cost of each class chosen by three-fold cross-validation. ``lowshot.py`` trains on
a few. Images of several classes (``ShardSet.targets``) as well as of one.

Features are the last stage's map, averaged to 2 × 2 (``maps.py``), of the whole image squashed into the square; for
images up to 64 pixels the view is the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals import linear_svc, maps
from hpcssl.evals.features import FeatureOptions, extract, one_of
from hpcssl.evals.jobs import Jobs
from hpcssl.nets.weights import WHOLE_UP_TO


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """``view_lowshot``: of the low-shot evaluation; ``ap``: a kind of ``metrics.average_precision``."""

    costs: tuple[float, ...]
    view: str = "eval_squash"
    view_lowshot: str = "eval_squash"
    feature: str = "res5"
    ap: str = "area"


PROTOCOLS = {
    # OpenSelfSup, and with it BSIM: benchmarks/svm_tools/eval_svm_full.sh, svm_helper.py ``parse_cost_list``
    "oss": Protocol(costs=(1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))),
    # VISSL: configs/config/benchmark/{linear_image_classification,low_shot_transfer}/voc07/eval_resnet_8gpu_*
    "vissl": Protocol(costs=(0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
                      view_lowshot="eval_squash_once"),
}


@dataclass(frozen=True, kw_only=True)
class SvmOptions(FeatureOptions):
    """``protocol`` names a row of ``PROTOCOLS``; ``costs``, ``feature`` (a name of ``maps.NAMES``) and ``ap`` (``area``
    or ``voc11``, eleven points), where they are set, replace its values. ``seed``: of liblinear's order, and of the
    draws.
    """

    protocol: str = "oss"
    costs: list[float] | None = None
    feature: str | None = None
    ap: str | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("feature", self.feature or "res5", maps.NAMES)
        one_of("ap", self.ap or "area", ("area", "voc11"))
        if self.costs is not None and not (self.costs and min(self.costs) > 0):
            raise ConfigError("evaluation option costs", got=self.costs, expected="costs above 0",
                              mend="costs=[1,10,100], or leave it out to take the protocol's")

    def resolve(self) -> Protocol:
        given = {"costs": self.costs and tuple(self.costs), "feature": self.feature, "ap": self.ap}
        return replace(PROTOCOLS[self.protocol], **{name: v for name, v in given.items() if v is not None})


def run(context) -> dict[str, float]:
    """``svm_map``: mean over classes of the average precision, in percent. Details: each class's, and its cost."""
    protocol, seed = context.options.resolve(), context.options.seed
    targets, test_targets = targets_of(context.train), targets_of(context.val)
    check(context, positives=linear_svc.FOLDS, negatives=linear_svc.FOLDS)
    x, test_x = features(context, protocol.feature, protocol.view)
    jobs, classes, costs = Jobs(context, "SVM"), targets.shape[1], protocol.costs
    cross = jobs.table("cross-validation", classes * len(costs), 1, linear_svc.cross_validate, x, targets, costs, seed,
                       workers=context.threads).view(len(costs), classes).numpy()
    chosen = [costs[i] for i in cross.argmax(0)]  # the first of equals, as in the original
    found = jobs.table("test", classes, 1, linear_svc.refit, x, targets, test_x, test_targets, chosen, seed,
                       protocol.ap, workers=context.threads)[:, 0]
    context.details |= {"ap": dict(zip(context.train.classes, (100 * found).tolist(), strict=True)),
                        "cost": dict(zip(context.train.classes, chosen, strict=True))}
    return {"svm_map": 100 * float(found.mean())}


def features(context, feature: str, view: str) -> tuple[np.ndarray, np.ndarray]:
    """Training and test features, float64 [N, D], of length about 1."""
    options, encoder = context.options, maps.of(context.encoder, feature)
    if options.view == "auto" and encoder.meta["size"] > WHOLE_UP_TO:
        options = replace(options, view=view)
    found = (extract(encoder, data, options, context.world, root=context.cache, threads=context.threads,
                     stop=context.stop) for data in (context.train, context.val))
    train, test = (linear_svc.unit(f.rows(torch.arange(len(f))).numpy()) for f in found)
    return train, test


def targets_of(data: ShardSet) -> np.ndarray:
    """int8 [N, C]: 1 present, -1 absent, 0 difficult. Of a set with one class per image: 1 for it, -1 elsewhere."""
    if data.targets is not None:
        return data.targets
    return np.where(data.labels[:, None] == np.arange(len(data.classes)), 1, -1).astype(np.int8)


def check(context, *, positives: int, negatives: int) -> None:
    """Raise ``EvalError`` unless every class has as many training images with and without it, and one test image."""
    for data, with_it, without in ((context.train, positives, negatives), (context.val, 1, 0)):
        targets = targets_of(data)
        for symbol, least, word in ((1, with_it, "with"), (-1, without, "without")):
            there = (targets == symbol).sum(0)
            if there.min() < least:
                c = int(there.argmin())
                raise EvalError(f"shard folder {data.root}", got=f"{there[c]} images {word} class {data.classes[c]}",
                                expected=f"at least {least}",
                                mend="name larger shards, or, for lowshot, ask for fewer images: k=[1,2]")
