"""Options of the fine-tuning evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, require_choice
from hpcssl.evals.common.options import EvalViewOptions
from hpcssl.evals.finetune.protocols import PERCENTS, PROTOCOLS, FinetuneProtocol, find_protocol
from hpcssl.evals.finetune.trainer import PRECISIONS


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(EvalViewOptions):
    """Options of fine-tuning. Options other than ``protocol`` replace the protocol's values where set.

    Attributes:
        view: Crop of the images that are scored, see ``EvalViewOptions``.
        interpolation: Filter of the resize; ``auto`` for the protocol's.
        forward_batch: Images that are scored at once. Not the batch of an optimizer step.
        protocol: Name of a published protocol, a key of ``protocols.PROTOCOLS``.
        percent: Percent of the labels, 1, 10 or 100, which selects the protocol's values. Unset, what the shard folder
            records; a folder that is no part of another one has 100. With 100, the values are those of 10.
        lr: Peak learning rate of the backbone in the protocol's unit, above 0. Together with ``head_lr``; the grid
            then has one trial for each number of epochs.
        head_lr: Peak learning rate of the head, likewise.
        epochs: Passes over the labeled images, at least 1.
        train_batch: Images per optimizer step over all ranks, at least 2.
        weight_decay: L2 penalty, 0 or more.
        held_out: Number of labeled images held out to judge the trials, at least 1, for a protocol that holds images
            out. Unset, BYOL's share of the set, see ``selection.draw_held_out``.
        precision: Precision of the training: ``fp32``; ``bf16`` or ``fp16`` for autocast; ``fp64`` to show that ranks
            agree up to rounding.
        seed: Seed of initial values, order, crops and held-out images.
    """

    protocol: str = "bsim"
    percent: int | None = None
    lr: float | None = None
    head_lr: float | None = None
    epochs: int | None = None
    train_batch: int | None = None
    weight_decay: float | None = None
    held_out: int | None = None
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        super().__post_init__()
        require_choice("evals.finetune.protocol", self.protocol, PROTOCOLS)
        require_choice("evals.finetune.precision", self.precision, PRECISIONS)
        if (self.lr is None) != (self.head_lr is None):
            given, other = ("head_lr", "lr") if self.lr is None else ("lr", "head_lr")
            raise ConfigError(
                f"evals.finetune.{given}",
                got=f"{getattr(self, given)} without {other}",
                expected="lr and head_lr, both or neither",
                fix=f"set {other} too, or remove {given} to use the protocol's values",
            )
        protocol = PROTOCOLS[self.protocol][1]
        pairs = len(protocol.rates) if self.lr is None else 1
        lengths = len(protocol.epochs) if self.epochs is None else 1
        holds_out = protocol.judge == "held_out" and pairs * lengths > 1
        for name, valid, expected in (
            ("percent", self.percent in (None, *PERCENTS), "1, 10 or 100"),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "above 0"),
            ("head_lr", self.head_lr is None or 0 < self.head_lr < math.inf, "above 0"),
            ("epochs", self.epochs is None or self.epochs >= 1, "1 or more"),
            ("train_batch", self.train_batch is None or self.train_batch >= 2, "2 or more"),
            ("weight_decay", self.weight_decay is None or self.weight_decay >= 0, "0 or more"),
            ("held_out", self.held_out is None or self.held_out >= 1, "1 or more"),
            ("held_out", self.held_out is None or holds_out, "a protocol that chooses among trials on images held out"),
        ):
            if not valid:
                raise ConfigError(
                    f"evals.finetune.{name}",
                    got=getattr(self, name),
                    expected=expected,
                    fix=f"remove {name} to use the protocol's value",
                )

    def resolve(self, data: ShardSet) -> FinetuneProtocol:
        """Return the protocol for a set of labeled images, with the options that are set in place of its values."""
        values: dict[str, Any] = {
            "rates": None if self.lr is None else ((self.lr, self.head_lr),),
            "epochs": None if self.epochs is None else (self.epochs,),
            "batch": self.train_batch,
            "weight_decay": self.weight_decay,
        }
        return replace(
            find_protocol(self.protocol, self.percent, data),
            **{name: value for name, value in values.items() if value is not None},
        )
