"""Published protocols of fine-tuning on a part of the labels, as values.

Constants are those of the official code or paper named beside each; [inf] marks what neither states and is our
choice; [mem] marks what was written from memory.

Deviations that all protocols share: the last, incomplete batch of an epoch is dropped; one batch norm over the whole
batch (SyncBN), also where the original normalizes per GPU (VICReg, whose number of GPUs is not stated); images are
normalized as the weights file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpcssl.data.shards import ShardSet
from hpcssl.errors import EvalError
from hpcssl.optim.build import OptimOptions
from hpcssl.optim.schedule import ScheduleOptions


@dataclass(frozen=True, kw_only=True)
class FinetuneProtocol:
    """One published protocol: a trial, or a grid of trials.

    Attributes:
        rates: Pairs of peak learning rates, of the backbone and of the head. Each is tried with each of ``epochs``.
        lr_scaling: Unit of the rates, see ``OptimOptions.lr_scaling``.
        epochs: Numbers of epochs to try.
        judge: What the best trial is chosen on: ``val`` for the validation set, ``held_out`` for labeled images held
            out of the training, after which the best values train once more on all labeled images.
        batch: Images per step.
        milestones: Epochs after which the rates fall by ``gamma``; empty for the cosine.
        gamma: Factor at a milestone.
        interval: What the cosine moves with: ``epoch`` or ``step``.
        optimizer: Optimizer of the backbone: ``sgd`` or ``lars``. The head has SGD.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: L2 penalty of the gradient.
        interpolation: Filter of the resize: ``bilinear`` or ``bicubic``.
        init: Initial values of the head, one of ``heads.INITS``.
        report: Epoch whose score is reported: ``best`` or ``last``. With ``last``, only the last epoch is scored.
    """

    rates: tuple[tuple[float, float], ...]
    lr_scaling: str = "none"
    epochs: tuple[int, ...] = (20,)
    judge: str = "val"
    batch: int = 256
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    interval: str = "epoch"
    optimizer: str = "sgd"
    nesterov: bool = False
    weight_decay: float = 0.0
    interpolation: str = "bilinear"
    init: str = "normal"
    report: str = "last"

    def optim(self, part: str, lr: float) -> OptimOptions:
        """Optimizer options of a part, ``backbone`` or ``head``, for a peak learning rate."""
        lars: dict[str, Any] = {"name": "lars", "lr_in_momentum": True, "exclude_norm_and_bias": True}
        return OptimOptions(
            batch=self.batch,
            lr=lr,
            lr_scaling=self.lr_scaling,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            **(lars if self.optimizer == "lars" and part == "backbone" else {}),
        )

    def schedule(self, epochs: int) -> ScheduleOptions:
        """Schedule of the learning rates over a number of epochs."""
        return ScheduleOptions(
            epochs=epochs,
            shape="steps" if self.milestones else "cosine",
            interval=self.interval,
            milestones=list(self.milestones),
            gamma=self.gamma,
        )


_STEPS = FinetuneProtocol(rates=(), milestones=(12, 16), gamma=0.2)
# OpenSelfSup, configs/benchmarks/semi_classification/imagenet_{1,10}percent/{base,r50_lr*_head*}.py, on which BSIM is
# built: SyncBN, N(0, 0.01) (models/heads/cls_head.py), validated after the last epoch, the best of the grid
_BSIM = replace(_STEPS, rates=tuple((lr, lr * head) for lr in (0.001, 0.01, 0.1) for head in (1, 10, 100)))
# SwAV, eval_semisup.py:61-69, 140 (SyncBN), 185, 335 (best epoch), README (rates for 1 %)
_SWAV = replace(_STEPS, rates=(), init="torch", report="best")
# BYOL, appendix C.1: rates and epochs swept on a local validation set, Nesterov, batch 1024, no decay. [inf]: rates per
# 256 images and a cosine by step, as its code has them (eval_experiment.py), and one final training on all labels
_BYOL = FinetuneProtocol(
    rates=tuple((lr, lr) for lr in (0.005, 0.01, 0.02, 0.05, 0.1)),
    lr_scaling="batch256",
    epochs=(30, 50),
    judge="held_out",
    batch=1024,
    interval="step",
    nesterov=True,
    interpolation="bicubic",
    init="truncated",
)
# VICReg, README "Semi-supervised evaluation", evaluate.py:152 (N(0, 0.01)), 168 (cosine by epoch), 280 (best epoch)
_VICREG = FinetuneProtocol(rates=(), report="best")
# SimCLR, README "fine-tuning the whole network": LARS, 0.005 sqrt(batch), batch 1024, zeros, global norm; 30 epochs for
# 10 % [mem]. From the pooled features, as its v1: v2 starts at a layer of the projector, which weights files lack
_SIMCLR = FinetuneProtocol(
    rates=((0.005, 0.005),),
    lr_scaling="sqrt_batch",
    epochs=(60,),
    batch=1024,
    interval="step",
    optimizer="lars",
    interpolation="bicubic",
    init="zeros",
)

PROTOCOLS: dict[str, dict[int, FinetuneProtocol]] = {
    "bsim": {1: replace(_BSIM, weight_decay=5e-4), 10: replace(_BSIM, weight_decay=1e-4)},
    "swav": {1: replace(_SWAV, rates=((0.02, 5.0),)), 10: replace(_SWAV, rates=((0.01, 0.2),))},
    "byol": {1: _BYOL, 10: _BYOL},
    "vicreg": {1: replace(_VICREG, rates=((0.03, 0.08),)), 10: replace(_VICREG, rates=((0.01, 0.1),))},
    "simclr": {1: _SIMCLR, 10: replace(_SIMCLR, epochs=(30,))},
}
"""Name -> percent of the labels (1 or 10) -> protocol."""
LIST_PERCENTS = {12811: 1, 128116: 10}
"""Number of images of SimCLR's lists ``imagenet_subsets/{1,10}percent.txt`` -> percent."""


