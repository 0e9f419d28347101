"""Named augmentations, each in two parts: parameters drawn per view (NumPy), and their batched application (torch).

The loader crops and resizes, because that shrinks the image. Everything after it runs on whole batches on the training
device. All randomness of a view is in one record of ``PARAMS``, drawn with the key
``rng.key(seed, "view", epoch, sample, view)``. It does not depend on the rank, the thread or earlier draws.

The order of operations is that of all the papers: crop, jitter, gray, blur, solarize, normalize. A flip commutes with
each of them.

Letters in shapes: B samples, S pixels per side.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.views import boxes, ops
from hpcssl.views.blur import KERNELS
from hpcssl.views.kernels import augment as kernel

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's red, green and blue channels on the scale 0-1."""

PARAMS = np.dtype(
    [
        ("box", "<i4", (4,)),  # top, left, height, width in pixels of the source; the whole image for a center crop
        ("flip", "?"),
        ("jitter", "?"),
        ("order", "u1", (4,)),  # place p applies operation order[p]: 0 brightness, 1 contrast, 2 saturation, 3 hue
        ("factors", "<f4", (4,)),  # indexed by operation; 1, 1, 1, 0 change nothing
        ("gray", "?"),
        ("sigma", "<f4"),  # of the blur, in pixels of the view; 0 = no blur
        ("solarize", "?"),
    ]
)
"""The augmentation parameters of one view."""
_pack = struct.Struct("<4i??4B4f?f?").pack  # the same record: ten times faster to fill than through NumPy


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The numbers that define an augmentation. Probabilities lie in [0, 1]; areas are fractions of the image's area.

    Attributes:
        crop: Kind of crop. ``random`` is torchvision's RandomResizedCrop. ``center`` resizes the short side to ``zoom``
            times the view's size and takes the center. ``squash`` resizes the short side likewise, and then the whole
            image to a square, so that its aspect ratio is lost (in one resize with ``zoom`` 1).
        scale: Smallest and largest area of a random crop.
        ratio: Smallest and largest aspect ratio, width / height, of a random crop.
        zoom: Size after the resize of ``center`` and ``squash`` crops, in units of the view's size; 1 or more.
        interpolation: ``bilinear`` or ``bicubic``.
        library: Whose operations are meant. ``torchvision``: its crop, antialiased resize and color operations.
            ``deepmind``: those of BYOL's authors. A crop that does not fit is clipped (``boxes``), the resize, which
            must be bicubic, is not antialiased, the brightness is a summand, and each channel has its own contrast
            (``color``).
        flip: Probability of a horizontal flip.
        jitter: Strengths of brightness, contrast, saturation and hue, as torchvision's ColorJitter takes them.
        jitter_p: Probability of the color jitter.
        order: Order of the four jitter operations: ``random`` for each view, or ``fixed`` as listed above.
        gray: Probability of a conversion to gray.
        blur: Probability of a Gaussian blur.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels of the view.
        blur_kernel: ``pil`` is Pillow's GaussianBlur, three box blurs. ``tenth`` is a Gaussian, a tenth of the view's
            side wide, made odd, with the edges mirrored; ``tenth_zeros`` the same with zeros beyond the edges. See
            ``hpcssl.views.blur``.
        solarize: Probability of inverting the pixels above one half.

    Raises:
        ConfigError: If a value is out of its range.
    """

    crop: str = "random"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    zoom: float = 256 / 224
    interpolation: str = "bilinear"
    library: str = "torchvision"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    order: str = "random"
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: str = "pil"
    solarize: float = 0.0

    def __post_init__(self) -> None:
        for field, allowed in (
            ("crop", ("random", "center", "squash")),
            ("interpolation", ("bilinear", "bicubic")),
            ("library", ("torchvision",) if self.interpolation == "bilinear" else ("torchvision", "deepmind")),
            ("order", ("random", "fixed")),
            ("blur_kernel", KERNELS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError(
                    f"augmentation {field}",
                    got=repr(value),
                    expected=" or ".join(allowed),
                    fix=f"set {field}={allowed[0]}",
                )
        for field in ("flip", "jitter_p", "gray", "blur", "solarize"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise ConfigError(
                    f"augmentation {field}",
                    got=value,
                    expected="a probability from 0 to 1",
                    fix=f"set {field} to a number from 0 to 1",
                )
        for field, low, high in (("scale", 0, 1), ("ratio", 0, math.inf), ("blur_sigma", 0, math.inf)):
            first, last = getattr(self, field)
            if not (low < first <= last <= high):
                raise ConfigError(
                    f"augmentation {field}",
                    got=f"({first}, {last})",
                    expected=f"two numbers in rising order, above {low} and at most {high}",
                    fix=f"set {field} to such a pair",
                )
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ConfigError(
                "augmentation jitter",
                got=self.jitter,
                expected="four strengths from 0, the last (hue) at most 0.5",
                fix="set jitter to the strengths of brightness, contrast, saturation, hue",
            )
        if self.zoom < 1:
            raise ConfigError(
                "augmentation zoom", got=self.zoom, expected="1 or more", fix="set zoom=1 for the largest center crop"
            )


_CROP = Augmentation(scale=(0.08, 1.0), interpolation="bicubic")
_STRONG = Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2, blur=0.5)
_BYOL = replace(_CROP, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2)
_DEEPMIND = replace(_BYOL, library="deepmind", blur_kernel="tenth_zeros")

AUGMENTATIONS: dict[str, Augmentation] = {
    "weak": Augmentation(),  # MSF's target view: train_msf.py:265-270
    "strong": _STRONG,  # MSF's query view: train_msf.py:253-263
    "moco_v2": _STRONG,  # main_moco.py:226-236, the same numbers
    "simclr": replace(_CROP, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray=0.2, blur=0.5, blur_kernel="tenth"),
    "byol_1": replace(_DEEPMIND, blur=1.0),
    "byol_2": replace(_DEEPMIND, blur=0.1, solarize=0.2),
    "crop_only": replace(_CROP, flip=0.0, library="deepmind"),
    "byol_oss_1": replace(_BYOL, blur=1.0),  # the same numbers with OpenSelfSup's operations
    "byol_oss_2": replace(_BYOL, blur=0.1, solarize=0.2),
    # CIFAR-size images: MoCo's demo and lightly's benchmark, which leave the blur out
    "small": Augmentation(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2),
    "small_simsiam": Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2),  # the same with crops from 0.2
    "simclr_oss": replace(
        _STRONG, scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2)
    ),  # OpenSelfSup's, which BSIM starts from
    "swav": replace(_STRONG, scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2)),  # the same numbers, main_swav's pipeline
    # main_moco.py without --aug-plus. Gray comes before the jitter there, which differs only where values are clipped
    "moco_v1": Augmentation(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray=0.2),
    "imagenette": replace(_STRONG, scale=(0.08, 1.0)),  # lightly's benchmark at 128 pixels
    "digits": Augmentation(scale=(0.3, 1.0), flip=0.0, jitter=(0.4, 0.0, 0.0, 0.0), jitter_p=1.0),
    "digits_weak": Augmentation(scale=(0.3, 1.0), flip=0.0),  # the crops of "digits" alone, for weak targets
    "eval": Augmentation(crop="center", flip=0.0),
    "eval_whole": Augmentation(crop="center", zoom=1.0, flip=0.0),  # square images that already have the view's size
    # VISSL's and OpenSelfSup's SVMs: Resize(256), Resize((224, 224)); VISSL's low-shot SVMs: the latter alone
    "eval_squash": Augmentation(crop="squash", flip=0.0),
    "eval_squash_once": Augmentation(crop="squash", zoom=1.0, flip=0.0),
}
"""All augmentations by the names that recipes use, with the source of their numbers."""


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view that the loader cuts.

    Attributes:
        name: Name of the view.
        augment: How the view is augmented.
        size: Side in pixels.
        second: Whether the view shows the second modality (``KEY.b.*``).
    """

    name: str
    augment: Augmentation
    size: int
    second: bool = False


