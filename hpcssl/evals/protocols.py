"""Published protocols of linear classification, as values. ``linear.py`` runs them.

Constants are those of the official code or paper named beside each; [inf] marks what neither says, and is ours.
The rate falls to 0 along a cosine, by epoch or by step, or by 0.1 after milestones; no protocol has a warm-up.

Deviations that all share: an epoch's last, incomplete batch is dropped; images are normalised as the encoder's file
says (SwAV's own evaluation has 0.228 for 0.229 in it); the backbone's norms keep their running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpcssl.optim.build import OptimOptions
from hpcssl.optim.schedule import ScheduleOptions

AUGMENTS = ("rrc_flip", "center")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """``lr``: absolute, or ``per256`` images of the batch. ``sweep``: the rates among which a held-out part of the
    training set chooses, () for none. ``milestones``: epochs done, () for the cosine, which moves ``per`` epoch or
    step. ``adapt_bias``: LARS adapts the bias too. ``augment``: ``rrc_flip`` encodes new random crops (area 0.08-1)
    with flips in every epoch, ``center`` trains on the cached centre crops. ``standardise``: MSF's unit length and
    fixed mean and variance. ``init``: a row of ``heads.INITS``. ``report``: the ``best`` or the ``last`` epoch.
    """

    lr: float
    per256: bool = False
    sweep: tuple[float, ...] = ()
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    adapt_bias: bool = True
    batch: int = 256
    epochs: int = 100
    milestones: tuple[int, ...] = ()
    per: str = "epoch"
    augment: str = "rrc_flip"
    interpolation: str = "bilinear"
    standardise: bool = False
    init: str = "normal"
    report: str = "best"

    def optim(self, lr: float) -> OptimOptions:
        return OptimOptions(name=self.optimizer, batch=self.batch, lr=lr,
                            lr_per="batch256" if self.per256 else "absolute", momentum=self.momentum,
                            nesterov=self.nesterov, weight_decay=self.weight_decay,
                            exclude_norm_and_bias=not self.adapt_bias)

    def schedule(self) -> ScheduleOptions:
        return ScheduleOptions(epochs=self.epochs, shape="steps" if self.milestones else "cosine", per=self.per,
                               milestones=list(self.milestones))


_MSF = Protocol(lr=0.01, weight_decay=1e-4, epochs=40, milestones=(15, 30, 40), standardise=True, init="torch")
_MOCO = Protocol(lr=30.0, milestones=(60, 80))
_GOOGLE = Protocol(lr=0.1, per256=True, batch=4096, epochs=90, per="step", nesterov=True, interpolation="bicubic",
                   init="zeros", report="last")

PROTOCOLS: dict[str, Protocol] = {
    # MSF and CMSF, eval_linear.py:34-63 (constants), 200-215 (Normalize, FullBatchNorm, Linear), 250 (best)
    "msf": _MSF,
    # the same on cached features: MSF trains its transfer sets without augmentation (docs/index.html)
    "msf_center": replace(_MSF, augment="center"),
    # MoCo, main_lincls.py (flags --lr, --schedule, --wd; fc drawn from N(0, 0.01); best_acc1)
    "moco": _MOCO,
    # OpenSelfSup, configs/benchmarks/linear_classification/imagenet/r50_last.py: MoCo's; the last epoch [inf]
    "oss_last": replace(_MOCO, report="last"),
    # SimSiam, main_lincls.py:48-57, 160, 188, 309, 491-493, and 232: apex's LARC with clip=False
    "simsiam": Protocol(lr=0.1, per256=True, optimizer="larc", batch=4096, epochs=90),
    # SimCLR, README.md:135-142 (flags), model_util.py:46-49 (biases decay), 78 (cosine by step), 90 (Nesterov)
    "simclr": replace(_GOOGLE, weight_decay=1e-6),
    # NNCLR, section 4.1: 90 epochs, batch 4096, LARS, Nesterov, cosine from 1. [inf]: that this rate is absolute, no
    # decay, biases not adapted as in its pre-training, and SimCLR's crops, zeros and last epoch
    "nnclr": replace(_GOOGLE, lr=1.0, per256=False, optimizer="lars", adapt_bias=False),
    # BYOL, appendix C.1 (sweep on the last 10,009 training images, 80 epochs, batch 1024), configs/eval.py (0.2 is
    # its rate without a sweep), eval_experiment.py (the chosen rate trains on TRAIN_AND_VALID; hk.Linear)
    "byol": replace(_GOOGLE, lr=0.2, sweep=(0.4, 0.3, 0.2, 0.1, 0.05), batch=1024, epochs=80, init="truncated"),
    # SwAV, eval_linear.py:62-68 (constants), 184 (cosine by epoch), 250 (N(0, 0.01)), 376 (best)
    "swav": Protocol(lr=0.3, weight_decay=1e-6),
}
