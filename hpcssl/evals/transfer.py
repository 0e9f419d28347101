"""Transfer to twelve data sets by linear classification of frozen features.

``logistic`` (NNCLR section 4.3 and Table 3, BYOL appendix D.1): features of the centre crop, its short side resized
with bicubic interpolation; logistic regression (``logistic.py``) with 45 values of the l2 penalty from 1e-6 to 1e5,
chosen on the validation part, fitted again on train and validation together, tested once. VOC 2007: each class against
the rest, one penalty for all.
``msf`` (MSF, docs/index.html): the head of the linear evaluation's ``msf_center``, trained on train and validation
together [inf], top-1 of its best epoch, on ten of the sets. Nothing is chosen, and every metric is top-1 [inf].

The folder holds NAME/train, NAME/val and NAME/test, as ``hpcssl-shard transfer`` writes them.
Letters in shapes: N images, D features, C classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, DataError, nearest
from hpcssl.evals import linear, logistic
from hpcssl.evals.features import FeatureOptions, Features, Union, one_of
from hpcssl.evals.jobs import Jobs
from hpcssl.evals.linear import LinearOptions
from hpcssl.evals.metrics import average_precision
from hpcssl.evals.svm import targets_of

log = logging.getLogger("hpcssl")

# S4 Table 3: what each set is scored by
METRICS = {"food101": "top1", "cifar10": "top1", "cifar100": "top1", "birdsnap": "top1", "sun397": "top1",
           "cars": "top1", "aircraft": "per_class", "voc07": "voc11", "dtd": "top1", "pets": "per_class",
           "caltech101": "per_class", "flowers": "per_class"}
TEN = tuple(name for name in METRICS if name not in ("birdsnap", "voc07"))  # those of MSF and CMSF
PARTS = ("train", "val", "test")

PENALTIES = np.logspace(-6, 5, 45)
CHAIN = 9  # penalties, from strong to weak, of which each starts at the solution before it; a chain is one job


@dataclass(frozen=True, kw_only=True)
class TransferOptions(FeatureOptions):
    """``root``: the folder that holds the data sets; ``sets``: names such as ``dtd+pets``, all that lie there where it
    is empty; ``protocol``: ``logistic`` or ``msf``; ``seed``: of the msf head."""

    root: str = ""
    sets: str = ""
    protocol: str = "logistic"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("protocol", self.protocol, ("logistic", "msf"))
        for name in self.names:
            if name not in METRICS or (self.protocol == "msf" and name == "voc07"):
                known = METRICS if self.protocol == "logistic" else (*TEN, "birdsnap")
                raise ConfigError("evals.transfer.sets", got=repr(name), expected="names of data sets, joined by +",
                                  mend=nearest(name, known))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name in self.sets.split("+") if name))


def split(options: TransferOptions) -> dict[str, dict[str, ShardSet]]:
    """The parts of each data set. Raises ``ConfigError`` and ``DataError``."""
    root = Path(options.root)
    if not options.root:
        raise ConfigError("evals.transfer.root", got="no folder", expected="the folder of the data sets' shards",
                          mend="root=FOLDER, with FOLDER/NAME as `hpcssl-shard transfer NAME SRC FOLDER/NAME` wrote it")
    if not root.is_dir():
        raise DataError(f"folder {root}", got="no such folder", expected="a folder of data sets", mend="check root=")
    known = METRICS if options.protocol == "logistic" else TEN
    names = options.names or [name for name in known if (root / name).is_dir()]
    if not names:
        raise DataError(f"folder {root}", got=", ".join(sorted(p.name for p in root.iterdir())[:3]) or "an empty one",
                        expected="folders " + ", ".join(known),
                        mend=f"`hpcssl-shard transfer NAME SRC {root}/NAME` writes one")
    there = [name for name in METRICS if (root / name).is_dir()]
    lost = [name for name in names if name not in there]
    if lost:
        raise DataError(f"folder {root}", got=f"no {', '.join(lost)} (it holds {', '.join(there) or 'no data set'})",
                        expected="a folder for each of sets=",
                        mend=f"`hpcssl-shard transfer {lost[0]} SRC {root}/{lost[0]}` writes it")
    found = {name: {part: ShardSet.open(root / name / part) for part in PARTS} for name in names}
    for name, parts in found.items():
        for data in parts.values():
            if data.meta.get("dataset", name) != name:
                raise DataError(f"shard folder {data.root}", got=f"the data set {data.meta['dataset']}",
                                expected=name, mend="give the folder its data set's name, or write the right one there")
            if (METRICS[name] == "voc11") != (data.targets is not None):
                raise DataError(f"shard folder {data.root}",
                                got=f"{'one class' if data.targets is None else 'several classes'} for each image",
                                expected=f"the images and targets of {name}",
                                mend=f"write it with `hpcssl-shard transfer {name}`")
    return found


def run(context) -> dict[str, float]:
    """The data set's score in percent, under its name."""
    name, options = context.options.sets, context.options
    if options.view == "auto":
        options = replace(options, view="eval_whole")
    if options.interpolation == "auto":
        options = replace(options, interpolation="bicubic")
    metric = METRICS[name] if options.protocol == "logistic" else "top1"
    context = replace(context, options=options)
    context.details["metric"] = metric
    score = _logistic(context, metric) if options.protocol == "logistic" else _msf(context)
    log.info("transfer to %s: %.2f", name, score)
    return {name: score}


