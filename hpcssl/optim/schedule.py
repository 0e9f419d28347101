"""Learning rate and momentum of the target encoder as pure functions of the step. They have no state to save.

t step from 0, T steps in all, w warm-up steps, S steps per epoch, e = floor(t / S) + 1 epoch from 1, E epochs.
S is a whole number, or a fraction with ``fractional_epochs``; then T and w are rounded down.

    warm-up                                                            t < w
      before        start + (peak - start) t / w                                  SimCLR, BYOL, NNCLR
      inclusive     start + (peak - start) t / (w - 1)                            SwAV (numpy's linspace)
      factor        decay(t) (start + (peak - start) t / w) / peak                OpenSelfSup (mmcv)
    decay
      cosine        final + (peak - final) (1 + cos(pi u)) / 2
        per step      u = (t - w) / (T - w)                                       SimCLR, BYOL, SwAV
        per epoch     u = (e - 1 - w/S) / (E - w/S)                               MSF, CMSF, MoCo v2, SimSiam
      steps         peak gamma^(milestones m, in epochs, with m <= e - 1)         linear evaluation
      constant      peak
    momentum        tau0, or 1 - (1 - tau0) (cos(pi t / T) + 1) / 2               MSF, MoCo; BYOL

With a warm-up of the kind ``factor`` the decay starts at the first step: there w is 0 in u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Optional

from hpcssl.errors import ConfigError, require_choice

SHAPES = ("cosine", "constant", "steps")
INTERVALS = ("epoch", "step")
WARMUPS = ("before", "inclusive", "factor")
MOMENTUM_SHAPES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Length of the run, and the course of the learning rate. Rates are in the unit of ``optim.lr``.

    Attributes:
        epochs: Length of the run in epochs. Set this or ``steps``; the other is null.
        steps: Length of the run in steps.
        fractional_epochs: How lengths in epochs become steps: with the images of the last, incomplete batch of an epoch
            (floor(epochs * images / batch) steps, as the JAX code of BYOL), or in whole batches.
        shape: Decay after the warm-up: ``cosine`` (to ``final_lr``), ``constant``, or ``steps`` (at ``milestones``).
        interval: How often a cosine changes the rate: every ``epoch`` or every ``step``. The warm-up changes it every
            step.
        warmup: How the linear warm-up meets the decay. ``before``: the decay starts after it, and its first step has
            the peak rate. ``inclusive``: the last step of the warm-up has the peak rate, too (SwAV). ``factor``: the
            decay starts with the run, and the warm-up multiplies it (mmcv, OpenSelfSup).
        warmup_epochs: Length of the linear warm-up in epochs, fractions allowed. 0: none.
        warmup_lr: Rate at the start of the warm-up.
        final_lr: Rate at the end of a cosine.
        milestones: For ``shape=steps``: numbers of finished epochs after which the rate is multiplied by ``gamma``.
        gamma: Factor at each milestone, above 0 and up to 1.
    """

    epochs: Optional[int] = None  # noqa: UP045 - OmegaConf reads this form on every Python we run on
    steps: Optional[int] = None  # noqa: UP045
    fractional_epochs: bool = False
    shape: str = "cosine"
    interval: str = "epoch"
    warmup: str = "before"
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    final_lr: float = 0.0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        require_choice("schedule.shape", self.shape, SHAPES)
        require_choice("schedule.interval", self.interval, INTERVALS)
        require_choice("schedule.warmup", self.warmup, WARMUPS)
        _require("schedule.epochs", self.epochs, self.epochs is None or self.epochs >= 1, "1 or more")
        _require("schedule.steps", self.steps, self.steps is None or self.steps >= 1, "1 or more")
        _require(
            "schedule.steps",
            f"{self.steps} with {self.epochs} epochs",
            None in (self.steps, self.epochs),
            "one of the two",
            "set the other to null: schedule.epochs=null or schedule.steps=null",
        )
        for name in ("warmup_epochs", "warmup_lr", "final_lr"):
            value = getattr(self, name)
            _require(f"schedule.{name}", value, 0 <= value < math.inf, "0 or more")
        _require("schedule.gamma", self.gamma, 0 < self.gamma <= 1, "above 0, up to 1")
        _require(
            "schedule.milestones",
            list(self.milestones),
            all(a < b for a, b in zip([0, *self.milestones], self.milestones, strict=False)),
            "increasing, from 1",
        )
        _require(
            "schedule.milestones",
            list(self.milestones),
            bool(self.milestones) == (self.shape == "steps"),
            "milestones with schedule.shape=steps, and only then",
            "set schedule.shape and schedule.milestones",
        )
        _require(
            "schedule.final_lr",
            self.final_lr,
            self.final_lr == 0 or self.shape == "cosine",
            "0, since only a cosine has an end value",
            "set schedule.shape=cosine",
        )


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Momentum of the target encoder, which is an exponential moving average of the online encoder.

    Attributes:
        momentum: Share of the old target that remains at each step, from 0 to 1; with ``shape=cosine`` its first
            value.
        shape: ``constant``, or ``cosine`` for a rise to 1 over the run, as in BYOL.
    """

    momentum: float = 0.99
    shape: str = "constant"

    def __post_init__(self) -> None:
        require_choice("method.ema.shape", self.shape, MOMENTUM_SHAPES)
        _require("method.ema.momentum", self.momentum, 0 <= self.momentum <= 1, "0 to 1")


def epoch_length(options: ScheduleOptions, whole_steps: int, *, images: int, batch: int) -> int | Fraction:
    """Return the steps per epoch that the functions below count with.

    Args:
        options: The ``schedule`` section of a recipe.
        whole_steps: Whole batches per epoch.
        images: Images of the data set.
        batch: Images per step.
    """
    return Fraction(images, batch) if options.fractional_epochs else whole_steps


def total_steps(options: ScheduleOptions, steps_per_epoch: int | Fraction) -> int:
    """Return the number of steps of the whole run.

    Args:
        options: The ``schedule`` section of a recipe.
        steps_per_epoch: The result of ``epoch_length``.

    Raises:
        ConfigError: No length is set, or the run is not longer than its warm-up.
    """
    if options.steps is not None:
        total = options.steps
    elif options.epochs is not None:
        total = math.floor(options.epochs * steps_per_epoch)
    else:
        raise ConfigError(
            "schedule",
            got="neither epochs nor steps",
            expected="one of them",
            fix="set schedule.epochs or schedule.steps",
        )
    if total < 1 or warmup_steps(options, steps_per_epoch) >= total:
        raise ConfigError(
            "schedule",
            got=f"{total} steps, with {options.warmup_epochs:g} warm-up epochs of {float(steps_per_epoch):g} steps",
            expected="a run that is longer than its warm-up",
            fix="raise schedule.epochs or lower schedule.warmup_epochs",
        )
    return total


def warmup_steps(options: ScheduleOptions, steps_per_epoch: int | Fraction) -> int:
    """Return the number of steps of the warm-up. Arguments are those of ``total_steps``."""
    if isinstance(steps_per_epoch, Fraction):
        return math.floor(Fraction(options.warmup_epochs) * steps_per_epoch)
    return round(options.warmup_epochs * steps_per_epoch)


def learning_rate(options: ScheduleOptions, step: int, *, peak: float, steps_per_epoch: int | Fraction) -> float:
    """Return the learning rate of an update, in the unit of ``peak``. It is constant after the end of the run.

    Args:
        options: The ``schedule`` section of a recipe.
        step: Number of the update, from 0.
        peak: Rate at the end of the warm-up, ``optim.lr``.
        steps_per_epoch: The result of ``epoch_length``.

    Raises:
        ConfigError: See ``total_steps``.
    """
    warmup = warmup_steps(options, steps_per_epoch)
    if step >= warmup:
        return _decayed(options, step, 0 if options.warmup == "factor" else warmup, peak, steps_per_epoch)
    last = max(1, warmup - 1) if options.warmup == "inclusive" else warmup
    rising = options.warmup_lr + (peak - options.warmup_lr) * step / last
    if options.warmup == "factor":
        rising *= _decayed(options, step, 0, peak, steps_per_epoch) / peak
    return rising


def _decayed(options: ScheduleOptions, step: int, start: int, peak: float, steps_per_epoch: int | Fraction) -> float:
    """The rate of an update in the decay, which begins at the step ``start``."""
    total, finished_epochs = total_steps(options, steps_per_epoch), step // steps_per_epoch
    if options.shape == "constant":
        return peak
    if options.shape == "steps":
        passed = sum(milestone <= finished_epochs for milestone in options.milestones)
        decayed: float = peak * options.gamma**passed
        return decayed
    if options.interval == "step":
        done: float = step - start
        length: float = total - start
    else:  # the epoch in which the warm-up ends counts from that end
        before = float(start / steps_per_epoch)
        done = max(0.0, finished_epochs - before)
        length = max(1.0, math.ceil(total / steps_per_epoch) - before)
    return options.final_lr + (peak - options.final_lr) * _half_cosine(done / length)


def target_momentum(options: EmaOptions, step: int, *, total: int) -> float:
    """Return tau in  target <- tau target + (1 - tau) online  after an update.

    Args:
        options: The method's ``ema`` options.
        step: Number of the update, from 0.
        total: Number of updates of the whole run.
    """
    if options.shape == "constant":
        return options.momentum
    return 1 - (1 - options.momentum) * _half_cosine(step / total)


def _half_cosine(share: float) -> float:
    """Fall from 1 to 0 along half a cosine while ``share`` goes from 0 to 1."""
    return (1 + math.cos(math.pi * min(1.0, share))) / 2


def _require(key: str, got: object, holds: bool, expected: str, fix: str = "") -> None:
    if not holds:
        raise ConfigError(key, got=got, expected=expected, fix=fix or f"set a value that is {expected}")
