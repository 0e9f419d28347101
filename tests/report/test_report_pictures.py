"""Neighbors and map of a page: from stored features, or computed on request."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hpcssl import files
from hpcssl.report import pictures
from hpcssl.report.facts import read_facts
from hpcssl.report.page import write_report
from hpcssl.results import gallery
from tests import scored_runs
from tests.report.conftest import find_svg, read_page
from tests.report.test_page import check_independence, check_markup


@pytest.fixture
def scored_run(tmp_path, make_run, make_shards):
    """A run with weights of step 7, whose neighbors are known."""
    sets = scored_runs.write_shards(tmp_path, make_shards)
    run = make_run(tmp_path / "run", data={kind: str(shards.root) for kind, shards in sets.items()})
    scored_runs.write_weights(run)
    files.atomic_write(run.done, json.dumps({"step": 7, "weights": ""}))
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_pictures_come_from_stored_features(scored_run, tmp_path):
    text = "".join(pictures.draw_pictures(read_facts(scored_run, "it"), compute=False))
    assert "--compute" in text and "<img" not in text
    assert not scored_run.features.exists(), "nothing is computed without a request"
    (page,) = write_report([scored_run.root], tmp_path / "page.html", compute=True)
    text = page.read_text()
    check_independence(text)
    tree = check_markup(text)
    encoded = gallery.encode_sets(scored_run, compute=False)
    shown = gallery.find_neighbors(encoded, gallery.QUERIES, gallery.NEIGHBORS)
    frames = [image.get("class") for image in tree.iter("img")]
    assert frames.count("same") == shown.is_same_label.sum() > 0
    assert frames.count("other") == (~shown.is_same_label).sum() > 0 and frames.count("query") == 10
    picture = find_svg(tree, "map")
    markers = [
        sum(e.tag == "use" for e in group.iter()) for group in picture.iter("g") if "points-" in str(group.get("id"))
    ]
    assert markers == [12, 12], "one marker per validation image and class"
    assert {"class 0", "class 1"} <= {text.text for text in picture.iter("text")}
    again = pictures.draw_pictures(read_facts(scored_run, "it"), compute=False)
    assert all(part in text for part in again), "stored features give the same pictures"


def test_the_map_has_some_images_of_some_classes():
    labels = np.repeat(np.arange(25), 80)
    chosen, classes = pictures.choose_points(labels)
    assert len(classes) == pictures.MAP_CLASSES and set(labels[chosen]) == set(classes)
    assert len(chosen) == len(set(chosen)) == 800 and np.array_equal(chosen, pictures.choose_points(labels)[0])
    chosen, classes = pictures.choose_points(np.repeat(np.arange(2), 900))
    assert len(chosen) == pictures.MAP_POINTS and classes == [0, 1]


def test_similar_rows_are_near_each_other_on_the_map():
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(2, 8, dtype=np.float32), 60, 0) + rng.normal(0, 0.05, (120, 8)).astype(np.float32)
    for count, expected in ((60, "PCA"), (120, "t-SNE")):
        points, method = pictures.project(rows[60 - count // 2 : 60 + count // 2])
        assert method == expected
        first, second = points[: count // 2], points[count // 2 :]
        gap = np.linalg.norm(first.mean(0) - second.mean(0))
        assert gap > 2 * max(np.linalg.norm(part - part.mean(0), axis=1).mean() for part in (first, second))


def test_the_points_of_the_map_are_those_of_the_projection():
    points = np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0], [1.0, 1.0]], dtype=np.float32)
    groups = [np.array([True, True, False, False]), np.array([False, False, True, True])]
    tree = read_page(pictures._draw_points(points, groups, ["one", "two"]))
    for k in range(2):
        group = next(e for e in tree.iter("g") if e.get("id") == f"map-points-{k}")
        places = [(float(e.get("x")), float(e.get("y"))) for e in group.iter("use")]
        drawn = []
        for x, y in places:
            (a0, a1, p0, p1), (b0, b1, q0, q1) = (map(float, tree.get(axis).split()) for axis in ("data-x", "data-y"))
            drawn.append((a0 + (x - p0) * (a1 - a0) / (p1 - p0), b0 + (y - q0) * (b1 - b0) / (q1 - q0)))
        np.testing.assert_allclose(drawn, points[groups[k]], atol=1e-6)
