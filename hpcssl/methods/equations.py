"""Each formula of the documents once. Losses are per row, [B]; the mean over rows and ranks is taken by the step.

Letters in shapes: B rows of this rank, D embedding width, K neighbours, N rows of the global batch or of the bank. All
embeddings have unit length, u is a prediction of the online network, v and z come from the target network and carry no
gradient (but in ``nt_xent``, where both sides do).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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


def negative_cosine(u_BD: Tensor, v_BD: Tensor) -> Tensor:
    """−u·v for unit vectors: SimSiam eq. 1. Half of ``regression``, less the constant. [B]"""
    return -(u_BD * v_BD).sum(1)


def info_nce(q_BD: Tensor, key_BD: Tensor, negative_ND: Tensor, tau: float) -> Tensor:
    """−log [ exp(q·k₊/τ) / (exp(q·k₊/τ) + Σ_n exp(q·k_n/τ)) ]: MoCo eq. 1. [B]"""
    positive_B1 = (q_BD * key_BD).sum(1, keepdim=True)
    logits = torch.cat((positive_B1, q_BD @ negative_ND.T), 1) / tau
    return logits.logsumexp(1) - logits[:, 0]


def contrast(a_BD: Tensor, b_ND: Tensor, partner_B: Tensor, tau: float) -> Tensor:
    """−log [ exp(a_i·b_p/τ) / Σ_n exp(a_i·b_n/τ) ] with p = partner_B[i], a row of b: NNCLR eq. 3. [B]"""
    logits_BN = a_BD @ b_ND.T / tau
    return logits_BN.logsumexp(1) - logits_BN.gather(1, partner_B[:, None])[:, 0]


def nt_xent(a_BD: Tensor, b_ND: Tensor, a_ND: Tensor, partner_B: Tensor, own_BM: Tensor, tau: float) -> Tensor:
    """−log [ exp(a_i·b_p/τ) / (Σ_n exp(a_i·b_n/τ) + Σ_{n∉own} exp(a_i·a_n/τ)) ]: SimCLR eq. 1, BSIM eq. 1. [B]

    ``a_ND``: all rows of the batch of the kind of a. ``own_BM``: those that are no negatives of a_i, which is a_i
    itself, and for a mixture of two images its partner's.
    """
    within_BN = (a_BD @ a_ND.T).scatter(1, own_BM, -torch.inf)
    logits = torch.cat((a_BD @ b_ND.T, within_BN), 1) / tau
    return logits.logsumexp(1) - logits.gather(1, partner_B[:, None])[:, 0]


def soft_neighbour(z_BD: Tensor, bank_ND: Tensor, tau: float) -> Tensor:
    """Σ_n softmax_n(z·q_n/τ) q_n, scaled to unit length: the soft nearest neighbour of NNCLR section 4.4. [B, D]"""
    mixed_BD = (z_BD @ bank_ND.T / tau).softmax(1) @ bank_ND
    return mixed_BD / mixed_BD.norm(dim=1, keepdim=True)


def sinkhorn(score_NC: Tensor, epsilon: float, rounds: int, rows: int, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Codes by Sinkhorn-Knopp: SwAV eq. 3, Q = Diag(a) exp(S/ε) Diag(b), whose columns get rows/C in all and whose rows
    sum to 1. [N, C]

    ``score_NC``: this rank's of ``rows`` rows; ``total`` adds over ranks. Columns first, rows last, ``rounds`` times; a
    and b are kept as vectors, so that the matrix is written once.
    """
    exp_NC = torch.exp(score_NC / epsilon)
    row_N = torch.ones_like(exp_NC[:, 0])
    for _ in range(rounds):
        column_C = 1 / (score_NC.shape[1] * total(row_N @ exp_NC))
        row_N = 1 / (rows * (exp_NC @ column_C))
    return exp_NC * column_C * (rows * row_N)[:, None]


def swapped_prediction(score_BC: Tensor, code_BC: Tensor, tau: float) -> Tensor:
    """−Σ_c q_c log softmax_c(z·c/τ): SwAV eq. 2. [B]"""
    return -(code_BC * (score_BC / tau).log_softmax(1)).sum(1)
