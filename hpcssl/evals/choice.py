"""How an evaluation chooses: images held out of the training set, and which epoch is the score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcssl import rng

SHARE = 10009 / 1281167  # BYOL, appendix C.1: the last images of ImageNet's training set as TFDS orders it


def held_out(samples: int, classes: int, seed: int, count: int | None) -> np.ndarray:
    """Sorted indices of the ``count`` training images that judge instead of the validation set, drawn by address.

    None: BYOL's share of the set; in small ones up to ten images per class or a tenth of it, and at least one.
    """
    if count is None:
        count = max(round(SHARE * samples), min(10 * classes, samples // 10), 1)
    return np.sort(rng.permutation(rng.key(seed, "held out"), samples)[:count])


def reported(scores: Sequence[dict[str, float]], report: str) -> dict[str, float]:
    """The ``best`` epoch by top-1 (the first of equals, as in the originals) or the ``last``."""
    return scores[-1] if report == "last" else max(scores, key=lambda score: score["top1"])


def summary(scores: Sequence[dict[str, float]], report: str) -> dict[str, float]:
    """Scores of the epoch that a protocol reports, and with suffixes those of the best and the last one."""
    told = {which: reported(scores, which) for which in ("best", "last")}
    return dict(told[report]) | {f"{name}_{which}": score[name] for which, score in told.items() for name in score}
