"""A frozen backbone as the evaluations use it: strictly loaded, with the header of its weights file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpcssl.distributed.world import World
from hpcssl.errors import EvalError
from hpcssl.evals.common.options import PRECISIONS, EvalViewOptions
from hpcssl.nets import importers, resnet, weights
from hpcssl.nets.importers import WeightsSource
from hpcssl.views import augment
from hpcssl.views.augment import AUGMENTATIONS, ViewSpec


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen backbone and what identifies it.

    Attributes:
        backbone: The network without its heads, in eval mode; [B, 3, S, S] images to [B, D] features.
        meta: The header of the weights file: ``arch``, ``mean``, ``std``, ``size`` (pixels), ``step``, ``fingerprint``,
            ``method``.
        sha256: Digest of the weights file and of the choices made when it was read. Part of each evaluation's identity.
        path: The weights file.
    """

    backbone: nn.Module
    meta: dict[str, Any]
    sha256: str
    path: Path

    @classmethod
    def open(cls, path: WeightsSource | Path | str, world: World) -> FrozenEncoder:
        """Load a weights file of this project or another one onto the device of ``world``.

        Raises:
            EvalError: The file cannot be read, or its keys and shapes do not fit an architecture exactly.
        """
        source = WeightsSource.coerce(path)
        backbone, meta = importers.load(source)
        backbone = backbone.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch
        return cls(backbone, meta, source.sha256, Path(source.path))

    @property
    def width(self) -> int:
        """Number of features per image, D."""
        return int(getattr(self.backbone, "width", None) or resnet.feature_width(self.backbone))

    def view(self, options: EvalViewOptions) -> ViewSpec:
        """The crop that the options ask for, at the image size of the weights file."""
        size, name, interpolation = self.meta["size"], options.view, options.interpolation
        if name == "auto":
            name = "eval" if size > weights.WHOLE_IMAGE_MAX_SIZE else "eval_whole"
        named = (
            AUGMENTATIONS[name]
            if interpolation == "auto"
            else replace(AUGMENTATIONS[name], interpolation=interpolation)
        )
        return ViewSpec(name=name, augment=named, size=size)

    @torch.no_grad()
    def encode(self, images: Tensor, params: npt.NDArray[np.void], view: ViewSpec, precision: str) -> Tensor:
        """Compute the features of a batch.

        Args:
            images: uint8 [B, S, S, 3], cropped and resized by the loader.
            params: Structured array [B] of the drawn augmentation parameters (``augment.PARAMS``).
            view: The view that the images were cut for.
            precision: A key of ``PRECISIONS``.

        Returns:
            fp32 features [B, D] on the device of the encoder.
        """
        device = next(self.backbone.parameters()).device
        x = augment.augment_batch(
            images.to(device, non_blocking=True), params, view.augment, mean=self.meta["mean"], std=self.meta["std"]
        )
        dtype = PRECISIONS[precision]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            features: Tensor = self.backbone(x).float()
        return features

    def check_finite(self, features: Tensor, names: Sequence[str], precision: str) -> None:
        """Raise ``EvalError`` if a feature is NaN or infinite.

        Args:
            features: [B, D].
            names: What the rows belong to, for the message.
            precision: Precision of the forward pass; fp16 overflows where the weights are sound.
        """
        finite = torch.isfinite(features).all(1)
        if not finite.all():
            if precision == "fp16":
                fix = "compute them with bf16 or fp32: fp16 has no numbers above 65504"
            elif self.meta["step"] is None:
                fix = "copy or download the weights again, and check --mean and --std"
            else:
                fix = "use the weights of an earlier step, since this training has diverged"
            raise EvalError(
                f"features by {self.path}",
                got=f"NaN or infinity for {names[int((~finite).nonzero()[0, 0])]}",
                expected="finite numbers",
                fix=fix,
            )
