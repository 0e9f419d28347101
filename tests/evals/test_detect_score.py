"""Average precision of detections: cases worked out by hand, and VOC's rule as a literal loop."""

import numpy as np
import pytest

from hpcssl.evals.detection.data import DetectionShards
from hpcssl.evals.detection.masks import encode_mask
from hpcssl.evals.detection.scoring import compute_average_precision
from tests.evals import detect_shards

BLACK = np.zeros((100, 100, 3), np.uint8)


def score(root, annotations, detections, masks=False, **options):
    images = DetectionShards(detect_shards.write(root, annotations, [BLACK] * len(annotations)))
    order = [int(images.data.key(i)) for i in range(len(annotations))]  # the writer shuffles
    return compute_average_precision([detections[i] for i in order], images, masks=masks, **options)


def detected(*boxes):
    """Detections of one image from boxes (x1, y1, x2, y2, score, label)."""
    return {"boxes": [list(b[:4]) for b in boxes], "scores": [b[4] for b in boxes], "labels": [b[5] for b in boxes]}


def test_average_precision_worked_out_by_hand(tmp_path):
    """Two objects; a hit of IoU 1, a miss, a hit of IoU 0.62: precision 1 up to recall 0.5, then 2/3."""
    annotations = [
        {"boxes": [[10, 10, 60, 60]], "labels": [0], "difficult": [0]},
        {"boxes": [[0, 0, 50, 50]], "labels": [0], "difficult": [0]},
    ]
    detections = [detected((10, 10, 60, 60, 0.9, 0), (70, 70, 90, 90, 0.8, 0)), detected((0, 0, 50, 31, 0.7, 0))]
    voc = score(tmp_path / "a", annotations, detections, points=11)
    coco = score(tmp_path / "b", annotations, detections, points=101)
    low, high = (6 + 5 * 2 / 3) / 11, 6 / 11
    assert voc["AP50"] == pytest.approx(100 * low) and voc["AP75"] == pytest.approx(100 * high)
    assert voc["AP"] == pytest.approx(100 * (3 * low + 7 * high) / 10)
    assert coco["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_images_without_detections_score_0_with_masks_too(tmp_path):
    """An image without detections has no bitmap to decode. Its objects count as missed."""
    ring = [[10, 10, 60, 10, 60, 60, 10, 60]]
    annotation = {
        "boxes": [[10, 10, 60, 60]],
        "labels": [0],
        "iscrowd": [0],
        "area": [2500],
        "segmentation": [ring],
    }
    nothing = {"boxes": [], "scores": [], "labels": [], "masks": []}
    scores = score(tmp_path / "a", [annotation], [nothing], masks=True, points=101)
    assert scores == dict.fromkeys(("AP", "AP50", "AP75", "AP_mask", "AP50_mask", "AP75_mask"), 0.0)
    mask = encode_mask(ring, BLACK.shape[:2])["counts"].decode()
    hit = detected((10, 10, 60, 60, 0.9, 0)) | {"masks": [mask]}
    half = score(tmp_path / "b", [annotation, annotation], [hit, nothing], masks=True, points=101)
    assert half == dict.fromkeys(scores, pytest.approx(100 * 51 / 101))  # precision 1 up to recall 0.5


def test_difficult_objects_are_ignored_and_crowds_excuse_what_lies_in_them(tmp_path):
    """A hit, two detections of the second object and one speck inside it, all with higher scores than the hit."""
    annotation = {"boxes": [[0, 0, 20, 20], [40, 40, 90, 90]], "labels": [0, 0]}
    detections = [
        detected((0, 0, 20, 20, 0.5, 0), (40, 40, 90, 90, 0.9, 0), (42, 40, 90, 90, 0.8, 0), (60, 60, 70, 70, 0.7, 0))
    ]
    difficult = score(tmp_path / "a", [annotation | {"difficult": [0, 1]}], detections, points=11)
    crowd = score(tmp_path / "b", [annotation | {"iscrowd": [0, 1]}], detections, points=11)
    plain = score(tmp_path / "c", [annotation | {"iscrowd": [0, 0]}], detections, points=101)
    assert difficult["AP50"] == pytest.approx(50)  # the speck is a miss, the other two count neither way
    assert crowd["AP50"] == pytest.approx(100)
    assert plain["AP50"] == pytest.approx(100 * (51 * 1 + 50 * 0.5) / 101)


def literal(annotations, detections, minimum_iou):
    """VOC's evaluation of 2007 in its own order (devkit, VOCevaldet.m): mean over classes, 11 recalls."""
    means = []
    for label in (0, 1):
        truth = [
            [(b, d) for b, k, d in zip(n["boxes"], n["labels"], n["difficult"], strict=True) if k == label]
            for n in annotations
        ]
        ranked = sorted(
            (-s, i, b)
            for i, of_image in enumerate(detections)
            for b, s, k in zip(of_image["boxes"], of_image["scores"], of_image["labels"], strict=True)
            if k == label
        )
        matched, hits, misses, curve = set(), 0, 0, []
        total = sum(not d for objects in truth for _, d in objects)
        for _, i, box in ranked:
            best, j = max(((overlap(box, b), j) for j, (b, _) in enumerate(truth[i])), default=(0, None))
            if best > minimum_iou and truth[i][j][1]:
                continue
            right = best > minimum_iou and (i, j) not in matched
            matched |= {(i, j)} if right else set()
            hits, misses = hits + right, misses + (not right)
            curve.append((hits / total, hits / (hits + misses)))
        means.append(np.mean([max((p for r, p in curve if r >= at / 10 - 1e-12), default=0) for at in range(11)]))
    return 100 * np.mean(means)


def overlap(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_scores_equal_those_of_vocs_rule_where_objects_do_not_overlap(tmp_path):
    draw, annotations, detections = np.random.default_rng(0), [], []
    for _ in range(40):
        places = [(x, y) for x in (0, 50) for y in (0, 50) if draw.random() < 0.7] or [(0, 0)]
        boxes = [[x + 5, y + 5, x + draw.integers(30, 45), y + draw.integers(30, 45)] for x, y in places]
        labels = draw.integers(0, 2, len(boxes)).tolist()
        annotations.append(
            {
                "boxes": [[float(v) for v in b] for b in boxes],
                "labels": labels,
                "difficult": (draw.random(len(boxes)) < 0.3).astype(int).tolist(),
            }
        )
        boxes_with_scores = [
            (
                *(np.array(b) + draw.normal(0, 2.5, 4)).tolist(),
                float(draw.random()),
                k if draw.random() < 0.8 else 1 - k,
            )
            for b, k in zip(boxes, labels, strict=True)
            for _ in range(draw.integers(0, 4))
        ]
        detections.append(detected(*boxes_with_scores))
    scores = score(tmp_path / "x", annotations, detections, points=11)
    for name, minimum_iou in (("AP50", 0.5), ("AP75", 0.75)):
        assert 5 < scores[name] < 95
        assert scores[name] == pytest.approx(literal(annotations, detections, minimum_iou))
