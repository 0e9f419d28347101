"""Model selection: which training images are held out, and which epoch's score is reported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hpcssl import rng
from hpcssl.errors import EvalError

HELD_OUT_FRACTION = 10009 / 1281167
"""BYOL, appendix C.1: the last 10,009 images of the ImageNet training set in the order of TFDS."""


def draw_held_out(samples: int, classes: int, seed: int, count: int | None) -> npt.NDArray[np.int64]:
    """Draw the training images on which hyperparameters are compared, so that the validation set chooses none.

    Args:
        samples: Number of training images.
        classes: Number of classes.
        seed: Seed of the draw.
        count: How many to draw. None takes the share that BYOL holds out of ImageNet; in small sets up to ten images
            per class or a tenth of the set, whichever is less, and at least one.

    Returns:
        Sorted indices of the drawn images, int64 [count].

    Raises:
        EvalError: No image would be left to train on.
    """
    if count is None:
        count = max(round(HELD_OUT_FRACTION * samples), min(10 * classes, samples // 10), 1)
    if count >= samples:
        raise EvalError(
            "evaluation option held_out",
            got=f"{count} of {samples} training images",
            expected="fewer than all of them, since the others are trained on",
            fix=f"set held_out={samples // 10} or less" if samples >= 10 else "name a set of more images",
        )
    return np.sort(rng.permutation(rng.key(seed, "held out"), samples)[:count])


def select_epoch(scores: Sequence[dict[str, float]], report: str) -> dict[str, float]:
    """Return the scores of the epoch to report.

    Args:
        scores: Scores of each epoch, with the key ``top1``.
        report: ``best`` for the epoch with the highest top-1 accuracy (the earliest of equal ones, as in the official
            codes), ``last`` for the last epoch.
    """
    return scores[-1] if report == "last" else max(scores, key=lambda score: score["top1"])


def summarize_epochs(scores: Sequence[dict[str, float]], report: str) -> dict[str, float]:
    """Return the reported scores, and with the suffixes ``_best`` and ``_last`` those of the best and last epoch.

    Args:
        scores: Scores of each epoch, with the key ``top1``.
        report: ``best`` or ``last``: the epoch whose scores carry no suffix.
    """
    epochs = {which: select_epoch(scores, which) for which in ("best", "last")}
    return dict(epochs[report]) | {f"{name}_{which}": score[name] for which, score in epochs.items() for name in score}
