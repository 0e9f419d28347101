"""Average precision as VOC 2007 and VISSL define it, which scikit-learn and torchmetrics do not offer.

Both definitions use the precision p and the recall r after each distinct score, from the highest score down. Images of
equal score are counted together, so that the result does not depend on their order:

    eleven points (VOC 2007):   1/11 · sum over t in {0, 0.1, …, 1} of  max { p_j : r_j >= t }
    area (VISSL):               sum over j of (r_j - r_(j-1)) · max { p_i : i >= j }

``average_precision_score`` of scikit-learn is the area without the maximum.

Shapes: N samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def average_precision(present: npt.NDArray[np.bool_], score: npt.NDArray[np.floating[Any]], kind: str) -> float:
    """Compute the average precision of one class, in [0, 1].

    The eleven points deviate from linusericsson/ssl-transfer (``linear.py``, ``voc_ap``) in two places, where this
    function follows the definition of VOC: a recall of 3 in 10 reaches the threshold 0.3, which floating-point
    arithmetic there puts below 0.30000000000000004; and the threshold 0 takes the highest precision that occurs, where
    the point (recall 0, precision 1) that scikit-learn appends to its curve would give 1.

    Args:
        present: bool [N], which images show the class; at least one does.
        score: [N], no NaN; higher means more likely present.
        kind: ``voc11`` for eleven points, or ``area`` for the area of VISSL (``utils/svm_utils/evaluate.py``,
            ``calculate_ap``).
    """
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # the end of each group of equal scores
    hits = np.cumsum(present[order])[last]
    best = np.maximum.accumulate((hits / (np.flatnonzero(last) + 1))[::-1])[::-1]
    total = int(hits[-1])
    if kind == "area":
        return float(np.sum(np.diff(hits, prepend=0) * best) / total)
    positions = np.searchsorted(10 * hits, np.arange(11) * total)
    return float(best[positions].mean())
