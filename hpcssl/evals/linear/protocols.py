"""Published protocols of linear classification, as values.

Constants are those of the official code or paper named beside each; [inf] marks what neither states and is our
choice. The learning rate falls to 0 along a cosine, by epoch or by step, or by 0.1 at milestones. No protocol has a
warm-up.

Deviations that all protocols share: the last, incomplete batch of an epoch is dropped; images are normalized as the
weights file says (SwAV's own evaluation uses 0.228 where ImageNet's standard deviation is 0.229); the batch norms of
the backbone keep their running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpcssl.optim.build import OptimOptions
from hpcssl.optim.schedule import ScheduleOptions

AUGMENTS = ("rrc_flip", "center")


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """One published protocol.

    Attributes:
        lr: Peak learning rate: as it is, or per 256 images of the batch.
        lr_per_256: Whether rates are per 256 images of the batch.
        lr_sweep: Rates among which images held out of the training set choose; empty for no sweep.
        optimizer: ``sgd``, ``lars`` or ``larc``.
        momentum: Momentum of the optimizer.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: L2 penalty of the gradient.
        adapt_bias: Whether LARS adapts the rate of the bias too.
        batch: Images per step.
        epochs: Passes over the training set.
        milestones: Epochs after which the rate falls to a tenth; empty for the cosine.
        interval: What the cosine moves with: ``epoch`` or ``step``.
        augment: ``rrc_flip`` encodes new random crops (area 0.08 to 1) with flips in every epoch; ``center`` trains on
            the stored features of center crops.
        interpolation: Filter of the resize: ``bilinear`` or ``bicubic``.
        standardize: Whether features get unit length and then a fixed mean and variance, as in MSF.
        init: Initial values of the head, one of ``heads.INITS``.
        report: Epoch whose score is reported: ``best`` or ``last``.
    """

    lr: float
    lr_per_256: bool = False
    lr_sweep: tuple[float, ...] = ()
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    adapt_bias: bool = True
    batch: int = 256
    epochs: int = 100
    milestones: tuple[int, ...] = ()
    interval: str = "epoch"
    augment: str = "rrc_flip"
    interpolation: str = "bilinear"
    standardize: bool = False
    init: str = "normal"
    report: str = "best"

    def optim(self, lr: float) -> OptimOptions:
        """Optimizer options for a peak learning rate."""
        return OptimOptions(
            name=self.optimizer,
            batch=self.batch,
            lr=lr,
            lr_scaling="batch256" if self.lr_per_256 else "none",
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            exclude_norm_and_bias=not self.adapt_bias,
        )

    def schedule(self) -> ScheduleOptions:
        """Schedule of the learning rate."""
        return ScheduleOptions(
            epochs=self.epochs,
            shape="steps" if self.milestones else "cosine",
            interval=self.interval,
            milestones=list(self.milestones),
        )


_MSF = LinearProtocol(lr=0.01, weight_decay=1e-4, epochs=40, milestones=(15, 30, 40), standardize=True, init="torch")
_MOCO = LinearProtocol(lr=30.0, milestones=(60, 80))
_GOOGLE = LinearProtocol(
    lr=0.1,
    lr_per_256=True,
    batch=4096,
    epochs=90,
    interval="step",
    nesterov=True,
    interpolation="bicubic",
    init="zeros",
    report="last",
)

PROTOCOLS: dict[str, LinearProtocol] = {
    # MSF and CMSF, eval_linear.py:34-63 (constants), 200-215 (Normalize, FullBatchNorm, Linear), 250 (best)
    "msf": _MSF,
    # the same on stored features: MSF trains its transfer sets without augmentation (docs/index.html)
    "msf_center": replace(_MSF, augment="center"),
    # MoCo, main_lincls.py (flags --lr, --schedule, --wd; fc drawn from N(0, 0.01); best_acc1)
    "moco": _MOCO,
    # OpenSelfSup, configs/benchmarks/linear_classification/imagenet/r50_last.py: MoCo's; the last epoch [inf]
    "oss_last": replace(_MOCO, report="last"),
    # SimSiam, main_lincls.py:48-57, 160, 188, 309, 491-493, and 232: apex's LARC with clip=False
    "simsiam": LinearProtocol(lr=0.1, lr_per_256=True, optimizer="larc", batch=4096, epochs=90),
    # SimCLR, README.md:135-142 (flags), model_util.py:46-49 (biases decay), 78 (cosine by step), 90 (Nesterov)
    "simclr": replace(_GOOGLE, weight_decay=1e-6),
    # NNCLR, section 4.1: 90 epochs, batch 4096, LARS, Nesterov, cosine from 1. [inf]: that this rate is not per 256
    # images, no decay, biases not adapted as in its pre-training, and SimCLR's crops, zeros and last epoch
    "nnclr": replace(_GOOGLE, lr=1.0, lr_per_256=False, optimizer="lars", adapt_bias=False),
    # BYOL, appendix C.1 (sweep on the last 10,009 training images, 80 epochs, batch 1024), configs/eval.py (0.2 is
    # its rate without a sweep), eval_experiment.py (the chosen rate trains on TRAIN_AND_VALID; hk.Linear)
    "byol": replace(_GOOGLE, lr=0.2, lr_sweep=(0.4, 0.3, 0.2, 0.1, 0.05), batch=1024, epochs=80, init="truncated"),
    # SwAV, eval_linear.py:62-68 (constants), 184 (cosine by epoch), 250 (N(0, 0.01)), 376 (best)
    "swav": LinearProtocol(lr=0.3, weight_decay=1e-6),
}
