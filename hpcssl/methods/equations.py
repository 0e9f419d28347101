"""The formulas of the papers, each written once. A loss is one number per row, [B].

The mean over rows and ranks is taken by the training step.

Letters in shapes: B rows of this rank, D embedding width, K neighbors, N rows of the global batch or of the bank,
C prototypes, M excluded rows. All embeddings have unit length. ``u`` is a prediction of the online network; ``v`` and
``z`` come from the target network and carry no gradient (except in ``nt_xent``, where both sides do). τ is the
``temperature``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def squared_distance(u_BD: Tensor, v_BD: Tensor) -> Tensor:
    """‖u − v‖² = 2 − 2 u·v of unit vectors: BYOL eq. 2, and dist(·,·) of MSF section 2. Returns [B]."""
    return 2 - 2 * (u_BD * v_BD).sum(1)


def mean_shift(u_BD: Tensor, z_BKD: Tensor, valid_BK: Tensor) -> Tensor:
    """Mean of ‖u − z_j‖² over the valid neighbors: MSF section 2. Returns [B]; 0 for rows without a valid neighbor.

    The paper prints the sum over j, its poster and code the mean. This is the mean.
    """
    distance_BK = 2 - 2 * (z_BKD @ u_BD[:, :, None]).squeeze(2)
    return (distance_BK * valid_BK).sum(1) / valid_BK.sum(1).clamp(min=1)


def negative_cosine(u_BD: Tensor, v_BD: Tensor) -> Tensor:
    """−u·v of unit vectors: SimSiam eq. 1. Half of ``squared_distance``, up to a constant. Returns [B]."""
    return -(u_BD * v_BD).sum(1)


def info_nce(q_BD: Tensor, key_BD: Tensor, negative_ND: Tensor, temperature: float) -> Tensor:
    """−log [ exp(q·k₊/τ) / (exp(q·k₊/τ) + Σ_n exp(q·k_n/τ)) ]: MoCo eq. 1. Returns [B]."""
    positive_B1 = (q_BD * key_BD).sum(1, keepdim=True)
    logits = torch.cat((positive_B1, q_BD @ negative_ND.T), 1) / temperature
    return logits.logsumexp(1) - logits[:, 0]


def in_batch_info_nce(a_BD: Tensor, b_ND: Tensor, positive_B: Tensor, temperature: float) -> Tensor:
    """−log [ exp(a_i·b_p/τ) / Σ_n exp(a_i·b_n/τ) ] with p = positive_B[i], a row of b: NNCLR eq. 3. Returns [B]."""
    logits_BN = a_BD @ b_ND.T / temperature
    return logits_BN.logsumexp(1) - logits_BN.gather(1, positive_B[:, None])[:, 0]


def nt_xent(
    a_BD: Tensor, b_ND: Tensor, a_ND: Tensor, positive_B: Tensor, excluded_BM: Tensor, temperature: float
) -> Tensor:
    """−log [ exp(a_i·b_p/τ) / (Σ_n exp(a_i·b_n/τ) + Σ_{n∉excluded} exp(a_i·a_n/τ)) ]: SimCLR eq. 1, BSIM eq. 1.

    Args:
        a_BD: this rank's embeddings of one view.
        b_ND: embeddings of the other view, of the global batch.
        a_ND: embeddings of the first view, of the global batch.
        positive_B: int64, row of b that shows the image of a_i.
        excluded_BM: int64, rows of ``a_ND`` that are not negatives of a_i: a_i itself, and for a mixture of two images
            also the row of its partner.
        temperature: τ.

    Returns:
        [B].
    """
    within_BN = (a_BD @ a_ND.T).scatter(1, excluded_BM, -torch.inf)
    logits = torch.cat((a_BD @ b_ND.T, within_BN), 1) / temperature
    return logits.logsumexp(1) - logits.gather(1, positive_B[:, None])[:, 0]


def soft_nearest_neighbor(z_BD: Tensor, bank_ND: Tensor, temperature: float) -> Tensor:
    """Σ_n softmax_n(z·q_n/τ) q_n, scaled to unit length: NNCLR section 4.4. Returns [B, D]."""
    mixed_BD = (z_BD @ bank_ND.T / temperature).softmax(1) @ bank_ND
    return mixed_BD.div(mixed_BD.norm(dim=1, keepdim=True))


def sinkhorn(
    score_NC: Tensor, epsilon: float, iterations: int, rows: int, all_reduce_sum: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute codes by Sinkhorn-Knopp: Q = Diag(a) exp(S/ε) Diag(b), SwAV eq. 3.

    Each column of Q sums to rows/C over all ranks, each row to 1. Columns are normalized first and rows last. a and b
    are kept as vectors, so that the matrix is written only once.

    Args:
        score_NC: this rank's rows of the scores S.
        epsilon: ε, the strength of the entropy term.
        iterations: how often columns and rows are normalized.
        rows: number of rows on all ranks together.
        all_reduce_sum: adds a tensor over ranks.

    Returns:
        [N, C], this rank's rows of Q.
    """
    exp_NC = torch.exp(score_NC / epsilon)
    row_N = torch.ones_like(exp_NC[:, 0])
    for _ in range(iterations):
        column_C = 1 / (score_NC.shape[1] * all_reduce_sum(row_N @ exp_NC))
        row_N = 1 / (rows * (exp_NC @ column_C))
    return exp_NC * column_C * (rows * row_N)[:, None]


def swapped_prediction(score_BC: Tensor, code_BC: Tensor, temperature: float) -> Tensor:
    """−Σ_c q_c log softmax_c(z·c/τ): SwAV eq. 2. Returns [B]."""
    return -(code_BC * (score_BC / temperature).log_softmax(1)).sum(1)
