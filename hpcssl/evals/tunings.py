"""Published protocols of fine-tuning on a part of the labels, as values. ``finetune.py`` runs them.

Constants are those of the official code or paper named beside each; [inf] marks what neither says, and is ours.

Deviations that all share: an epoch's last, incomplete batch is dropped; one batch norm over the whole batch (SyncBN),
also where the original normalises per GPU (VICReg, whose number of GPUs is not stated); images are normalised as the
encoder's file says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpcssl.errors import EvalError
from hpcssl.optim.build import OptimOptions
from hpcssl.optim.schedule import ScheduleOptions


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """``rates``: pairs of rates, of the trunk and of the head, in the unit ``lr_per`` (``optim.OptimOptions``), all of
    which are tried with each number of ``epochs``. ``judge``: the best of them is chosen on the validation set
    (``val``), or on images held out of the labelled ones (``held_out``) and then trained on all of these.
    ``milestones``: epochs done, at which rates fall by ``gamma``; () for the cosine, which moves ``per`` epoch or step.
    ``optimizer`` of the trunk; the head has SGD. ``init``: a row of ``heads.INITS``. ``report``: the ``best`` or the
    ``last`` epoch; with ``last``, only that one is scored.
    """

    rates: tuple[tuple[float, float], ...]
    lr_per: str = "absolute"
    epochs: tuple[int, ...] = (20,)
    judge: str = "val"
    batch: int = 256
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    per: str = "epoch"
    optimizer: str = "sgd"
    nesterov: bool = False
    weight_decay: float = 0.0
    interpolation: str = "bilinear"
    init: str = "normal"
    report: str = "last"

    def optim(self, part: str, lr: float) -> OptimOptions:
        """Of the ``trunk`` or the ``head``."""
        lars = {"name": "lars", "lr_place": "inside", "exclude_norm_and_bias": True}
        return OptimOptions(batch=self.batch, lr=lr, lr_per=self.lr_per, nesterov=self.nesterov,
                            weight_decay=self.weight_decay,
                            **(lars if self.optimizer == "lars" and part == "trunk" else {}))

    def schedule(self, epochs: int) -> ScheduleOptions:
        return ScheduleOptions(epochs=epochs, shape="steps" if self.milestones else "cosine", per=self.per,
                               milestones=list(self.milestones), gamma=self.gamma)


_STEPS = Tuning(rates=(), milestones=(12, 16), gamma=0.2)
# OpenSelfSup, configs/benchmarks/semi_classification/imagenet_{1,10}percent/{base,r50_lr*_head*}.py, on which BSIM is
# built: SyncBN, N(0, 0.01) (models/heads/cls_head.py), validated after the last epoch, the best of the grid
_BSIM = replace(_STEPS, rates=tuple((lr, lr * head) for lr in (0.001, 0.01, 0.1) for head in (1, 10, 100)))
# SwAV, eval_semisup.py:61-69, 140 (SyncBN), 185, 335 (best epoch), README (rates for 1 %)
_SWAV = replace(_STEPS, rates=(), init="torch", report="best")
# BYOL, appendix C.1: rates and epochs swept on a local validation set, Nesterov, batch 1024, no decay. [inf]: rates per
# 256 images and a cosine by step, as its code has them (eval_experiment.py), and one final training on all labels
_BYOL = Tuning(rates=tuple((lr, lr) for lr in (0.005, 0.01, 0.02, 0.05, 0.1)), lr_per="batch256", epochs=(30, 50),
               judge="held_out", batch=1024, per="step", nesterov=True, interpolation="bicubic", init="truncated")
# VICReg, README "Semi-supervised evaluation", evaluate.py:152 (N(0, 0.01)), 168 (cosine by epoch), 280 (best epoch)
_VICREG = Tuning(rates=(), report="best")
# SimCLR, README "fine-tuning the whole network": LARS, 0.005 sqrt(batch), batch 1024, zeros, global norm; 30 epochs for
# 10 % [mem]. From the pooled features, as its v1: v2 starts at a layer of the projector, which encoders' files lack
_SIMCLR = Tuning(rates=((0.005, 0.005),), lr_per="sqrt_batch", epochs=(60,), batch=1024, per="step", optimizer="lars",
                 interpolation="bicubic", init="zeros")

TUNINGS: dict[str, dict[int, Tuning]] = {
    "bsim": {1: replace(_BSIM, weight_decay=5e-4), 10: replace(_BSIM, weight_decay=1e-4)},
    "swav": {1: replace(_SWAV, rates=((0.02, 5.0),)), 10: replace(_SWAV, rates=((0.01, 0.2),))},
    "byol": {1: _BYOL, 10: _BYOL},
    "vicreg": {1: replace(_VICREG, rates=((0.03, 0.08),)), 10: replace(_VICREG, rates=((0.01, 0.1),))},
    "simclr": {1: _SIMCLR, 10: replace(_SIMCLR, epochs=(30,))},
}
LISTS = {12811: 1, 128116: 10}
"""Images of SimCLR's lists imagenet_subsets/{1,10}percent.txt: percent."""


def percent_of(made: dict) -> int | None:
    """1 or 10 where a subset's own record (``plan.made`` of its index) says it, else None."""
    if made.get("list") in LISTS:
        return LISTS[made["list"]]
    return {0.01: 1, 0.1: 10}.get(made.get("fraction"))


def find(name: str, percent: int | None, data) -> Tuning:
    """The protocol's row for this shard set. Raises ``EvalError`` where its values depend on an unknown percent."""
    rows = TUNINGS[name]
    if rows[1] == rows[10]:
        return rows[1]
    percent = percent or percent_of(data.meta.get("plan", {}).get("made", {}))
    if percent is None:
        raise EvalError(f"protocol {name} on {data.root}", got="a share of the labels that the folder does not tell",
                        expected="1 or 10 percent, which have rates of their own", mend="add percent=1 or percent=10")
    return rows[percent]
