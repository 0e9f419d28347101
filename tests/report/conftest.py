"""Run folders with synthetic journals, and readers of the pages about them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from hpcssl import files
from hpcssl.run_dir import RunDir

PER_EPOCH = 10


def write_lines(path, lines):
    files.atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run():
    """``make_run(root, ...)`` writes the folder of a run of 4 epochs, with other curves for each ``lr``."""

    def make(root, *, name="mine", seed=0, lr=0.1, steps=40, ends=((0, 13, "preempted"), (9, 40, "done")), **sections):
        run = RunDir(root)
        recipe = {"name": name, "seed": seed, "optim": {"lr": lr, "batch": 8}, "model": {"arch": "tiny"}}
        recipe |= {"bank": {"size": 9}, "method": {"name": "msf"}, "schedule": {"epochs": 4}} | sections
        files.atomic_write(run.config, json.dumps(recipe))
        lines = [
            {
                "step": step,
                "epoch": (step - 1) / PER_EPOCH,
                "loss": 1 / (step + 10 * lr) if step != 3 else "nan",
                "lr": lr * (1 - step / 50),
                "spread": 0.8,
                "purity": 0.25 + lr / step,
            }
            | ({"images_per_s": 100.0 + step} if step % 10 == 0 else {})
            for step in range(1, steps + 1)
        ]
        write_lines(run.journal, lines)
        scores = [{"step": s, "metrics": {"knn1": 50 + s, "knn20": 40 + s * lr}} for s in (0, 20, 40) if steps]
        write_lines(run.eval_rows("knn"), scores)
        for k, (first, last, cause) in enumerate(ends, 1):
            start = {"attempt": k, "event": "start", "first_step": first, "time": 1000.0 * k, "world": 2, "host": "n1"}
            files.append_line(run.attempts, start)
            end = {"attempt": k, "event": "end", "cause": cause, "last_step": last, "time": 1000.0 * k + 500}
            if last is not None:
                files.append_line(run.attempts, end)
        if steps == 40:
            files.atomic_write(run.done, json.dumps({"step": 40, "weights": ""}))
        return run

    return make


def read_page(text):
    """The page as an element tree; an XML parser refuses anything that is not closed or quoted."""
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>"))


def find_svg(tree, name):
    """The SVG element of a figure, by the name in its ids."""
    return next(e for e in tree.iter("svg") if e.get("aria-labelledby", "").startswith(f"{name}-title"))


def read_points(picture, identifier):
    """The numbers behind the line of an SVG element, [N, 2], from the points of its path and its scale."""
    group = next(e for e in picture.iter("g") if e.get("id") == identifier)
    words = next(group.iter("path")).get("d").replace("M", " ").replace("L", " ").split()
    points = np.array(words, dtype=float).reshape(-1, 2)
    for k, axis in enumerate(("data-x", "data-y")):
        v0, v1, p0, p1 = map(float, picture.get(axis).split())
        points[:, k] = v0 + (points[:, k] - p0) * (v1 - v0) / (p1 - p0)
    return points