def total(rows: list[dict]) -> dict[str, float] | None:
    """Means over the twelve and over MSF's ten, where all of them are there."""
    scores = {name: value for row in rows for name, value in row["metrics"].items()}
    means = {f"transfer_mean{len(names)}": float(np.mean([scores[name] for name in names]))
             for names in (tuple(METRICS), TEN) if scores.keys() >= set(names)}
    return means or None


def _msf(context) -> float:
    options = context.options
    head = LinearOptions(protocol="msf_center", view=options.view, interpolation=options.interpolation,
                         batch=options.batch, precision=options.precision, store=options.store, seed=options.seed)
    return linear.run(replace(context, train=Union(context.train, context.val), val=context.test,
                              options=head))["top1"]


def _logistic(context, metric: str) -> float:
    classes = len(context.train.classes)
    jobs, several = Jobs(context, f"transfer to {context.options.sets}"), metric == "voc11"
    train, val, test = (_Part(context, data, several) for data in (context.train, context.val, context.test))

    def chain(job: int) -> list[float]:
        weight, scores, (x, y) = None, [], train.on_device()
        for l2 in PENALTIES[::-1][job * CHAIN:(job + 1) * CHAIN]:
            weight = logistic.fit(x, y, classes, float(l2), weight)
            scores.append(val.score(weight, metric))
        return scores

    scores = jobs.table("validation", len(PENALTIES) // CHAIN, CHAIN, chain).flatten().flip(0)
    best = int(scores.argmax())  # the weakest penalty of equals, as in ssl-transfer
    l2 = float(PENALTIES[best])

    def final(job: int) -> list[float]:
        x, y = (torch.cat(pair) for pair in zip(train.on_device(), val.on_device(), strict=True))
        return [test.score(logistic.fit(x, y, classes, l2), metric)]

    context.details |= {"l2": l2, "validation": 100 * float(scores[best])}
    return 100 * float(jobs.table("test", 1, 1, final))


class _Part:
    """Features of one part of a data set, and what is true of its images: labels [N], or ±1 [N, C].

    Difficult images are negatives, in training and in the test (ssl-transfer datasets/voc2007.py: ``target == 1``).
    """

    def __init__(self, context, data: ShardSet, several: bool):
        self.features: Features = context.features(data)
        self.device = context.world.device
        self.true = np.where(targets_of(data) == 1, 1.0, -1.0) if several else data.labels

    def on_device(self) -> tuple[Tensor, Tensor]:
        x_ND = torch.cat([part.to(self.device, torch.float64) for part in self.features.parts])
        return x_ND, torch.as_tensor(self.true).to(self.device)

    def score(self, weight: Tensor, metric: str) -> float:
        """In [0, 1]; among equal logits the lower class is the prediction."""
        logits = torch.cat([logistic.decide(part.to(self.device, torch.float64), weight)
                            for part in self.features.parts]).cpu().numpy()
        if metric == "voc11":
            return float(np.mean([average_precision(self.true[:, c] == 1, logits[:, c], metric)
                                  for c in range(logits.shape[1])]))
        predicted = logits.argmax(1)
        if metric == "top1":
            return float((predicted == self.true).mean())
        from sklearn.metrics import recall_score  # a second that other scores need not wait for

        there = np.unique(self.true)  # a mean over the classes that have images
        return float(recall_score(self.true, predicted, labels=there, average="macro", zero_division=0))
