"""Options of the linear evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from hpcssl.errors import ConfigError, require_choice
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.linear.protocols import AUGMENTS, PROTOCOLS, LinearProtocol


@dataclass(frozen=True, kw_only=True)
class LinearOptions(FeatureOptions):
    """Options of the linear evaluation. Options other than ``protocol`` replace the protocol's values where set.

    Attributes:
        view: Crop of the images that are scored, see ``EvalViewOptions``.
        interpolation: Filter of the resize; ``auto`` for the protocol's.
        forward_batch: Images per forward pass of the backbone, in training too. Not the batch of an optimizer step.
        precision: Precision of the forward pass, see ``FeatureOptions``.
        feature_dtype: Precision of stored features, see ``FeatureOptions``.
        protocol: Name of a published protocol, a key of ``protocols.PROTOCOLS``.
        lr: Peak learning rate in the protocol's unit (as it is, or per 256 images), above 0. One rate, so no sweep.
        lr_sweep: Peak learning rates to choose among on held-out training images, in the protocol's unit, each above
            0. Not together with ``lr``; an empty list for no sweep.
        weight_decay: L2 penalty of the head, 0 or more.
        train_batch: Images per optimizer step of the head, at least 1.
        epochs: Passes over the training set, at least 1.
        milestones: Epochs after which the rate falls to a tenth, rising, from 1, instead of the protocol's schedule. An
            empty list for the cosine.
        augment: ``rrc_flip`` for new random crops with flips in every epoch, ``center`` for stored center crops.
        held_out: Number of training images that are held out to judge a sweep, at least 1. Unset, BYOL's share of the
            set, see ``selection.draw_held_out``.
        seed: Seed of initial values, order, crops and held-out images.
    """

    protocol: str = "msf"
    lr: float | None = None
    lr_sweep: list[float] | None = None
    weight_decay: float | None = None
    train_batch: int | None = None
    epochs: int | None = None
    milestones: list[int] | None = None
    augment: str | None = None
    held_out: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        super().__post_init__()
        require_choice("evals.linear.protocol", self.protocol, PROTOCOLS)
        if self.augment is not None:
            require_choice("evals.linear.augment", self.augment, AUGMENTS)
        milestones = self.milestones or []
        for name, valid, expected in (
            ("lr", self.lr is None or 0 < self.lr < math.inf, "above 0"),
            ("lr_sweep", all(0 < rate < math.inf for rate in self.lr_sweep or ()), "rates above 0"),
            ("lr_sweep", self.lr_sweep is None or self.lr is None, "lr or lr_sweep, not both"),
            ("weight_decay", self.weight_decay is None or self.weight_decay >= 0, "0 or more"),
            ("train_batch", self.train_batch is None or self.train_batch >= 1, "1 or more"),
            ("epochs", self.epochs is None or self.epochs >= 1, "1 or more"),
            ("milestones", all(a < b for a, b in pairwise([0, *milestones])), "rising numbers of epochs, from 1"),
            ("held_out", self.held_out is None or self.held_out >= 1, "1 or more"),
            ("held_out", self.held_out is None or bool(self.resolve().lr_sweep), "a protocol with a sweep of rates"),
        ):
            if not valid:
                raise ConfigError(
                    f"evals.linear.{name}",
                    got=getattr(self, name),
                    expected=expected,
                    fix=f"remove {name} to use the protocol's value",
                )

    def resolve(self) -> LinearProtocol:
        """Return the protocol with the options that are set in place of its values."""
        values: dict[str, Any] = {
            "lr": self.lr,
            "lr_sweep": () if self.lr is not None else self.lr_sweep,
            "weight_decay": self.weight_decay,
            "batch": self.train_batch,
            "epochs": self.epochs,
            "milestones": self.milestones,
            "augment": self.augment,
        }
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
        return replace(PROTOCOLS[self.protocol], **values)
