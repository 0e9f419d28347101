"""Named augmentations. Each is a *draw* (numpy, by address, in the loader) and an *apply* (batched, on the device).

The loader crops and resizes, since that shrinks the image; everything after it runs on whole batches. All randomness
of a view is in one row of ``PARAMS``, drawn at ``rng.key(seed, "view", epoch, sample, view)``: it depends on no rank,
thread or earlier draw. The order of operations is the one of all the papers: crop, jitter, gray, blur, solarize,
normalise; a flip commutes with each of them.

Shapes: B samples, S pixels a side.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.views import ops

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PARAMS = np.dtype(
    [
        ("box", "<i4", (4,)),  # top, left, height, width in the source's pixels; the whole image for a centre crop
        ("flip", "?"),
        ("jitter", "?"),
        ("order", "u1", (4,)),  # place p applies operation order[p]: 0 brightness, 1 contrast, 2 saturation, 3 hue
        ("factors", "<f4", (4,)),  # indexed by operation; 1, 1, 1, 0 change nothing
        ("gray", "?"),
        ("sigma", "<f4"),  # of the blur, in pixels of the view; 0 = no blur
        ("solarize", "?"),
    ]
)
_pack = struct.Struct("<4i??4B4f?f?").pack  # the same record: ten times faster to fill than through NumPy


@dataclass(frozen=True, kw_only=True)
class Augment:
    """One augmentation as numbers. Probabilities in [0, 1]; areas as shares of the image's.

    ``crop``: ``random`` is torchvision's RandomResizedCrop; ``center`` resizes the short side to ``zoom`` times the
    view's size and takes the centre; ``squash`` resizes to the same size, and from there the whole image into the
    square, its aspect lost (with ``zoom`` 1 at once). ``jitter``: strengths of brightness, contrast, saturation, hue,
    as ColorJitter takes them. ``blur_kernel``: ``pil`` for a Gaussian of this sigma with the edge pixels repeated,
    ``tenth`` for a kernel of a tenth of the view's side, made odd, with the edges mirrored; see ``ops.blur_matrix``.
    """

    crop: str = "random"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    zoom: float = 256 / 224
    interpolation: str = "bilinear"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    order: str = "random"
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: str = "pil"
    solarize: float = 0.0

    def __post_init__(self):
        for field, allowed in (("crop", ("random", "center", "squash")), ("interpolation", ("bilinear", "bicubic")),
                               ("order", ("random", "fixed")), ("blur_kernel", ("pil", "tenth"))):
            if getattr(self, field) not in allowed:
                raise ConfigError(f"augmentation {field}", got=repr(getattr(self, field)),
                                  expected=" or ".join(allowed), mend=f"set {field}={allowed[0]}")
        for field in ("flip", "jitter_p", "gray", "blur", "solarize"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"augmentation {field}", got=getattr(self, field),
                                  expected="a probability from 0 to 1", mend=f"set {field} to one")
        for field, low, high in (("scale", 0, 1), ("ratio", 0, math.inf), ("blur_sigma", 0, math.inf)):
            first, last = getattr(self, field)
            if not (low < first <= last <= high):
                raise ConfigError(f"augmentation {field}", got=f"({first}, {last})",
                                  expected=f"two numbers in rising order, above {low}, at most {high}",
                                  mend=f"set {field} to such a pair")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ConfigError("augmentation jitter", got=self.jitter,
                              expected="four strengths from 0, the last (hue) at most 0.5",
                              mend="set jitter to brightness, contrast, saturation, hue")
        if self.zoom < 1:
            raise ConfigError("augmentation zoom", got=self.zoom, expected="1 or more",
                              mend="set zoom=1 for the largest centre crop")


_CROP = Augment(scale=(0.08, 1.0), interpolation="bicubic")
_STRONG = Augment(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2, blur=0.5)
_BYOL = replace(_CROP, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur_kernel="tenth")

NAMED: dict[str, Augment] = {
    "weak": Augment(),  # MSF's target view: train_msf.py:265-270
    "strong": _STRONG,  # MSF's query view: train_msf.py:253-263
    "moco_v2": _STRONG,  # main_moco.py:226-236, the same numbers
    "simclr": replace(_CROP, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray=0.2, blur=0.5, blur_kernel="tenth"),
    "byol_1": replace(_BYOL, blur=1.0),
    "byol_2": replace(_BYOL, blur=0.1, solarize=0.2),
    "crop_only": replace(_CROP, flip=0.0),
    # CIFAR-size images: MoCo's demo and lightly's benchmark, which leave the blur out
    "small": Augment(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2),
    "small_simsiam": Augment(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2),  # the same with crops from 0.2
    "simclr_oss": replace(_STRONG, scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2)),  # OpenSelfSup's, the base of BSIM
    "swav": replace(_STRONG, scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2)),  # the same numbers, main_swav's pipeline
    # main_moco.py without --aug-plus; gray comes before the jitter there, which only clipping can tell
    "moco_v1": Augment(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray=0.2),
    "imagenette": replace(_STRONG, scale=(0.08, 1.0)),  # lightly's benchmark at 128 pixels
    "digits": Augment(scale=(0.3, 1.0), flip=0.0, jitter=(0.4, 0.0, 0.0, 0.0), jitter_p=1.0),
    "eval": Augment(crop="center", flip=0.0),
    "eval_whole": Augment(crop="center", zoom=1.0, flip=0.0),  # square images that already have the view's size
    # VISSL's and OpenSelfSup's SVMs: Resize(256), Resize((224, 224)); VISSL's low-shot SVMs: the latter alone
    "eval_squash": Augment(crop="squash", flip=0.0),
    "eval_squash_once": Augment(crop="squash", zoom=1.0, flip=0.0),
}


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view that the loader cuts: its name, augmentation, side in pixels, and whether it shows ``KEY.b.*``."""

    name: str
    augment: Augment
    size: int
    second: bool = False


