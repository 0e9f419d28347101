import logging

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hpcssl.evals import logistic


def drawn(seed, samples=120, width=10, classes=4):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, classes, samples)
    x = np.maximum(draw.normal(size=(classes, width))[y] + 1.5 * draw.normal(size=(samples, width)), 0)
    return x, y


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_multinomial_is_scikit_learns_with_c_the_inverse(l2):
    x, y = drawn(0)
    theirs = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=10_000).fit(x, y)
    found = logistic.fit(torch.tensor(x), torch.tensor(y), 4, l2, tolerance=1e-9).numpy()
    np.testing.assert_allclose(found[:, :-1], theirs.coef_, atol=2e-5 * np.abs(theirs.coef_).max())
    decision = logistic.decide(torch.tensor(x), torch.tensor(found)).numpy()
    ours, wanted = (np.exp(d) / np.exp(d).sum(1, keepdims=True) for d in (decision, theirs.decision_function(x)))
    np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_one_against_the_rest_is_scikit_learns_class_by_class(l2):
    x, y = drawn(1)
    targets = np.where(np.random.default_rng(2).random((120, 4)) < 0.2, 1, np.where(y[:, None] == np.arange(4), 1, -1))
    found = logistic.fit(torch.tensor(x), torch.tensor(targets, dtype=torch.float64), 4, l2, tolerance=1e-9).numpy()
    for c in range(4):
        theirs = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=10_000).fit(x, targets[:, c])
        np.testing.assert_allclose(found[c], [*theirs.coef_[0], *theirs.intercept_], atol=2e-5 * np.abs(found[c]).max())


@pytest.mark.parametrize("several", [False, True])
def test_the_gradient_is_the_objectives(several):
    x, y = (torch.tensor(v) for v in drawn(3))
    y = torch.where(y[:, None] == torch.arange(4), 1.0, -1.0).double() if several else y
    weight = torch.randn(4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    closure = logistic.objective(x, y, 0.7, weight)
    value, step = closure(), 1e-6
    gradient, before = weight.grad.clone(), weight.clone()
    for place in ((0, 0), (2, 5), (3, 10)):
        weight[place] = before[place] + step
        assert float(closure() - value) / step == pytest.approx(float(gradient[place]), rel=1e-3, abs=1e-6)
        weight[place] = before[place]
    logits = x @ weight[:, :-1].T + weight[:, -1]
    loss = torch.nn.functional.soft_margin_loss(logits, y, reduction="sum") if several else \
        torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    assert float(value) == pytest.approx(float(loss + 0.35 * weight[:, :-1].square().sum()) / 120)


def test_from_another_solution_the_same_with_fewer_rounds(monkeypatch):
    x, y = (torch.tensor(v) for v in drawn(4))
    counted, before = [], logistic.objective

    def objective(*arguments):
        closure = before(*arguments)
        return lambda: counted.append(1) or closure()

    monkeypatch.setattr(logistic, "objective", objective)
    near = logistic.fit(x, y, 4, 1.0)
    cold, rounds = logistic.fit(x, y, 4, 0.8, tolerance=1e-8), []
    for start in (None, near):
        counted.clear()
        found = logistic.fit(x, y, 4, 0.8, start, tolerance=1e-5)
        rounds.append(len(counted))
        torch.testing.assert_close(found, cold, rtol=0, atol=1e-3)
    assert rounds[1] < rounds[0]


def test_what_does_not_converge_is_said(monkeypatch, caplog):
    monkeypatch.setattr(logistic, "_ROUNDS", 2)
    x, y = (torch.tensor(v) for v in drawn(5))
    with caplog.at_level(logging.WARNING, "hpcssl"):
        logistic.fit(x, y, 4, 1e-3)
    assert "the gradient is still" in caplog.text
