"""Transfer to twelve data sets by linear classification of frozen features.

``logistic`` (NNCLR section 4.3 and Table 3, BYOL appendix D.1): features of the center crop, its short side resized
with bicubic interpolation; logistic regression (``logistic.py``) with 45 values of the l2 penalty from 1e-6 to 1e5,
chosen on the validation part, fitted again on train and validation together, tested once. VOC 2007: each class against
the rest, one penalty for all.

``msf`` (MSF, docs/index.html): the head of the linear evaluation's ``msf_center``, trained on train and validation
together [inf], top-1 of its best epoch, on ten of the sets. Nothing is chosen, and every metric is top-1 [inf].

The folder holds NAME/train, NAME/val and NAME/test, as ``hpcssl-shard transfer`` writes them. [inf] marks what the
sources do not state.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, require_choice, suggest
from hpcssl.evals.common.features import ConcatenatedSets, Features
from hpcssl.evals.common.metrics import average_precision
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.context import EvalContext
from hpcssl.evals.frozen import logistic, transfer_sets
from hpcssl.evals.frozen.svm import class_targets
from hpcssl.evals.frozen.transfer_sets import METRICS, MSF_SETS
from hpcssl.evals.linear import evaluate as linear
from hpcssl.evals.linear.options import LinearOptions

LOG = logging.getLogger("hpcssl")

PENALTIES = np.logspace(-6, 5, 45)
CHAIN_LENGTH = 9
"""Penalties of one chain, from strong to weak; each starts at the solution of the one before. A chain is one fit."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions(FeatureOptions):
    """Options of the transfer evaluation.

    Attributes:
        view: Crop of the images; ``auto`` resizes the short side to the image size before a center crop.
        interpolation: Filter of the resize; ``auto`` is bicubic.
        forward_batch: Images per forward pass, see ``EvalViewOptions``.
        precision: Precision of the forward pass, see ``FeatureOptions``.
        feature_dtype: Precision of stored features, see ``FeatureOptions``.
        root: Folder that holds the shard folders of the data sets.
        sets: Names of data sets, joined by ``+`` as in ``dtd+pets``; empty for all in the folder.
        protocol: ``logistic`` (BYOL, NNCLR) or ``msf`` (MSF, CMSF).
        seed: Seed of the head of ``msf``.
    """

    root: str = ""
    sets: str = ""
    protocol: str = "logistic"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        super().__post_init__()
        require_choice("evals.transfer.protocol", self.protocol, ("logistic", "msf"))
        for name in self.names:
            if name not in METRICS or (self.protocol == "msf" and name == "voc07"):
                known = METRICS if self.protocol == "logistic" else (*MSF_SETS, "birdsnap")
                raise ConfigError(
                    "evals.transfer.sets",
                    got=repr(name),
                    expected="names of data sets, joined by +",
                    fix=suggest(name, known),
                )

    @property
    def names(self) -> list[str]:
        """The names in ``sets``, each once."""
        return list(dict.fromkeys(name for name in self.sets.split("+") if name))


def open_data_sets(options: TransferOptions) -> dict[str, dict[str, ShardSet]]:
    """Open the parts of each data set, see ``transfer_sets.open_data_sets``."""
    known = METRICS if options.protocol == "logistic" else MSF_SETS
    return transfer_sets.open_data_sets(options.root, options.names, known)


def run(context: EvalContext[TransferOptions]) -> dict[str, float]:
    """Transfer to one data set. A collective.

    Returns:
        The score in percent under the name of the data set: top-1 accuracy, mean accuracy per class, or mean average
        precision at eleven points, as ``transfer_sets.METRICS`` lists. The row's details hold the metric, and for
        ``logistic`` the penalty and its validation score.
    """
    name, options = context.options.sets, context.options
    if options.view == "auto":
        options = replace(options, view="eval_whole")
    if options.interpolation == "auto":
        options = replace(options, interpolation="bicubic")
    metric = METRICS[name] if options.protocol == "logistic" else "top1"
    context = context.with_options(options)
    context.details["metric"] = metric
    score = _score_logistic(context, metric) if options.protocol == "logistic" else _score_msf(context)
    LOG.info("transfer to %s: %s %.2f %%", name, metric, score)
    return {name: score}


