"""Each formula of the documents once. Losses are per row, [B]; the mean over rows and ranks is taken by the step.

Letters in shapes: B rows of this rank, D embedding width, K neighbours. All embeddings have unit length, u is a
prediction of the online network, v and z come from the target network and carry no gradient.
"""

from __future__ import annotations

from torch import Tensor


def regression(u_BD: Tensor, v_BD: Tensor) -> Tensor:
    """‖u − v‖² = 2 − 2 u·v for unit vectors: BYOL eq. 2, and dist(·,·) of MSF section 2. [B]"""
    return 2 - 2 * (u_BD * v_BD).sum(1)


def mean_shift(u_BD: Tensor, z_BKD: Tensor, valid_BK: Tensor) -> Tensor:
    """Mean over the valid neighbours of ‖u − z_j‖²: MSF section 2. [B]

    The paper prints the sum over j and its poster and code the mean; the mean is meant here. Rows without a valid
    neighbour cost nothing.
    """
    distance_BK = 2 - 2 * (z_BKD @ u_BD[:, :, None]).squeeze(2)
    return (distance_BK * valid_BK).sum(1) / valid_BK.sum(1).clamp(min=1)
