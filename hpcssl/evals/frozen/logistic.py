"""Logistic regression with an l2 penalty, by L-BFGS on the device of the features, in double precision.

    multinomial:    min  sum_i -log softmax(W x_i + b)[y_i]                      + l2/2 |W|^2
    one vs. rest:   min  sum_i sum_c log(1 + exp(-t_ic (w_c·x_i + b_c)))         + l2/2 |W|^2        t = ±1

The sum over images, not their mean, and no penalty on b: scikit-learn's objective with C = 1/l2, which is how
linusericsson/ssl-transfer (linear.py ``LinearTester.validate``: ``C = 1. / wd``) reads the "l2 regularization" of
Kornblith et al. 2019 and BYOL (appendix D.1); neither says sum or mean. The functions below compute the objective
divided by N, as scikit-learn does: converged means that no entry of its gradient is above ``TOLERANCE``.

torch's L-BFGS rather than scikit-learn's (the same algorithm: 186 and 178 evaluations for five penalties of 7575 x 2048
features in 101 classes, 46 and 35 s of one core), because it runs on a GPU: Food101 is ten times that, 63 GFLOP per
evaluation. Weaker penalties start from the solution of stronger ones: 45 of them took 816 evaluations in one chain,
906 in the five chains of nine that ``transfer.py`` distributes over the ranks, and 1807 from zero each (2500 x 384).

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

LOG = logging.getLogger("hpcssl")

TOLERANCE = 1e-5
"""Largest entry of the gradient at convergence. scikit-learn's default is 1e-4; ssl-transfer stops after 100 rounds."""
_MAX_ITERATIONS, _MIN_CHANGE = 10_000, 1e-15


def fit(
    x_ND: Tensor, y: Tensor, classes: int, l2: float, start: Tensor | None = None, *, tolerance: float = TOLERANCE
) -> Tensor:
    """Fit a logistic regression.

    Args:
        x_ND: Features, float64 [N, D].
        y: Labels, int64 [N], for the multinomial model; targets ±1, [N, C], for one class against the rest.
        classes: Number of classes, C.
        l2: The penalty.
        start: A solution for another penalty, from which fewer iterations remain; None for zeros.
        tolerance: Largest entry of the gradient at convergence.

    Returns:
        W and, in the last column, b: float64 [C, D + 1].
    """
    weight = x_ND.new_zeros(classes, x_ND.shape[1] + 1) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=_MAX_ITERATIONS,
        max_eval=2 * _MAX_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=_MIN_CHANGE,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(build_closure(x_ND, y, l2, weight))  # type: ignore[no-untyped-call]  # torch
    assert weight.grad is not None
    largest = float(weight.grad.abs().max())
    if not largest <= 10 * tolerance:
        LOG.warning("logistic regression with l2 %g has not converged: the gradient is still %.1e", l2, largest)
    return weight.detach()


def build_closure(x_ND: Tensor, y: Tensor, l2: float, weight: Tensor) -> Callable[[], Tensor]:
    """Return a function that writes the gradient into ``weight.grad`` and returns the objective, both divided by N.

    Args:
        x_ND: See ``fit``.
        y: See ``fit``.
        l2: See ``fit``.
        weight: W and b, float64 [C, D + 1].
    """
    samples = len(x_ND)
    rows = torch.arange(samples, device=x_ND.device)

    @torch.no_grad()
    def closure() -> Tensor:
        logits_NC = compute_logits(x_ND, weight)
        if y.ndim == 1:
            total_N = logits_NC.logsumexp(1)
            loss = (total_N - logits_NC[rows, y]).sum()
            residual_NC = logits_NC.sub_(total_N[:, None]).exp_()
            residual_NC[rows, y] -= 1
        else:
            loss = torch.nn.functional.softplus(-y * logits_NC).sum()
            residual_NC = -y * torch.sigmoid(-y * logits_NC)
        penalty = l2 * weight
        penalty[:, -1] = 0
        weight.grad = (torch.cat((residual_NC.T @ x_ND, residual_NC.sum(0)[:, None]), 1) + penalty) / samples
        return (loss + (penalty * weight).sum() / 2) / samples

    return closure


def compute_logits(x_ND: Tensor, weight: Tensor) -> Tensor:
    """Logits [N, C] of features [N, D] under W and b, [C, D + 1]."""
    return torch.addmm(weight[:, -1], x_ND, weight[:, :-1].T)
