"""Linear support vector machines of one class against the rest, as VISSL and OpenSelfSup fit them. No torch here:
worker processes start with this file.

    min over w, b of   1/2 (|w|^2 + b^2)  +  C sum_i c_i max(0, 1 - y_i (w·x_i + b))^2        c = 2 if y = 1, else 1

in the dual, by scikit-learn's LinearSVC (liblinear), tolerance 1e-4, at most 2000 rounds; it stops there without
complaint, as the original does. The bias is part of w (a constant feature 1), so it is regularised too.
vissl utils/svm_utils/svm_trainer.py ``train_cls``, svm_low_shot_trainer.py; OpenSelfSup benchmarks/svm_tools.

liblinear draws its order from a generator that all threads of a process share: fits at once are processes, not threads.
Letters in shapes: N images, D features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from hpcssl import rng
from hpcssl.evals.metrics import average_precision

FOLDS = 3


def unit(x_ND: np.ndarray) -> np.ndarray:
    """float64 x / (|x| + 1e-5): svm_trainer.py ``_normalize_features``."""
    x_ND = x_ND.astype(np.float64)
    return x_ND / (np.linalg.norm(x_ND, axis=1) + 1e-5)[:, None]


def machine(cost: float, seed: int, *address: int):
    from sklearn.svm import LinearSVC  # a second that a process without SVMs need not wait for

    state = rng.key(seed, "svm", repr(cost), *address) & 0x7FFFFFFF
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty="l2", loss="squared_hinge",
                     dual=True, tol=1e-4, max_iter=2000, random_state=state)


def cross_validate(x_ND: np.ndarray, targets_NC: np.ndarray, costs: Sequence[float], seed: int,
                   job: int) -> list[float]:
    """Mean average precision (scikit-learn's) over three stratified folds, for cost ``job // C`` and class ``job % C``.

    Difficult images are negatives here, as in the original: its 0 means absent and -1 difficult, and both become -1.
    """
    from sklearn.model_selection import cross_val_score

    cost, c = job // targets_NC.shape[1], job % targets_NC.shape[1]
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # 2000 rounds are the protocol, whether liblinear has converged or not
        scores = cross_val_score(machine(costs[cost], seed, c), x_ND, np.where(targets_NC[:, c] == 1, 1, -1),
                                 cv=FOLDS, scoring="average_precision")
    return [float(scores.mean())]


def refit(x_ND: np.ndarray, targets_NC: np.ndarray, test_x: np.ndarray, test_targets: np.ndarray,
          cost_C: Sequence[float], seed: int, kind: str, c: int) -> list[float]:
    """Average precision on the test images of class c, trained on all images with the cost of that class.

    Difficult test images are left out (svm_trainer.py ``test``).
    """
    y = np.where(targets_NC[:, c] == 1, 1, -1)
    return [score(x_ND, y, test_x, test_targets[:, c], cost_C[c], seed, kind, c)]


def low_shot(x_ND: np.ndarray, targets_NC: np.ndarray, test_x: np.ndarray, test_targets: np.ndarray,
             costs: Sequence[float], seed: int, kind: str, shots: Sequence[int], draws: int, job: int) -> list[float]:
    """Average precision on the test images per cost; jobs run through k, within it draws, within them classes."""
    classes = targets_NC.shape[1]
    k, draw, c = shots[job // (draws * classes)], job // classes % draws, job % classes
    rows, y = sample(targets_NC, k, seed, draw, c)
    return [score(x_ND[rows], y, test_x, test_targets[:, c], cost, seed, kind, c, k, draw) for cost in costs]


def sample(targets_NC: np.ndarray, k: int, seed: int, draw: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """k images with class c and (C - 1)·k without it, drawn anew for every k and draw; (indices, ±1).

    OpenSelfSup tools/prepare_data/create_voc_low_shot_challenge_samples.py ``sample_symbol``: difficult images are in
    neither part.
    """
    rows = []
    for symbol, number in ((1, k), (-1, (targets_NC.shape[1] - 1) * k)):
        there = np.flatnonzero(targets_NC[:, c] == symbol)
        rows.append(there[rng.permutation(rng.key(seed, "lowshot", draw, k, c, symbol), len(there))[:number]])
    return np.concatenate(rows), np.repeat([1, -1], [len(rows[0]), len(rows[1])])


def score(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, target: np.ndarray, cost: float, seed: int, kind: str,
          *address: int) -> float:
    known = target != 0
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        decision = machine(cost, seed, *address).fit(x, y).decision_function(test_x)
    return average_precision(target[known] == 1, decision[known], kind)
