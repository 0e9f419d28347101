"""Whether views are augmented by the kernels that only a GPU has, which are tried against the plain operations."""

from __future__ import annotations

import functools

import numpy as np
import torch

from hpcssl import rng
from hpcssl.distributed import kernel_choice
from hpcssl.distributed.kernel_choice import Trial
from hpcssl.distributed.world import World
from hpcssl.views import ops
from hpcssl.views.augment import PARAMS, Augmentation, draw_params
from hpcssl.views.kernels import augment

LEVEL = 1 / 255
"""How far apart the kernels and the plain operations may be, for images in [0, 1]: one level of 8 bits."""

_ROWS, _SIZE = 8, 75  # several blocks of pixels per image, the last of which is not full
_JITTER = (0.8, 0.8, 0.8, 0.2)
_DTYPES = (torch.float32, torch.bfloat16)
_CASES = (("torchvision", "pil"), ("torchvision", "tenth"), ("deepmind", "tenth_zeros"))


def use_fast_views(setting: str, world: World) -> bool:
    """Decide, alike on all ranks, whether ``augment.augment_batch`` uses the kernels of ``kernels.augment``.

    On a GPU, each rank augments random images with both. Arguments, result and errors are those of
    ``kernel_choice.choose``. A collective on a GPU.
    """
    return kernel_choice.choose(setting, world, find_fault, "Augmentations")


@functools.cache
def find_fault(device: torch.device) -> str:
    """Compare the kernels with the plain operations on random images. Not a collective.

    Returns:
        What is wrong, as a clause; empty if nothing is.
    """
    return kernel_choice.run_trials(
        Trial(
            f"augmentation like {library} with the blur {blur_kernel} in {dtype}",
            "the plain operations",
            LEVEL + torch.finfo(dtype).eps,
            functools.partial(_measure_difference, library, blur_kernel, dtype, device),
        )
        for library, blur_kernel in _CASES
        for dtype in _DTYPES
    )


def _measure_difference(library: str, blur_kernel: str, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference of two augmented views in [0, 1], with every operation in some row."""
    named = Augmentation(
        library=library,
        interpolation="bicubic",
        jitter=_JITTER,
        jitter_p=0.9,
        gray=0.2,
        blur=0.6,
        blur_kernel=blur_kernel,
        solarize=0.4,
    )
    params = np.array([draw_params(named, rng.key(0, "trial", row), 90, 80) for row in range(_ROWS)], PARAMS)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (_ROWS, _SIZE, _SIZE, 3), generator=generator, dtype=torch.uint8).to(device)
    arguments = images, params, library, blur_kernel, (0.0,) * 3, (1.0,) * 3
    ours = augment.run(*arguments, dtype)
    theirs = ops.run_pipeline(*arguments, torch.float32)
    return float((ours.float() - theirs).abs().max())
