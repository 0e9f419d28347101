"""Logistic regression: solutions equal to scikit-learn's, gradients, and warm starts.

scikit-learn's Newton method converges to the last bits. L-BFGS compares values of the objective f, which rounding lets
it tell apart only down to some d, and so ends at a point with f - f* of about d. Where the curvature is at least m,
that point is at most sqrt(2 d / m) from the solution.
"""

import logging
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hpcssl.evals.frozen import logistic
from tests.tolerances import rounding

SAMPLES = 120
SOLVER = {"solver": "newton-cholesky", "tol": 1e-9, "max_iter": 10_000}


def resolution(y):
    """Rounding of the objective, a mean over the samples whose value at zero weights bounds it."""
    return rounding(torch.float64, SAMPLES, scale=math.log(4) if y.ndim == 1 else 4 * math.log(2))


def draw_data(seed, samples=SAMPLES, width=10, classes=4):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, classes, samples)
    x = np.maximum(draw.normal(size=(classes, width))[y] + 1.5 * draw.normal(size=(samples, width)), 0)
    return x, y


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_multinomial_solution_equals_scikit_learns_with_c_1_over_l2(l2):
    x, y = draw_data(0)
    theirs = LogisticRegression(C=1 / l2, **SOLVER).fit(x, y)
    weight = logistic.fit(torch.tensor(x), torch.tensor(y), 4, l2, tolerance=1e-9).numpy()
    tolerance = math.sqrt(2 * resolution(y) / (l2 / SAMPLES))  # the penalty alone has the curvature l2 / n
    np.testing.assert_allclose(weight[:, :-1], theirs.coef_, rtol=0, atol=tolerance)
    decision = logistic.compute_logits(torch.tensor(x), torch.tensor(weight)).numpy()
    ours, wanted = (np.exp(d) / np.exp(d).sum(1, keepdims=True) for d in (decision, theirs.decision_function(x)))
    # the mean of the divergences KL(wanted, ours) is at most f - f*; Pinsker: no probability differs by sqrt(KL / 2)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=math.sqrt(SAMPLES * resolution(y) / 2))


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_one_against_the_rest_equals_scikit_learn_for_each_class(l2):
    x, y = draw_data(1)
    targets = np.where(np.random.default_rng(2).random((120, 4)) < 0.2, 1, np.where(y[:, None] == np.arange(4), 1, -1))
    weight = logistic.fit(torch.tensor(x), torch.tensor(targets, dtype=torch.float64), 4, l2, tolerance=1e-9).numpy()
    extended = np.column_stack((x, np.ones(SAMPLES)))
    for c in range(4):
        theirs = LogisticRegression(C=1 / l2, **SOLVER).fit(x, targets[:, c])
        share = 1 / (1 + np.exp(-theirs.decision_function(x)))
        hessian = (extended * (share * (1 - share))[:, None]).T @ extended + np.diag([l2] * x.shape[1] + [0])
        tolerance = math.sqrt(2 * resolution(targets) / (np.linalg.eigvalsh(hessian)[0] / SAMPLES))
        np.testing.assert_allclose(weight[c], [*theirs.coef_[0], *theirs.intercept_], rtol=0, atol=tolerance)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_gradient_equals_finite_differences(multi_label):
    x, y = (torch.tensor(v) for v in draw_data(3))
    y = torch.where(y[:, None] == torch.arange(4), 1.0, -1.0).double() if multi_label else y
    weight = torch.randn(4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    closure = logistic.build_closure(x, y, 0.7, weight)
    value, step = closure(), 1e-5
    gradient, before = weight.grad.clone(), weight.clone()
    # The error of a central difference is step^2 / 6 times a third derivative, which is below that of the logistic
    # function, 1 / 8, times the mean of |x|^3; and the rounding of two values, divided by 2 * step.
    tolerance = step**2 / 48 * float(x.abs().amax() ** 3) + rounding(torch.float64, 120, scale=float(value)) / step
    for place in ((0, 0), (2, 5), (3, 10)):
        ends = []
        for sign in (1, -1):
            weight[place] = before[place] + sign * step
            ends.append(float(closure()))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient[place]), abs=tolerance)
        weight[place] = before[place]
    logits = x @ weight[:, :-1].T + weight[:, -1]
    loss = (
        torch.nn.functional.soft_margin_loss(logits, y, reduction="sum")
        if multi_label
        else torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    )
    assert float(value) == pytest.approx(float(loss + 0.35 * weight[:, :-1].square().sum()) / 120)


def objective(x, y, l2, weight):
    """The objective of the multinomial model, written out."""
    logits = x @ weight[:, :-1].T + weight[:, -1]
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    return (loss + l2 / 2 * weight[:, :-1].square().sum()) / len(x)


def test_a_warm_start_reaches_the_same_solution_in_fewer_evaluations(monkeypatch):
    x, y = (torch.tensor(v) for v in draw_data(4))
    evaluations, build_closure = [], logistic.build_closure

    def build_counting_closure(*arguments):
        closure = build_closure(*arguments)
        return lambda: evaluations.append(1) or closure()

    monkeypatch.setattr(logistic, "build_closure", build_counting_closure)
    near = logistic.fit(x, y, 4, 1.0)
    cold, counts = logistic.fit(x, y, 4, 0.8, tolerance=1e-8), []
    # no entry of the gradient is above 1e-5: the solution is off by at most that times the inverse of the Hessian
    hessian = torch.autograd.functional.hessian(lambda w: objective(x, y, 0.8, w.view(4, -1)), cold.flatten())
    tolerance = 1.1e-5 * float(torch.linalg.pinv(hessian, hermitian=True, rtol=1e-9).abs().sum(1).max())
    for start in (None, near):
        evaluations.clear()
        weight = logistic.fit(x, y, 4, 0.8, start, tolerance=1e-5)
        counts.append(len(evaluations))
        weight.requires_grad_()
        objective(x, y, 0.8, weight).backward()
        assert weight.grad.abs().max() <= 1e-5
        torch.testing.assert_close(weight.detach(), cold, rtol=0, atol=tolerance)
    assert counts[1] < counts[0]


def test_a_fit_that_does_not_converge_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(logistic, "_MAX_ITERATIONS", 2)
    x, y = (torch.tensor(v) for v in draw_data(5))
    with caplog.at_level(logging.WARNING, "hpcssl"):
        logistic.fit(x, y, 4, 1e-3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.args[0] == 1e-3 and record.args[1] > 10 * logistic.TOLERANCE
