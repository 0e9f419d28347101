"""Average precision: cases worked out by hand, and VOC's own rule as a literal loop."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from hpcssl.evals.detect_data import Pictures
from hpcssl.evals.detect_score import precision

_spec = importlib.util.spec_from_file_location("detect_shards", Path(__file__).with_name("detect_shards.py"))
detection_shards = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(detection_shards)

BLACK = np.zeros((100, 100, 3), np.uint8)


def scored(root, notes, found, **options):
    pictures = Pictures(detection_shards.write(root, notes, [BLACK] * len(notes)))
    order = [int(pictures.data.key(i)) for i in range(len(notes))]  # the writer shuffles
    return precision([found[i] for i in order], pictures, masks=False, **options)


def says(*boxes):
    """Boxes as (x1, y1, x2, y2, score, label)."""
    return {"boxes": [list(b[:4]) for b in boxes], "scores": [b[4] for b in boxes], "labels": [b[5] for b in boxes]}


def test_a_case_by_hand(tmp_path):
    """Two objects; a hit of IoU 1, a miss, a hit of IoU 0.62: precision 1 up to recall 0.5, then 2/3."""
    notes = [{"boxes": [[10, 10, 60, 60]], "labels": [0], "difficult": [0]},
             {"boxes": [[0, 0, 50, 50]], "labels": [0], "difficult": [0]}]
    found = [says((10, 10, 60, 60, 0.9, 0), (70, 70, 90, 90, 0.8, 0)), says((0, 0, 50, 31, 0.7, 0))]
    voc = scored(tmp_path / "a", notes, found, points=11)
    coco = scored(tmp_path / "b", notes, found, points=101)
    low, high = (6 + 5 * 2 / 3) / 11, 6 / 11
    assert voc["AP50"] == pytest.approx(100 * low) and voc["AP75"] == pytest.approx(100 * high)
    assert voc["AP"] == pytest.approx(100 * (3 * low + 7 * high) / 10)
    assert coco["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_difficult_objects_count_neither_way_and_crowds_forgive_what_is_in_them(tmp_path):
    """A hit, two detections of the second object and a speck inside of it, all surer than the hit."""
    note = {"boxes": [[0, 0, 20, 20], [40, 40, 90, 90]], "labels": [0, 0]}
    found = [says((0, 0, 20, 20, 0.5, 0), (40, 40, 90, 90, 0.9, 0), (42, 40, 90, 90, 0.8, 0), (60, 60, 70, 70, 0.7, 0))]
    difficult = scored(tmp_path / "a", [note | {"difficult": [0, 1]}], found, points=11)
    crowd = scored(tmp_path / "b", [note | {"iscrowd": [0, 1]}], found, points=11)
    plain = scored(tmp_path / "c", [note | {"iscrowd": [0, 0]}], found, points=101)
    assert difficult["AP50"] == pytest.approx(50)  # the speck is a miss, the others are nothing
    assert crowd["AP50"] == pytest.approx(100)
    assert plain["AP50"] == pytest.approx(100 * (51 * 1 + 50 * 0.5) / 101)


def literal(notes, found, least):
    """VOC's evaluation of 2007 in its own order (devkit, VOCevaldet.m): mean over classes, 11 recalls."""
    means = []
    for label in (0, 1):
        truth = [[(b, d) for b, k, d in zip(n["boxes"], n["labels"], n["difficult"], strict=True) if k == label]
                 for n in notes]
        said = sorted((-s, i, b) for i, f in enumerate(found)
                      for b, s, k in zip(f["boxes"], f["scores"], f["labels"], strict=True) if k == label)
        seen, hits, misses, curve = set(), 0, 0, []
        total = sum(not d for some in truth for _, d in some)
        for _, i, box in said:
            best, j = max(((overlap(box, b), j) for j, (b, _) in enumerate(truth[i])), default=(0, None))
            if best > least and truth[i][j][1]:
                continue
            right = best > least and (i, j) not in seen
            seen |= {(i, j)} if right else set()
            hits, misses = hits + right, misses + (not right)
            curve.append((hits / total, hits / (hits + misses)))
        means.append(np.mean([max((p for r, p in curve if r >= at / 10 - 1e-12), default=0) for at in range(11)]))
    return 100 * np.mean(means)


def overlap(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_vocs_own_rule_where_objects_do_not_overlap(tmp_path):
    draw, notes, found = np.random.default_rng(0), [], []
    for _ in range(40):
        places = [(x, y) for x in (0, 50) for y in (0, 50) if draw.random() < 0.7] or [(0, 0)]
        boxes = [[x + 5, y + 5, x + draw.integers(30, 45), y + draw.integers(30, 45)] for x, y in places]
        labels = draw.integers(0, 2, len(boxes)).tolist()
        notes.append({"boxes": [[float(v) for v in b] for b in boxes], "labels": labels,
                      "difficult": (draw.random(len(boxes)) < 0.3).astype(int).tolist()})
        answers = [(*(np.array(b) + draw.normal(0, 2.5, 4)).tolist(), float(draw.random()),
                    k if draw.random() < 0.8 else 1 - k)
                   for b, k in zip(boxes, labels, strict=True) for _ in range(draw.integers(0, 4))]
        found.append(says(*answers))
    scores = scored(tmp_path / "x", notes, found, points=11)
    for name, least in (("AP50", 0.5), ("AP75", 0.75)):
        assert 5 < scores[name] < 95
        assert scores[name] == pytest.approx(literal(notes, found, least))