# Places in the 36 uniform numbers of a view. A new operation gets a new place, so that old draws do not change.
# The first 22 are those of the crop, see ``boxes``.
_FLIP, _JITTER, _ORDER, _FACTOR = 22, 23, 24, 28
_GRAY, _BLUR, _SIGMA, _SOLARIZE, _COUNT = 32, 33, 34, 35, 36


def draw_params(augment: Augmentation, key: int, height: int, width: int) -> np.void:
    """Draw all parameters of one view. A pure function of its arguments.

    Args:
        augment: The augmentation.
        key: Random key of the view.
        height: Height of the source image in pixels.
        width: Width of the source image in pixels.

    Returns:
        One record of ``PARAMS``, read-only.
    """
    u = rng.uniform(key, _COUNT).tolist()
    box = (0, 0, height, width)
    if augment.crop == "random":
        rule = boxes.clipped_box if augment.library == "deepmind" else boxes.random_box
        box = rule(u, height, width, augment.scale, augment.ratio)
    jitter = u[_JITTER] < augment.jitter_p
    order: tuple[int, ...] = (0, 1, 2, 3)
    factors: tuple[float, ...] = (1.0, 1.0, 1.0, 0.0)
    if jitter:
        if augment.order == "random":
            order = tuple(sorted(order, key=lambda op: u[_ORDER + op]))
        factors = tuple(_jitter_factor(augment, op, u[_FACTOR + op]) for op in range(4))
    sigma = 0.0
    if u[_BLUR] < augment.blur:
        low, high = augment.blur_sigma
        sigma = low + (high - low) * u[_SIGMA]
    record = _pack(
        *box,
        u[_FLIP] < augment.flip,
        jitter,
        *order,
        *factors,
        u[_GRAY] < augment.gray,
        sigma,
        u[_SOLARIZE] < augment.solarize,
    )
    params: np.void = np.frombuffer(record, PARAMS)[0]
    return params


