"""Average precision of one class, compared with literal loops of VISSL and of VOC 2007."""

from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from hpcssl.evals.common.metrics import average_precision


def draw_scores(seed, samples=200, levels=None):
    draw = np.random.default_rng(seed)
    present = draw.random(samples) < draw.uniform(0.05, 0.6)
    present[draw.integers(samples)] = True
    score = present * draw.uniform(0, 2) + draw.normal(size=samples)
    return present, score if levels is None else np.round(score * levels) / levels


def literal_area(present, score):
    """VISSL's evaluate.py, step by step."""
    order = np.argsort(score)[::-1]
    hits = present[order].astype(float)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    recall = np.cumsum(hits) / hits.sum()
    r, p = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(p) - 2, -1, -1):
        p[i] = max(p[i], p[i + 1])
    return sum((r[i] - r[i - 1]) * p[i] for i in range(1, len(r)) if r[i] != r[i - 1])


def literal_eleven_points(present, score):
    points = []
    for threshold in sorted(set(score), reverse=True):
        chosen = score >= threshold
        hits = int((present & chosen).sum())
        points.append((Fraction(hits, int(present.sum())), hits / int(chosen.sum())))
    return sum(max(p for r, p in points if r >= Fraction(t, 10)) for t in range(11)) / 11


@pytest.mark.parametrize("seed", range(8))
def test_area_equals_the_official_code(seed):
    present, score = draw_scores(seed)
    assert average_precision(present, score, "area") == pytest.approx(literal_area(present, score), abs=1e-12)
    assert average_precision(present, score, "area") >= average_precision_score(present, score)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(8))
def test_eleven_points_equal_the_definition_and_ssl_transfer(seed, levels):
    present, score = draw_scores(seed, levels=levels)
    precision_11 = average_precision(present, score, "voc11")
    assert precision_11 == pytest.approx(literal_eleven_points(present, score), abs=1e-12)
    precision, recall = (x[:-1] for x in precision_recall_curve(present, score)[:2])  # ssl-transfer's linear.py
    assert precision_11 == pytest.approx(np.mean([precision[recall >= t - 1e-9].max() for t in np.linspace(0, 1, 11)]))


def test_equal_scores_count_together_in_any_order():
    present, score = draw_scores(3, levels=2)
    order = np.random.default_rng(0).permutation(len(score))
    for kind in ("area", "voc11"):
        assert average_precision(present, score, kind) == average_precision(present[order], score[order], kind)
    flat = np.zeros(10)
    assert average_precision(np.arange(10) < 3, flat, "area") == pytest.approx(0.3)
    assert average_precision(np.arange(10) < 3, flat, "voc11") == pytest.approx(0.3)


def test_a_recall_of_three_in_ten_reaches_three_tenths():
    present = np.array([1] * 3 + [0] * 7 + [1] * 7, bool)
    score = -np.arange(17.0)
    best = [1.0] * 4 + [10 / 17] * 7
    assert average_precision(present, score, "voc11") == pytest.approx(np.mean(best))
