"""Whether views are augmented by the kernels that only a GPU has, which are tried against the plain operations."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from hpcssl import rng
from hpcssl.distributed import kernel_choice
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

    On a GPU, each rank augments random images with both. A collective there.

    Args:
        setting: One of ``kernel_choice.SETTINGS``.
        world: The processes that train together.

    Returns:
        False for ``plain`` and on a CPU. With ``auto`` also where a kernel fails or is wrong on some rank, after a
        warning with the reason.

    Raises:
        ConfigError: For ``fast``, where the kernels cannot be used.
    """
    return kernel_choice.choose(setting, world, find_fault, "Augmentations")


@functools.cache
def find_fault(device: torch.device) -> str:
    """Compare the kernels with the plain operations on random images. Not a collective.

    Returns:
        What is wrong, as a clause; empty if nothing is.
    """
    for library, blur_kernel in _CASES:
        for dtype in _DTYPES:
            name = f"augmentation like {library} with the blur {blur_kernel} in {dtype}"
            try:
                with _disable_current_modes():  # whoever counts operations does not mean these
                    difference = _measure_difference(library, blur_kernel, dtype, device)
            except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises, the plain operations remain
                return kernel_choice.explain_failure(name, error)
            if not difference <= LEVEL + torch.finfo(dtype).eps:
                return f"{name} differs from the plain operations by {difference:.2g}"
    return ""


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
