"""The 1,797 scanned digits of scikit-learn as an image data set: real data that needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.catalog import Catalog, Sample
from data_prep.shards import images

SIDE = 16
"""Height and width of the stored images. The scans have 8x8 pixels of 17 levels. They are stored at 16x16 because a
random crop of an 8x8 image has only a handful of possible boxes, and because the recipes train at 16x16, so that the
evaluation sees the stored pixels unchanged."""


def split_digits() -> dict[str, list[int]]:
    """Split the scans into train and val: a fifth of every class goes to val. The split is fixed for every seed.

    Returns:
        Numbers of the scans, by part.
    """
    from sklearn.datasets import load_digits

    from hpcssl import rng

    target = load_digits().target
    parts: dict[str, list[int]] = {"train": [], "val": []}
    for label in range(10):
        members = np.flatnonzero(target == label)
        order = members[rng.permutation(rng.key(0, "digits", "split", label), len(members))]
        val_size = round(0.2 * len(members))
        parts["val"] += order[:val_size].tolist()
        parts["train"] += order[val_size:].tolist()
    return {name: sorted(members) for name, members in parts.items()}


def encode_digits(numbers: list[int], scratch: Path) -> Catalog:
    """Encode scans as PNG, one after the other in one file.

    Args:
        numbers: The scans.
        scratch: File to write.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    samples, offset = [], 0
    with open(scratch, "wb") as file:
        for i in numbers:
            body = encode_scan(scans.images[i])
            label = int(scans.target[i])
            samples.append(Sample(f"{label}/scan-{i:04d}.png", label, str(scratch), offset, len(body), 0))
            offset += file.write(body)
    return Catalog([str(label) for label in range(10)], sorted(samples), {"verb": "digits", "side": SIDE})


def encode_scan(scan: npt.NDArray[Any]) -> bytes:
    """Encode a scan, [8, 8] with values 0..16, as a gray PNG of ``SIDE`` pixels."""
    gray = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return images.encode_png(gray.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
