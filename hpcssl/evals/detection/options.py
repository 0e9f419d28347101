"""Options of the detection evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hpcssl.errors import ConfigError, require_choice
from hpcssl.evals.detection.protocols import PROTOCOLS, DetectionProtocol

_MINIMUM: dict[str, float] = {
    "iterations": 1,
    "warmup_iterations": 0,
    "train_batch": 1,
    "lr": 0.0,
    "test_size": 1,
    "max_size": 1,
    "precise_bn_batches": 0,
    "milestones": 1,
    "train_sizes": 1,
    "anchor_sizes": 1,
    "proposals": 1,
    "regions_per_image": 1,
}


@dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """Options of object detection. Options other than ``protocol`` replace the protocol's values where set.

    Attributes:
        protocol: Name of a published protocol, a key of ``protocols.PROTOCOLS``.
        iterations: Optimizer steps, at least 1. Without ``milestones``, moves the protocol's in proportion.
        milestones: Iterations after which the learning rate falls to a tenth; an empty list for none.
        warmup_iterations: Iterations of the linear warm-up; 0 for none.
        train_batch: Images per iteration over all ranks, at least 1.
        lr: Peak learning rate, 0 or more.
        train_sizes: Short sides of training images in pixels, of which one is drawn per image.
        test_size: Short side of test images in pixels.
        max_size: Largest long side in pixels.
        anchor_sizes: Sizes of anchors in pixels; for the FPN one per level.
        proposals: Proposals per image kept after non-maximum suppression, in training and testing.
        regions_per_image: Proposals per image that train the head.
        precise_bn_batches: Batches over which the statistics of the norms are re-estimated at the end; 0 for none.
        seed: Seed of initial values, order, sizes, flips, and of the sampled anchors and regions.
    """

    protocol: str = "voc_c4"
    iterations: int | None = None
    milestones: list[int] | None = None
    warmup_iterations: int | None = None
    train_batch: int | None = None
    lr: float | None = None
    train_sizes: list[int] | None = None
    test_size: int | None = None
    max_size: int | None = None
    anchor_sizes: list[int] | None = None
    proposals: int | None = None
    regions_per_image: int | None = None
    precise_bn_batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        require_choice("evals.detect.protocol", self.protocol, PROTOCOLS)
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is None or (name == "milestones" and not value):
                continue
            if value == [] or not all(v >= minimum for v in (value if isinstance(value, list) else [value])):
                raise ConfigError(
                    f"evals.detect.{name}",
                    got=value,
                    expected=f"{minimum} or more",
                    fix=f"remove {name} to use the protocol's value",
                )

    def resolve(self) -> DetectionProtocol:
        """Return the protocol with the options that are set in place of its values."""
        known = PROTOCOLS[self.protocol]
        values: dict[str, Any] = {
            "iterations": self.iterations,
            "milestones": self.milestones,
            "warmup": self.warmup_iterations,
            "batch": self.train_batch,
            "lr": self.lr,
            "train_sizes": self.train_sizes,
            "test_size": self.test_size,
            "max_size": self.max_size,
            "anchor_sizes": self.anchor_sizes,
            "precise_bn": self.precise_bn_batches,
            "regions": self.regions_per_image,
            "after": None if self.proposals is None else (self.proposals, self.proposals),
        }
        if self.iterations is not None and self.milestones is None:
            values["milestones"] = [m * self.iterations // known.iterations for m in known.milestones]
        return replace(known, **{name: value for name, value in values.items() if value is not None})