def average_over_sets(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Return the mean over the twelve sets, and over the ten of MSF, if all of them are among the rows; else None."""
    scores = {name: value for row in rows for name, value in row["metrics"].items()}
    means = {
        f"transfer_mean{len(names)}": float(np.mean([scores[name] for name in names]))
        for names in (tuple(METRICS), MSF_SETS)
        if scores.keys() >= set(names)
    }
    return means or None


def _test_set(context: EvalContext[TransferOptions]) -> ShardSet:
    assert context.test is not None, "open_data_sets gives every data set a test part"
    return context.test


def _score_msf(context: EvalContext[TransferOptions]) -> float:
    options = context.options
    head = LinearOptions(
        protocol="msf_center",
        view=options.view,
        interpolation=options.interpolation,
        forward_batch=options.forward_batch,
        precision=options.precision,
        feature_dtype=options.feature_dtype,
        seed=options.seed,
    )
    both = ConcatenatedSets(context.train, context.val)
    return linear.evaluate_linear(context.with_options(head), both, _test_set(context))["top1"]


def _score_logistic(context: EvalContext[TransferOptions], metric: str) -> float:
    classes, multi_label = len(context.train.classes), metric == "voc11"
    fits = context.parallel_fits(f"transfer to {context.options.sets}")
    sets = (context.train, context.val, _test_set(context))
    train, val, test = (_Part(context, data, multi_label) for data in sets)

    def fit_chain(number: int) -> list[float]:
        weight, scores, (x, y) = None, [], train.on_device()
        for l2 in PENALTIES[::-1][number * CHAIN_LENGTH : (number + 1) * CHAIN_LENGTH]:
            weight = logistic.fit(x, y, classes, float(l2), weight)
            scores.append(val.score(weight, metric))
        return scores

    scores = fits.table("validation", len(PENALTIES) // CHAIN_LENGTH, CHAIN_LENGTH, fit_chain).flatten().flip(0)
    best = int(scores.argmax())  # the weakest penalty of equal ones, as in ssl-transfer
    l2 = float(PENALTIES[best])

    def fit_all(_: int) -> list[float]:
        x, y = (torch.cat(pair) for pair in zip(train.on_device(), val.on_device(), strict=True))
        return [test.score(logistic.fit(x, y, classes, l2), metric)]

    context.details.update(l2=l2, validation=100 * float(scores[best]))
    return 100 * float(fits.table("test", 1, 1, fit_all))


class _Part:
    """Features and targets of one part of a data set: labels [N], or ±1 [N, C] for several classes per image.

    Difficult images are negatives, in training and in the test (ssl-transfer datasets/voc2007.py: ``target == 1``).
    """

    def __init__(self, context: EvalContext[TransferOptions], data: ShardSet, multi_label: bool) -> None:
        self.features: Features = context.extract_features(data)
        self.device = context.world.device
        self.targets: npt.NDArray[Any] = np.where(class_targets(data) == 1, 1.0, -1.0) if multi_label else data.labels

    def on_device(self) -> tuple[Tensor, Tensor]:
        """Features, float64 [N, D], and targets."""
        x_ND = torch.cat([part.to(self.device, torch.float64) for part in self.features.parts])
        return x_ND, torch.as_tensor(self.targets).to(self.device)

    def score(self, weight: Tensor, metric: str) -> float:
        """Score in [0, 1]; among equal logits the lower class is the prediction."""
        parts = (part.to(self.device, torch.float64) for part in self.features.parts)
        logits = torch.cat([logistic.compute_logits(part, weight) for part in parts]).cpu().numpy()
        if metric == "voc11":
            classes = range(logits.shape[1])
            return float(np.mean([average_precision(self.targets[:, c] == 1, logits[:, c], metric) for c in classes]))
        predicted = logits.argmax(1)
        if metric == "top1":
            return float((predicted == self.targets).mean())
        from sklearn.metrics import recall_score  # takes a second, which the other metrics save

        occurring = np.unique(self.targets)  # the mean is over the classes that have images
        return float(recall_score(self.targets, predicted, labels=occurring, average="macro", zero_division=0))