PERCENTS = (1, 10, 100)
"""Percent of the labels for which there are values. [inf] With all labels, they are those of 10 %: the protocols are
published for parts of ImageNet alone."""


def percent_of_labels(provenance: Mapping[str, Any]) -> int | None:
    """Return the percent of the labels that a set has, one of ``PERCENTS``.

    Args:
        provenance: ``ShardSet.provenance``. Without a record that the set is a part of another one, it is 100.

    Returns:
        None for a part of another size, and where the size is not known: a set that was made from another one (``of``),
        which may be a part itself, or from what there was of a data set (``partial``).
    """
    if provenance.get("list") in LIST_PERCENTS:
        return LIST_PERCENTS[provenance["list"]]
    if "list" in provenance or provenance.get("fraction", 1.0) != 1.0:
        return {0.01: 1, 0.1: 10}.get(provenance.get("fraction", 0.0))
    return None if "of" in provenance or provenance.get("partial") else 100


def find_protocol(name: str, percent: int | None, data: ShardSet) -> FinetuneProtocol:
    """Return the protocol for a set of labeled images.

    Args:
        name: A key of ``PROTOCOLS``.
        percent: One of ``PERCENTS``, of the labels; None takes it from the provenance of the set.
        data: The labeled images.

    Raises:
        EvalError: The protocol's values depend on the percent, which is not known.
    """
    rows = PROTOCOLS[name]
    if rows[1] == rows[10]:
        return rows[1]
    percent = percent or percent_of_labels(data.provenance)
    if percent is None:
        raise EvalError(
            f"protocol {name} on {data.root}",
            got="a part of a labeled set that is not known to be 1 or 10 percent of it",
            expected="one of these, which have their own learning rates, or all labels",
            fix="add percent=1 or percent=10, whichever is nearer; percent=100 has the values of 10",
        )
    return rows[min(percent, 10)]
