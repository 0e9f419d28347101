"""The Triton kernels that augment a view in Triton's interpreter: ``python interpreted_views.py FILE [all]``.

A process of its own, because triton decides when it is imported whether it interprets. The largest differences from the
plain operations go to FILE as JSON: for small images with several blocks and every kind of blur, and for all named
augmentations; with ``all`` for every view of the packaged recipes at its real size.
"""

import dataclasses
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from hpcssl import rng
from hpcssl.train import builders
from hpcssl.train import recipe as recipes
from hpcssl.views import ops
from hpcssl.views.augment import AUGMENTATIONS, PARAMS, draw_params
from hpcssl.views.kernels import view_triton
from hpcssl.views.kernels.table import make_table
from tests import triton_interpreter

MEAN, STD = (0.1, 0.2, 0.3), (1.0, 0.5, 1.0)
ROWS = 3
SMALL = (  # sides: of several blocks, the last one not full; and so small that both edges of a blur overlap
    ("strong", 64),
    ("simclr", 43),
    ("byol_1", 43),
    ("strong", 9),
    ("strong", 16),
)


def packaged_views():
    """Augmentation and side of every view of the packaged recipes that the loader may cut, without repetitions."""
    views = {}
    for name in recipes.names():
        recipe = recipes.compose(name, [])
        for view in builders.build_view_plan(recipe, builders.build_method(recipe)).views:
            # neither the crop nor the flip's probability matters here
            augment = dataclasses.replace(view.augmentation, crop="random", scale=(0.2, 1.0), interpolation="bicubic")
            views.setdefault((augment, view.size), f"{view.augment} {view.size}")
    return [(name, augment, side) for (augment, side), name in views.items()]


def images_of(side):
    """uint8 [ROWS, S, S, 3]: noise, a ramp of colors, and pure colors."""
    generator = np.random.default_rng(side)
    ramp = np.indices((side, side, 3)).sum(0) * 255 // (2 * side)
    pure = generator.integers(0, 2, (side // 8 + 1, side // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:side, :side] * 255
    return torch.from_numpy(np.stack([generator.integers(0, 256, ramp.shape), ramp, pure]).astype(np.uint8))


def params_of(augment):
    """Rows of ``PARAMS``: jitter in three orders with a blur and without, gray, and what is drawn with certainty."""
    sure = dataclasses.replace(
        augment,
        **{key: float(getattr(augment, key) > 0) for key in ("flip", "jitter_p", "blur", "solarize")},
    )
    drawn = [draw_params(sure, rng.key(7, "row", row), 300, 400) for row in range(ROWS - 1)]
    drawn.append(draw_params(augment, rng.key(3, "row"), 300, 400))
    rows = np.array(drawn, PARAMS)
    rows["solarize"][0] = rows["flip"][1] = False
    rows["gray"] = rows["gray"] & (np.arange(ROWS) == 1)
    return rows


def measure(name, augment, side, dtype=torch.float32):
    """The largest difference from the plain operations, on the scale of the image before the normalization."""
    images, rows = images_of(side), params_of(augment)
    numbers, facts = make_table(rows, side, augment.library, augment.blur_kernel)
    affine = [1 / s for s in STD] + [-m / s for m, s in zip(MEAN, STD, strict=True)]
    out = torch.full(images.shape, torch.nan, dtype=dtype)
    view_triton.augment(images, torch.from_numpy(numbers), facts, augment.library == "deepmind", affine, out)
    plain = ops.run_pipeline(images, rows, augment.library, augment.blur_kernel, MEAN, STD, torch.float32)
    difference = ((out.float() - plain.permute(0, 2, 3, 1)).abs() * torch.tensor(STD)).amax()
    kinds = {"contrast": facts.has_contrast, "blurred": facts.blurred, "solarized": int(rows["solarize"].sum())}
    return {
        "name": name,
        "dtype": str(dtype),
        "difference": float(difference),
        **kinds,
        "flipped": int(rows["flip"].sum()),
    }


def measure_all(arguments):
    """The results that the arguments ask for."""
    if "all" in arguments:
        view_triton._PIXELS = 65536  # one block per image, so that there is less to interpret
        return [measure(*view) for view in packaged_views()]
    results = [measure(f"{name} {side}", AUGMENTATIONS[name], side) for name, side in SMALL]
    results.append(measure("strong 32", AUGMENTATIONS["strong"], 32, torch.bfloat16))
    view_triton._PIXELS = 2048
    return results + [measure(name, augment, 24) for name, augment in AUGMENTATIONS.items()]


if __name__ == "__main__":
    triton_interpreter.check()
    torch.set_num_threads(1)
    with open(sys.argv[1], "w") as file:
        json.dump(measure_all(sys.argv[2:]), file)
