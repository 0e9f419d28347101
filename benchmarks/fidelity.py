"""How near our pixels are to the references: ``python -m benchmarks.fidelity --data SHARDS_OR_TAR [--out FILE]``.

On real photographs, with parameters drawn as in training: crops against Pillow on the same box, jitter and hue against
torchvision in each sample's own order, blur against its own definition in float64, and against Pillow's box blurs.
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
from hpcssl.data.decode import Scratch, decode
from hpcssl.views.augment import NAMED, PARAMS, ViewSpec, apply, draw
from hpcssl.views.crop import cut
from hpcssl.views.ops import blur_matrix

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def crops(images: list[np.ndarray], kind: str) -> np.ndarray:
    """Histogram of absolute differences from Pillow, in levels."""
    view = ViewSpec(name="v", augment=replace(NAMED["simclr"], interpolation=kind), size=224)
    counts, out = np.zeros(256, np.int64), torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    for number, image in enumerate(images):
        box = draw(view.augment, rng.key(0, "fidelity", number), *image.shape[:2])["box"].tolist()
        cut(image, box, view, out.permute(0, 3, 1, 2), Scratch())
        top, left, height, width = box
        theirs = Image.fromarray(image).crop((left, top, left + width, top + height)).resize((224, 224), _FILTERS[kind])
        off = np.abs(out[0].numpy().astype(np.int64) - np.asarray(theirs))
        counts += np.bincount(off.reshape(-1), minlength=256)
    return counts


def views_of(images: list[np.ndarray]) -> torch.Tensor:
    view = ViewSpec(name="v", augment=NAMED["weak"], size=224)
    out = torch.zeros(len(images), 224, 224, 3, dtype=torch.uint8)
    for number, image in enumerate(images):
        box = draw(view.augment, rng.key(0, "view", number), *image.shape[:2])["box"].tolist()
        cut(image, box, view, out[number:number + 1].permute(0, 3, 1, 2), Scratch())
    return out


def rows_of(count: int, **only) -> np.ndarray:
    """Drawn parameters with everything off but what ``only`` names."""
    rows = np.array([draw(NAMED["strong"], rng.key(0, "row", n), 224, 224) for n in range(count)], PARAMS)
    for field in ("flip", "jitter", "gray", "sigma", "solarize"):
        rows[field] = only.get(field, 0)
    return rows


def jitter_off(views: torch.Tensor, only: int | None) -> float:
    """Largest difference from torchvision's functions called one after the other, in levels."""
    rows = np.array([draw(replace(NAMED["simclr"], jitter_p=1.0), rng.key(0, "jitter", n), 224, 224)
                     for n in range(len(views))], PARAMS)
    for field in ("flip", "gray", "sigma", "solarize"):
        rows[field] = 0
    if only is not None:
        rows["factors"][:, [op for op in range(4) if op != only]] = np.float32([1, 1, 1, 0])[
            [op for op in range(4) if op != only]]
    ours, worst = apply(views, rows, NAMED["strong"], mean=(0, 0, 0), std=(1, 1, 1)), 0.0
    for mine, image, row in zip(ours, views.permute(0, 3, 1, 2).float() / 255, rows, strict=True):
        for op in row["order"]:
            image = JITTER[op](image, float(row["factors"][op]))
        worst = max(worst, (mine - image).abs().max().item() * 255)
    return worst


def blur_off(views: torch.Tensor, kernel: str) -> tuple[float, float, float]:
    """Levels: largest from the definition; for ``pil`` also mean and largest from Pillow's GaussianBlur."""
    sigma = np.linspace(0.1, 2.0, len(views), dtype=np.float32)
    rows = rows_of(len(views), sigma=sigma)
    augment = replace(NAMED["strong"], blur_kernel=kernel)
    ours, worst, far, means = apply(views, rows, augment, mean=(0, 0, 0), std=(1, 1, 1)) * 255, 0.0, 0.0, []
    for mine, image, s in zip(ours, views, sigma, strict=True):
        matrix = blur_matrix(np.float64([s]), 224, kernel, dtype=torch.float64)[0][0]
        exact = matrix @ image.permute(2, 0, 1).double() @ matrix.T
        worst = max(worst, (mine - exact).abs().max().item())
        theirs = np.asarray(Image.fromarray(image.numpy()).filter(ImageFilter.GaussianBlur(float(s))), np.float32)
        off = np.abs(mine.permute(1, 2, 0).numpy() - theirs)
        far, means = max(far, float(off.max())), [*means, float(off.mean())]
    return worst, float(np.mean(means)), far


def main(data: Annotated[Path, typer.Option(help="A folder of shards, or a tar of JPEG images.")],
         out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None) -> None:
    """Differences from Pillow, torchvision and the definitions, in levels of 255."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        bodies = common.prepare(data, Path(room)).bodies
    images = [decode(body) for body in bodies]
    decoded = sum(np.array_equal(x, np.asarray(peers.opened(b))) for x, b in zip(images, bodies, strict=True))
    bilinear, bicubic = crops(images, "bilinear"), crops(images, "bicubic")
    views = views_of(images[:64])
    share = bicubic[:2].sum() / bicubic.sum()
    jitter = jitter_off(views, None)
    body = {
        "decode": {"images equal to Pillow's": f"{decoded} of {len(images)}"},
        "crop and resize beside Pillow on the same box, levels": {
            "bilinear, share within 1": common.against(round(float(bilinear[:2].sum() / bilinear.sum()), 9), 0.999999),
            "bilinear, largest": int(np.flatnonzero(bilinear).max()),
            "bicubic, share within 1": common.against(round(float(share), 6), 0.999),
            "bicubic, largest": int(np.flatnonzero(bicubic).max())},
        "jitter beside torchvision, own order per sample, levels": {
            "all four, largest": f"{jitter:.5f} (goal 1: {'met' if jitter <= 1 else 'missed'})",
            **{f"{op.__name__} alone, largest": round(jitter_off(views, n), 5) for n, op in enumerate(JITTER)}},
    }
    for kernel in ("pil", "tenth"):
        worst, mean, far = blur_off(views, kernel)
        body[f"blur {kernel}, levels"] = {
            "from its definition, largest": f"{worst:.5f} (goal 1: {'met' if worst <= 1 else 'missed'})"}
        if kernel == "pil":
            body[f"blur {kernel}, levels"] |= {"from Pillow's box blurs, mean": round(mean, 3),
                                               "from Pillow's box blurs, largest": round(far, 2)}
    common.report("fidelity", f"{len(images)} images", body, out)


if __name__ == "__main__":
    typer.run(main)
