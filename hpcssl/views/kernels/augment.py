"""A whole view by the kernels of ``view_triton.py``, for images on a GPU.

They stand behind an operator of torch, which also has a shape function, so that the path that a GPU takes can be
followed with fake tensors on a machine without one.

Letters in shapes: B samples, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl.distributed.devices import to_device
from hpcssl.views.kernels.table import TableFacts, make_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of the result that the kernels are written for. They compute in float32."""

_OPERATORS = torch.library.Library("hpcssl", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no annotation
_OPERATORS.define(  # type: ignore[no-untyped-call]
    "augment_view(Tensor images, Tensor numbers, bool has_contrast, int blurred, int edge, int radius, bool deepmind, "
    "float[] affine, ScalarType dtype) -> Tensor"
)


def run(
    images: Tensor,
    params: npt.NDArray[np.void],
    library: str,
    blur_kernel: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Compute what ``ops.run_pipeline`` does, which has the same arguments, with up to four kernels.

    Args:
        images: uint8 [B, S, S, 3].
        params: ``augment.PARAMS`` [B].
        library: Whose color operations: ``torchvision`` or ``deepmind``.
        blur_kernel: One of ``blur.KERNELS``.
        mean: Per channel, on the scale 0-1.
        std: Per channel, on the scale 0-1.
        dtype: Type of the result, one of ``DTYPES``.

    Returns:
        ``dtype`` [B, 3, S, S] in channels_last memory.
    """
    numbers, facts = make_table(params, images.shape[1], library, blur_kernel)
    affine = [1 / s for s in std] + [-m / s for m, s in zip(mean, std, strict=True)]
    out: Tensor = torch.ops.hpcssl.augment_view(
        images.contiguous(),
        to_device(numbers, images.device),
        *facts,
        library == "deepmind",
        affine,
        dtype,
    )
    return out.permute(0, 3, 1, 2)


def _on_cuda(
    images: Tensor,
    numbers: Tensor,
    has_contrast: bool,
    blurred: int,
    edge: int,
    radius: int,
    deepmind: bool,
    affine: list[float],
    dtype: torch.dtype,
) -> Tensor:
    from hpcssl.views.kernels import view_triton  # needs triton, which a CPU build of torch does not bring

    out = images.new_empty(images.shape, dtype=dtype)
    if len(images):
        facts = TableFacts(has_contrast, blurred, edge, radius)
        view_triton.augment(images, numbers, facts, deepmind, affine, out)
    return out


def _shapes(images: Tensor, *arguments: Any) -> Tensor:
    return torch.empty(images.shape, dtype=arguments[-1], device=images.device)


_OPERATORS.impl("augment_view", _on_cuda, "CUDA")  # type: ignore[no-untyped-call]
_OPERATORS.impl("augment_view", _shapes, "Meta")  # type: ignore[no-untyped-call]