def _jitter_factor(augment: Augmentation, op: int, u: float) -> float:
    """A factor from ColorJitter's ranges, max(0, 1 - s) .. 1 + s; or a summand from -s .. s.

    The hue (operation 3) has a summand, and with DeepMind's operations also the brightness (operation 0).
    """
    strength, is_sum = augment.jitter[op], op == 3 or (op == 0 and augment.library == "deepmind")
    low, high = (-strength, strength) if is_sum else (max(0.0, 1 - strength), 1 + strength)
    return low + (high - low) * u


def augment_batch(
    images: torch.Tensor,
    params: npt.NDArray[np.void],
    augment: Augmentation,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    fast: bool = False,
) -> torch.Tensor:
    """Apply everything after the crop, on the device of ``images``.

    Each row depends on its own image and parameters alone. Values stay float until the end; PIL would round to 8 bits
    between two operations.

    Args:
        images: uint8 [B, S, S, 3], crops as the loader gives them.
        params: ``PARAMS`` [B], one record per image.
        augment: The augmentation that the parameters were drawn for.
        mean: Per channel, on the scale 0-1.
        std: Per channel, on the scale 0-1.
        dtype: Type of the result.
        fast: Whether images on a GPU are augmented by the kernels that ``kernels.selection`` has tried, where they are
            written for ``dtype``.

    Returns:
        ``dtype`` [B, 3, S, S] in channels_last memory.

    Raises:
        ValueError: If ``images`` or ``params`` have another shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(params) != len(images):
        raise ValueError(
            f"augment_batch expects uint8 [B, S, S, 3] and B rows of parameters, got {images.dtype} "
            f"{tuple(images.shape)} and {len(params)} rows"
        )
    run = kernel.run if fast and images.device.type == "cuda" and dtype in kernel.DTYPES else ops.run_pipeline
    return run(images, params, augment.library, augment.blur_kernel, mean, std, dtype)
