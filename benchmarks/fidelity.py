"""Differences of our pixels from references: ``python -m benchmarks.fidelity --data SHARDS_OR_TAR [--out FILE]``.

On real images, with parameters drawn as in training: crops are compared with Pillow on the same box, jitter and hue
with torchvision in the order of each sample, and blur with its definition in float64 and with the box blurs of Pillow.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
import typer
from PIL import Image, ImageFilter

from benchmarks import common, peers
from hpcssl import rng
from hpcssl.data.crop import crop_view
from hpcssl.data.decode import ScratchBuffer, decode
from hpcssl.views.augment import AUGMENTATIONS, PARAMS, ViewSpec, augment_batch, draw_params
from hpcssl.views.blur import blur_matrix

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def count_crop_differences(images: list[np.ndarray], kind: str) -> np.ndarray:
    """Return the histogram of absolute differences from Pillow, in levels."""
    view = ViewSpec(name="v", augment=replace(AUGMENTATIONS["simclr"], interpolation=kind), size=224)
    counts, out = np.zeros(256, np.int64), torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    for number, image in enumerate(images):
        box = draw_params(view.augment, rng.key(0, "fidelity", number), *image.shape[:2])["box"].tolist()
        crop_view(image, box, view, out.permute(0, 3, 1, 2), ScratchBuffer())
        top, left, height, width = box
        theirs = Image.fromarray(image).crop((left, top, left + width, top + height)).resize((224, 224), _FILTERS[kind])
        difference = np.abs(out[0].numpy().astype(np.int64) - np.asarray(theirs))
        counts += np.bincount(difference.reshape(-1), minlength=256)
    return counts


def crop_images(images: list[np.ndarray]) -> torch.Tensor:
    view = ViewSpec(name="v", augment=AUGMENTATIONS["weak"], size=224)
    out = torch.zeros(len(images), 224, 224, 3, dtype=torch.uint8)
    for number, image in enumerate(images):
        box = draw_params(view.augment, rng.key(0, "view", number), *image.shape[:2])["box"].tolist()
        crop_view(image, box, view, out[number : number + 1].permute(0, 3, 1, 2), ScratchBuffer())
    return out


def make_params(count: int, **only) -> np.ndarray:
    """Return drawn parameters in which only the named operations are on."""
    rows = np.array(
        [draw_params(AUGMENTATIONS["strong"], rng.key(0, "row", n), 224, 224) for n in range(count)], PARAMS
    )
    for field in ("flip", "jitter", "gray", "sigma", "solarize"):
        rows[field] = only.get(field, 0)
    return rows


def max_jitter_difference(views: torch.Tensor, only: int | None) -> float:
    """Return the largest difference from the functions of torchvision in sequence, in levels."""
    rows = np.array(
        [
            draw_params(replace(AUGMENTATIONS["simclr"], jitter_p=1.0), rng.key(0, "jitter", n), 224, 224)
            for n in range(len(views))
        ],
        PARAMS,
    )
    for field in ("flip", "gray", "sigma", "solarize"):
        rows[field] = 0
    if only is not None:
        rows["factors"][:, [op for op in range(4) if op != only]] = np.float32([1, 1, 1, 0])[
            [op for op in range(4) if op != only]
        ]
    ours, worst = augment_batch(views, rows, AUGMENTATIONS["strong"], mean=(0, 0, 0), std=(1, 1, 1)), 0.0
    for mine, image, row in zip(ours, views.permute(0, 3, 1, 2).float() / 255, rows, strict=True):
        for op in row["order"]:
            image = JITTER[op](image, float(row["factors"][op]))
        worst = max(worst, (mine - image).abs().max().item() * 255)
    return worst


def blur_differences(views: torch.Tensor, kernel: str) -> tuple[float, float, float]:
    """Return the largest difference from the definition, and mean and largest from Pillow (for ``pil``), in levels."""
    sigma = np.linspace(0.1, 2.0, len(views), dtype=np.float32)
    rows = make_params(len(views), sigma=sigma)
    augment = replace(AUGMENTATIONS["strong"], blur_kernel=kernel)
    ours, worst, far, means = augment_batch(views, rows, augment, mean=(0, 0, 0), std=(1, 1, 1)) * 255, 0.0, 0.0, []
    for mine, image, s in zip(ours, views, sigma, strict=True):
        matrix = blur_matrix(np.float64([s]), 224, kernel, dtype=torch.float64)[0][0]
        exact = matrix @ image.permute(2, 0, 1).double() @ matrix.T
        worst = max(worst, (mine - exact).abs().max().item())
        theirs = np.asarray(Image.fromarray(image.numpy()).filter(ImageFilter.GaussianBlur(float(s))), np.float32)
        difference = np.abs(mine.permute(1, 2, 0).numpy() - theirs)
        far, means = max(far, float(difference.max())), [*means, float(difference.mean())]
    return worst, float(np.mean(means)), far


def main(
    data: Annotated[Path, typer.Option(help="A folder of shards, or a tar of JPEG images.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure the differences from Pillow, torchvision and the definitions, in levels of 255."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        bodies = common.prepare(data, Path(scratch)).bodies
    images = [decode(body) for body in bodies]
    decoded = sum(np.array_equal(x, np.asarray(peers.open_rgb(b))) for x, b in zip(images, bodies, strict=True))
    bilinear, bicubic = count_crop_differences(images, "bilinear"), count_crop_differences(images, "bicubic")
    views = crop_images(images[:64])
    share = bicubic[:2].sum() / bicubic.sum()
    jitter = max_jitter_difference(views, None)
    body = {
        "decode": {"images equal to Pillow's": f"{decoded} of {len(images)}"},
        "crop and resize beside Pillow on the same box, levels": {
            "bilinear, share within 1": common.with_goal(
                round(float(bilinear[:2].sum() / bilinear.sum()), 9), 0.999999
            ),
            "bilinear, largest": int(np.flatnonzero(bilinear).max()),
            "bicubic, share within 1": common.with_goal(round(float(share), 6), 0.999),
            "bicubic, largest": int(np.flatnonzero(bicubic).max()),
        },
        "jitter beside torchvision, own order per sample, levels": {
            "all four, largest": f"{jitter:.5f} (goal 1: {'met' if jitter <= 1 else 'missed'})",
            **{
                f"{op.__name__} alone, largest": round(max_jitter_difference(views, n), 5)
                for n, op in enumerate(JITTER)
            },
        },
    }
    for kernel in ("pil", "tenth"):
        worst, mean, far = blur_differences(views, kernel)
        body[f"blur {kernel}, levels"] = {
            "from its definition, largest": f"{worst:.5f} (goal 1: {'met' if worst <= 1 else 'missed'})"
        }
        if kernel == "pil":
            body[f"blur {kernel}, levels"] |= {
                "from Pillow's box blurs, mean": round(mean, 3),
                "from Pillow's box blurs, largest": round(far, 2),
            }
    common.report("fidelity", f"{len(images)} images", body, out)


if __name__ == "__main__":
    typer.run(main)
