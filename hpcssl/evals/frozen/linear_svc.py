"""Linear support vector machines of one class against the rest, as VISSL and OpenSelfSup fit them.

    min over w, b of   1/2 (|w|^2 + b^2)  +  C sum_i c_i max(0, 1 - y_i (w·x_i + b))^2        c = 2 if y = 1, else 1

in the dual, by scikit-learn's LinearSVC (liblinear), with tolerance 1e-4 and at most 2000 iterations; like the original
it does not report that it stopped there. The bias is part of w (a constant feature 1), so it is regularized too.
Sources: vissl utils/svm_utils/svm_trainer.py ``train_cls``, svm_low_shot_trainer.py; OpenSelfSup benchmarks/svm_tools.

liblinear draws its order from a generator that all threads of a process share, so concurrent fits are processes, not
threads. This module does not import torch, since worker processes start with it.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from hpcssl import rng
from hpcssl.evals.common.metrics import average_precision

if TYPE_CHECKING:
    from sklearn.svm import LinearSVC

FOLDS = 3

Matrix = npt.NDArray[np.float64]
Targets = npt.NDArray[np.int8]
"""1 present, -1 absent, 0 difficult."""


def normalize_rows(x_ND: npt.NDArray[np.floating[Any]]) -> Matrix:
    """Return x / (|x| + 1e-5) row by row, float64 [N, D] (svm_trainer.py ``_normalize_features``)."""
    x_ND = x_ND.astype(np.float64)
    scaled: Matrix = x_ND / (np.linalg.norm(x_ND, axis=1) + 1e-5)[:, None]
    return scaled


def build_svc(cost: float, seed: int, *address: int) -> LinearSVC:
    """Build an unfitted support vector machine.

    Args:
        cost: The cost C.
        seed: Seed of liblinear's order.
        *address: Numbers that give each fit an order of its own.
    """
    from sklearn.svm import LinearSVC  # takes a second, which a process without SVMs saves

    state = rng.key(seed, "svm", repr(cost), *address) & 0x7FFFFFFF
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        intercept_scaling=1.0,
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=2000,
        random_state=state,
    )


def cross_validate(x_ND: Matrix, targets_NC: Targets, costs: Sequence[float], seed: int, fit: int) -> list[float]:
    """Mean average precision (scikit-learn's) over three stratified folds.

    Difficult images are negatives here, as in the original: its 0 means absent and -1 difficult, and both become -1.

    Args:
        x_ND: Training features.
        targets_NC: Training targets.
        costs: The costs to try.
        seed: Seed of liblinear's order.
        fit: Number of the fit: cost ``fit // C`` and class ``fit % C``.
    """
    from sklearn.model_selection import cross_val_score

    cost, c = fit // targets_NC.shape[1], fit % targets_NC.shape[1]
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # 2000 iterations are the protocol, whether liblinear has converged or not
        scores = cross_val_score(
            build_svc(costs[cost], seed, c),
            x_ND,
            np.where(targets_NC[:, c] == 1, 1, -1),
            cv=FOLDS,
            scoring="average_precision",
        )
    return [float(scores.mean())]


def fit_class(
    x_ND: Matrix,
    targets_NC: Targets,
    test_x: Matrix,
    test_targets: Targets,
    cost_C: Sequence[float],
    seed: int,
    kind: str,
    c: int,
) -> list[float]:
    """Average precision of class ``c`` on the test images, trained on all training images.

    Difficult test images are left out (svm_trainer.py ``test``).

    Args:
        x_ND: Training features.
        targets_NC: Training targets.
        test_x: Test features.
        test_targets: Test targets.
        cost_C: Cost of each class.
        seed: Seed of liblinear's order.
        kind: See ``metrics.average_precision``.
        c: The class, which is the number of the fit.
    """
    y = np.where(targets_NC[:, c] == 1, 1, -1)
    return [fit_and_score(x_ND, y, test_x, test_targets[:, c], cost_C[c], seed, kind, c)]


def fit_low_shot(
    x_ND: Matrix,
    targets_NC: Targets,
    test_x: Matrix,
    test_targets: Targets,
    costs: Sequence[float],
    seed: int,
    kind: str,
    shots: Sequence[int],
    draws: int,
    fit: int,
) -> list[float]:
    """Average precision on the test images at each cost, trained on few images.

    Args:
        x_ND: Training features.
        targets_NC: Training targets.
        test_x: Test features.
        test_targets: Test targets.
        costs: The costs to try.
        seed: Seed of liblinear's order, and of the samples.
        kind: See ``metrics.average_precision``.
        shots: Numbers k of images of a class.
        draws: Independent samples of each k.
        fit: Number of the fit; fits count through k, within it through draws, within them through classes.
    """
    classes = targets_NC.shape[1]
    k, draw, c = shots[fit // (draws * classes)], fit // classes % draws, fit % classes
    rows, y = draw_low_shot(targets_NC, k, seed, draw, c)
    return [fit_and_score(x_ND[rows], y, test_x, test_targets[:, c], cost, seed, kind, c, k, draw) for cost in costs]


def draw_low_shot(
    targets_NC: Targets, k: int, seed: int, draw: int, c: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw k images with class ``c`` and (C - 1)·k images without it, separately for every k and draw.

    Difficult images are in neither part (OpenSelfSup
    tools/prepare_data/create_voc_low_shot_challenge_samples.py ``sample_symbol``).

    Returns:
        Indices of the images, and ±1 for with and without the class.
    """
    rows = []
    for symbol, number in ((1, k), (-1, (targets_NC.shape[1] - 1) * k)):
        candidates = np.flatnonzero(targets_NC[:, c] == symbol)
        order = rng.permutation(rng.key(seed, "lowshot", draw, k, c, symbol), len(candidates))
        rows.append(candidates[order[:number]])
    return np.concatenate(rows), np.repeat([1, -1], [len(rows[0]), len(rows[1])])


def fit_and_score(
    x: Matrix,
    y: npt.NDArray[np.int64],
    test_x: Matrix,
    target: Targets,
    cost: float,
    seed: int,
    kind: str,
    *address: int,
) -> float:
    """Fit one machine and return its average precision on the test images, in [0, 1].

    Args:
        x: Training features.
        y: ±1 for each training image.
        test_x: Test features.
        target: Targets of the class; images with 0 (difficult) are left out.
        cost: The cost C.
        seed: Seed of liblinear's order.
        kind: See ``metrics.average_precision``.
        *address: See ``build_svc``.
    """
    known = target != 0
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        decision = build_svc(cost, seed, *address).fit(x, y).decision_function(test_x)
    return average_precision(target[known] == 1, decision[known], kind)
