"""scikit-learn's 1,797 scanned digits as an image data set: real data that needs no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import images
from data_prep.catalogue import Catalogue, Sample

SIDE = 16
"""The scans have 8x8 pixels of 17 levels. They are stored at 16x16: a random crop of an 8x8 image can only choose
among a handful of boxes, and the recipes train at 16x16, so that the evaluation sees the stored pixels unchanged."""


def split() -> dict[str, list[int]]:
    """Which scans go to train and val: a fifth of every class to val, drawn once for ever (no seed changes it)."""
    from sklearn.datasets import load_digits

    from hpcssl import rng

    target = load_digits().target
    parts: dict[str, list[int]] = {"train": [], "val": []}
    for label in range(10):
        members = np.flatnonzero(target == label)
        order = members[rng.permutation(rng.key(0, "digits", "split", label), len(members))]
        cut = round(0.2 * len(members))
        parts["val"] += order[:cut].tolist()
        parts["train"] += order[cut:].tolist()
    return {name: sorted(members) for name, members in parts.items()}


def catalogue(members: list[int], scratch: Path) -> Catalogue:
    """The named scans as PNG files, laid end to end in ``scratch``."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    samples, at = [], 0
    with open(scratch, "wb") as file:
        for i in members:
            body = png(scans.images[i])
            label = int(scans.target[i])
            samples.append(Sample(f"{label}/scan-{i:04d}.png", label, str(scratch), at, len(body), 0))
            at += file.write(body)
    return Catalogue([str(label) for label in range(10)], sorted(samples), {"verb": "digits", "side": SIDE})


def png(scan: np.ndarray) -> bytes:
    """A scan [8, 8] with values 0..16 as a grayscale PNG."""
    gray = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return images.png(gray.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
