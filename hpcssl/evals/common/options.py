"""Options that several evaluations share: how an image becomes the input of the network, and how features are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpcssl.errors import ConfigError, require_choice
from hpcssl.views.augment import AUGMENTATIONS

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision of a forward pass: the autocast dtype, None for no autocast."""
FEATURE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""Precision in which finished features are stored."""


@dataclass(frozen=True, kw_only=True)
class EvalViewOptions:
    """How an image is shown to the network. Base class of the options of the image-classification evaluations.

    Attributes:
        view: Crop of the images that are scored, by name. ``auto`` is ``eval`` (short side resized to 256/224 of the
            network's image size, then a center crop) for networks with images above 64 pixels, and ``eval_whole``
            (short side resized to the image size, then a center crop) up to 64 pixels.
        interpolation: Filter of the resize: ``bilinear``, ``bicubic``, or ``auto`` for that of the protocol, which is
            bilinear where the protocol does not specify one.
        forward_batch: Images per forward pass of the frozen or scored network, at least 1. It bounds the memory. The
            batch of an optimizer step is ``train_batch``.
    """

    view: str = "auto"
    interpolation: str = "auto"
    forward_batch: int = 128

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        views = (name for name, augment in AUGMENTATIONS.items() if augment.crop != "random")
        require_choice("evaluation option view", self.view, ("auto", *views))
        require_choice("evaluation option interpolation", self.interpolation, ("auto", "bilinear", "bicubic"))
        if self.forward_batch < 1:
            raise ConfigError(
                "evaluation option forward_batch",
                got=self.forward_batch,
                expected="at least 1",
                fix="set forward_batch=128",
            )


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(EvalViewOptions):
    """How features are computed and stored. Base class of the options of the evaluations on frozen features.

    Attributes:
        view: Crop of the images, see ``EvalViewOptions``.
        interpolation: Filter of the resize, see ``EvalViewOptions``.
        forward_batch: Images per forward pass, see ``EvalViewOptions``.
        precision: Precision of the forward pass: ``fp32``, or ``bf16`` or ``fp16`` for autocast.
        feature_dtype: Precision in which finished features are stored: ``fp32`` or ``fp16``. ``fp16`` takes half the
            space and rounds each feature to 11 significant bits, as the k-NN of MSF does (``eval_knn.py``: faiss with
            ``useFloat16``).
    """

    precision: str = "fp32"
    feature_dtype: str = "fp32"

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        super().__post_init__()
        require_choice("evaluation option precision", self.precision, PRECISIONS)
        require_choice("evaluation option feature_dtype", self.feature_dtype, FEATURE_DTYPES)
