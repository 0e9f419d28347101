"""Average precision as the protocols define it, which scikit-learn and torchmetrics do not have. NumPy, in [0, 1].

Both average precisions look at the precision p and recall r after each distinct score, from the highest down, so that
images of equal score stand or fall together whatever their order:

    eleven points (VOC 2007):   1/11 · sum over t in {0, 0.1, …, 1} of  max { p_j : r_j >= t }
    area (VISSL):               sum over j of (r_j - r_(j-1)) · max { p_i : i >= j }

scikit-learn's ``average_precision_score`` is the area without the maximum.
Letters in shapes: N samples.
"""

from __future__ import annotations

import numpy as np


def average_precision(present: np.ndarray, score: np.ndarray, kind: str) -> float:
    """``kind``: ``voc11`` (linusericsson/ssl-transfer, linear.py ``voc_ap``) or ``area`` (vissl
    utils/svm_utils/evaluate.py ``calculate_ap``). present: bool [N], at least one of them; score: [N], no NaN.

    Two deviations from ssl-transfer's eleven points, both as VOC defines them: a recall of 3 in 10 reaches 0.3, where
    its floating-point numbers stay below 0.30000000000000004, and t = 0 takes the best precision there is, where the
    point (1, 0) that scikit-learn adds to its curve gives 1.
    """
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # where a group of equal scores ends
    hits = np.cumsum(present[order])[last]
    best = np.maximum.accumulate((hits / (np.flatnonzero(last) + 1))[::-1])[::-1]
    total = int(hits[-1])
    if kind == "area":
        return float(np.sum(np.diff(hits, prepend=0) * best) / total)
    at = np.searchsorted(10 * hits, np.arange(11) * total)
    return float(best[at].mean())