# Places in the 36 uniform numbers of a view. A place is never re-used, so that a new operation moves no old one.
_TRIES, _TOP, _LEFT, _FLIP, _JITTER, _ORDER, _FACTOR, _GRAY, _BLUR, _SIGMA, _SOLAR, _COUNT = (
    10, 20, 21, 22, 23, 24, 28, 32, 33, 34, 35, 36)


def draw(augment: Augment, key: int, height: int, width: int) -> np.ndarray:
    """All parameters of one view of an image of ``height`` x ``width`` pixels at the address ``key``.

    Returns one record of ``PARAMS``, read-only. A pure function of its arguments.
    """
    u = rng.uniform(key, _COUNT).tolist()
    if augment.crop == "random":
        box = random_box(u, height, width, augment.scale, augment.ratio)
    else:
        box = (0, 0, height, width)
    jitter = u[_JITTER] < augment.jitter_p
    order, factors = (0, 1, 2, 3), (1.0, 1.0, 1.0, 0.0)
    if jitter:
        if augment.order == "random":
            order = tuple(sorted(order, key=lambda op: u[_ORDER + op]))
        factors = tuple(_factor(op, augment.jitter[op], u[_FACTOR + op]) for op in range(4))
    sigma = 0.0
    if u[_BLUR] < augment.blur:
        low, high = augment.blur_sigma
        sigma = low + (high - low) * u[_SIGMA]
    record = _pack(*box, u[_FLIP] < augment.flip, jitter, *order, *factors, u[_GRAY] < augment.gray, sigma,
                   u[_SOLAR] < augment.solarize)
    return np.frombuffer(record, PARAMS)[0]


def random_box(u: list[float], height: int, width: int, scale: tuple, ratio: tuple) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params on given numbers: u[0:20] the ten tries, u[20:22] the corner.

    Returns (top, left, height, width) in pixels.
    """
    area, low, high = height * width, math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * u[2 * attempt])
        aspect = math.exp(low + (high - low) * u[2 * attempt + 1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[_TOP] * (height - h + 1)), int(u[_LEFT] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _factor(op: int, strength: float, u: float) -> float:
    """ColorJitter's ranges: max(0, 1 - s) .. 1 + s, and -s .. s for the hue (operation 3)."""
    low, high = (-strength, strength) if op == 3 else (max(0.0, 1 - strength), 1 + strength)
    return low + (high - low) * u


def apply(images: torch.Tensor, params: np.ndarray, augment: Augment, *, mean=IMAGENET_MEAN, std=IMAGENET_STD,
          dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Everything after the crop, on the device of ``images``.

    images: uint8 [B, S, S, 3], the loader's crops; params: ``PARAMS`` [B]; mean, std: of channels in [0, 1].
    Returns ``dtype`` [B, 3, S, S] in channels_last memory. Each row depends on its own image and parameters alone,
    and the values before normalisation are float, not rounded to 8 bits between operations as PIL does.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(params) != len(images):
        raise ValueError(f"apply wants uint8 [B, S, S, 3] and B rows of parameters, got {images.dtype} "
                         f"{tuple(images.shape)} and {len(params)} rows")
    return ops.pipeline(images, params, augment.blur_kernel, mean, std, dtype)
