"""Learning rate and target momentum as pure functions of the step. No torch, no state: nothing to save.

    t step from 0, T steps in all, w warm-up steps, S steps per epoch, e = floor(t / S) + 1 epoch from 1, E epochs

    warm-up     start + (peak - start) t / w                           t < w      SimCLR, BYOL, NNCLR, SwAV
    cosine      final + (peak - final) (1 + cos(pi u)) / 2
      per step      u = (t - w) / (T - w)                                         SimCLR, BYOL, SwAV
      per epoch     u = (e - 1 - w/S) / (E - w/S)                                 MSF, CMSF, MoCo v2, SimSiam
    steps       peak gamma^(milestones m, in epochs, with m <= e - 1)             linear evaluation
    constant    peak
    momentum    tau0, or 1 - (1 - tau0) (cos(pi t / T) + 1) / 2                   MSF, MoCo; BYOL
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

from hpcssl.errors import ConfigError, nearest

SHAPES = ("cosine", "constant", "steps")
PERS = ("epoch", "step")
MOMENTUM_SHAPES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The run's length, and how the learning rate goes along it. Rates are in the unit of ``optim.lr``.

    Give ``epochs`` or ``steps``. The decay moves ``per`` epoch or step; the warm-up always moves per step.
    ``milestones`` (epochs already done) and ``gamma`` belong to ``shape="steps"``, ``final_lr`` to ``cosine``.
    """

    epochs: Optional[int] = None  # noqa: UP045 - OmegaConf reads this form on every Python we run on
    steps: Optional[int] = None  # noqa: UP045
    shape: str = "cosine"
    per: str = "epoch"
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    final_lr: float = 0.0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1

    def __post_init__(self):
        _choice("schedule.shape", self.shape, SHAPES)
        _choice("schedule.per", self.per, PERS)
        _need("schedule.epochs", self.epochs, self.epochs is None or self.epochs >= 1, "1 or more")
        _need("schedule.steps", self.steps, self.steps is None or self.steps >= 1, "1 or more")
        _need("schedule.steps", f"{self.steps} with {self.epochs} epochs", None in (self.steps, self.epochs),
              "one of the two", "set the other to null: schedule.epochs=null or schedule.steps=null")
        for name in ("warmup_epochs", "warmup_lr", "final_lr"):
            value = getattr(self, name)
            _need(f"schedule.{name}", value, 0 <= value < math.inf, "0 or more")
        _need("schedule.gamma", self.gamma, 0 < self.gamma <= 1, "above 0, up to 1")
        _need("schedule.milestones", list(self.milestones),
              all(a < b for a, b in zip([0, *self.milestones], self.milestones, strict=False)),
              "growing, from 1")
        _need("schedule.milestones", list(self.milestones), bool(self.milestones) == (self.shape == "steps"),
              "milestones with schedule.shape=steps, and only then", "set schedule.shape and schedule.milestones")
        _need("schedule.final_lr", self.final_lr, self.final_lr == 0 or self.shape == "cosine",
              "0, since only a cosine ends there", "set schedule.shape=cosine")


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Momentum of the target network: ``constant``, or BYOL's ``cosine`` from ``momentum`` up to 1."""

    momentum: float = 0.99
    shape: str = "constant"

    def __post_init__(self):
        _choice("the target's momentum shape", self.shape, MOMENTUM_SHAPES)
        _need("the target's momentum", self.momentum, 0 <= self.momentum <= 1, "0 to 1")


def total_steps(options: ScheduleOptions, steps_per_epoch: int) -> int:
    """Steps of the whole run. Raises ``ConfigError`` where none were asked for, or the warm-up is no shorter."""
    if options.steps is None and options.epochs is None:
        raise ConfigError("schedule", got="neither epochs nor steps", expected="one of them",
                          mend="set schedule.epochs or schedule.steps")
    total = options.steps if options.steps is not None else options.epochs * steps_per_epoch
    if total < 1 or warmup_steps(options, steps_per_epoch) >= total:
        raise ConfigError("schedule", got=f"{total} steps, {options.warmup_epochs:g} warm-up epochs of "
                          f"{steps_per_epoch} steps", expected="a run that is longer than its warm-up",
                          mend="raise schedule.epochs or lower schedule.warmup_epochs")
    return total


def warmup_steps(options: ScheduleOptions, steps_per_epoch: int) -> int:
    return round(options.warmup_epochs * steps_per_epoch)


def learning_rate(options: ScheduleOptions, step: int, *, peak: float, steps_per_epoch: int) -> float:
    """Rate of the update number ``step`` (from 0), in the unit of ``peak`` = ``optim.lr``. Constant past the end."""
    total, warm = total_steps(options, steps_per_epoch), warmup_steps(options, steps_per_epoch)
    if step < warm:
        return options.warmup_lr + (peak - options.warmup_lr) * step / warm
    epochs_done = step // steps_per_epoch
    if options.shape == "constant":
        return peak
    if options.shape == "steps":
        return peak * options.gamma ** sum(m <= epochs_done for m in options.milestones)
    if options.per == "step":
        done, whole = step - warm, total - warm
    else:  # an epoch that the warm-up ends in counts from the warm-up's end
        done = max(0.0, epochs_done - warm / steps_per_epoch)
        whole = max(1.0, math.ceil(total / steps_per_epoch) - warm / steps_per_epoch)
    return options.final_lr + (peak - options.final_lr) * _falling(done / whole)


def target_momentum(options: EmaOptions, step: int, *, total: int) -> float:
    """tau in  target = tau target + (1 - tau) online  after the update number ``step`` (from 0) of ``total``."""
    if options.shape == "constant":
        return options.momentum
    return 1 - (1 - options.momentum) * _falling(step / total)


def _falling(part: float) -> float:
    """From 1 to 0 along half a cosine while ``part`` goes from 0 to 1."""
    return (1 + math.cos(math.pi * min(1.0, part))) / 2


def _choice(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ConfigError(what, got=repr(got), expected=" or ".join(known), mend=nearest(str(got), known))


def _need(what: str, got: object, holds: bool, expected: str, mend: str = "") -> None:
    if not holds:
        raise ConfigError(what, got=got, expected=expected, mend=mend or f"set a value that is {expected}")
