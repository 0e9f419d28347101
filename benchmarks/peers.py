"""The augmentation pipelines of other projects, as the code of their authors builds them.

Each ``*_views`` returns a function from a PIL image to its two views (normalized float tensors, 224 x 224).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PilBlur:
    """The blur in the scripts of MoCo, SimSiam, MSF and solo-learn."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarize:
    def __call__(self, image):
        return ImageOps.solarize(image)


def _to_normalized_tensor():
    return [T.ToTensor(), T.Normalize(MEAN, STD)]


def msf_views() -> Callable:
    """Return the views of MSF (train_msf.py:253-276): the target is weak and the query is strong."""
    strong = T.Compose([T.RandomResizedCrop(224, scale=(0.2, 1.0)), *msf_after_crop()])
    weak = T.Compose([T.RandomResizedCrop(224, scale=(0.2, 1.0)), T.RandomHorizontalFlip(), *_to_normalized_tensor()])
    return lambda image: (strong(image), weak(image))


def msf_after_crop() -> list:
    """Return the transforms of the strong view of MSF after its crop."""
    return [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([PilBlur()], p=0.5),
        T.RandomHorizontalFlip(),
        *_to_normalized_tensor(),
    ]


def crop_views() -> Callable:
    """Return decoding and cropping alone, for the like-for-like figure."""
    crop = T.RandomResizedCrop(224, scale=(0.2, 1.0))
    return lambda image: (crop(image), crop(image))


def solo_views(symmetric: bool) -> Callable:
    """Return the pipelines of solo-learn for BYOL (asymmetric) and SimCLR (symmetric): bicubic crops, .08-1."""

    def view(blur, solarize, strengths):
        return T.Compose(
            [
                T.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
                T.RandomApply([T.ColorJitter(*strengths)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([PilBlur()], p=blur),
                T.RandomApply([Solarize()], p=solarize),
                T.RandomHorizontalFlip(p=0.5),
                *_to_normalized_tensor(),
            ]
        )

    if symmetric:
        one = two = view(0.5, 0.0, (0.8, 0.8, 0.8, 0.2))
    else:
        one, two = (view(b, s, (0.4, 0.4, 0.2, 0.1)) for b, s in ((1.0, 0.0), (0.1, 0.2)))
    return lambda image: (one(image), two(image))


def lightly_views(name: str) -> Callable | None:
    """Return SimCLRTransform, BYOLTransform or MoCoV2Transform of lightly; None if lightly is not installed."""
    try:
        from lightly import transforms
    except ImportError:
        return None
    return getattr(transforms, name)()


def torchvision_views() -> Callable:
    """Return the decoder of torchvision and the antialiased crop of v2 on uint8 tensors, from bytes."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True)

    def views(body):
        image = decode_jpeg(torch.frombuffer(bytearray(body), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return crop(image), crop(image)

    return views


def open_rgb(body: bytes) -> Image.Image:
    """Decode an image with Pillow."""
    return Image.open(io.BytesIO(body)).convert("RGB")


class MsfViews:
    """The two views of MSF of a PIL image, as a transform that can be pickled for worker processes."""

    def __init__(self):
        self.views = None

    def __call__(self, image):
        if self.views is None:
            self.views = msf_views()
        return self.views(image)
