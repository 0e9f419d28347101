"""The parameters of a view as the kernels read them: one table of numbers per view, which travels in one copy.

Letters in shapes: B samples, S pixels per side, E classes of rows near an edge, T taps of a blur.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hpcssl.views.blur import blur_taps
from hpcssl.views.color import NEUTRAL

CONTRAST, NO_OPERATION = 1, 4
FLIP, OPERATIONS, FACTORS, GRAY, SOLARIZE, BLURRED_ROW, TAPS = 0, 1, 5, 9, 10, 11, 12
"""Columns of a table; those of operations and factors are four, by place in the order of the row."""


class TableFacts(NamedTuple):
    """What the host knows about a table.

    Attributes:
        has_contrast: Whether some row has its contrast changed, for which its mean color must be known.
        blurred: Number of rows with a blur.
        edge: E - 1: rows and columns this near an edge have taps of their own.
        radius: Pixels to each side that a blur reaches: T = 2·radius + 1.
    """

    has_contrast: bool
    blurred: int
    edge: int
    radius: int


def make_table(
    params: npt.NDArray[np.void], size: int, library: str, blur_kernel: str
) -> tuple[npt.NDArray[np.float32], TableFacts]:
    """Build the table of a view.

    Args:
        params: ``augment.PARAMS`` [B].
        size: S, the side of the view.
        library: Whose color operations: ``torchvision`` or ``deepmind``.
        blur_kernel: One of ``blur.KERNELS``.

    Returns:
        The table, float32 [B, 12 + E·T], in which the taps of a row without a blur are 0; and the facts.
    """
    rows, order = np.arange(len(params))[:, None], params["order"].astype(np.intp)
    factors = params["factors"][rows, order]
    is_used = params["jitter"][:, None] & (factors != np.array(NEUTRAL[library], np.float32)[order])
    operations = np.where(is_used, order, NO_OPERATION)
    blurred = np.flatnonzero(params["sigma"] > 0)
    place = np.full(len(params), -1)
    place[blurred] = np.arange(len(blurred))
    taps, edge, radius = np.zeros((0, 1, 1)), 0, 0
    if len(blurred):
        taps, edge, radius = blur_taps(params["sigma"][blurred], size, blur_kernel)
    numbers = np.zeros((len(params), TAPS + taps[0].size if len(blurred) else TAPS), np.float32)
    numbers[:, FLIP], numbers[:, GRAY], numbers[:, SOLARIZE] = params["flip"], params["gray"], params["solarize"]
    numbers[:, OPERATIONS:FACTORS], numbers[:, FACTORS:GRAY] = operations, factors
    numbers[:, BLURRED_ROW] = place
    numbers[blurred, TAPS:] = taps.reshape(len(blurred), numbers.shape[1] - TAPS)
    return numbers, TableFacts(bool((operations == CONTRAST).any()), len(blurred), edge, radius)
