"""``hpcssl report``: what the page says equals what the run folders hold, and the page needs nothing else."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from hpcssl import files
from hpcssl.cli import main
from hpcssl.errors import EXIT_USAGE, ConfigError, EvalError
from hpcssl.report import panels, words
from hpcssl.report.facts import name_runs, read_facts
from hpcssl.report.page import write_report
from hpcssl.report.settings import find_differences
from hpcssl.results import curves
from tests.report.conftest import PER_EPOCH, find_svg, read_page, read_points

DIGIT = 1e-6
"""The last digit of a position in matplotlib's SVG files, in points."""


def journal_points(run, name):
    lines = [line for line in files.read_lines(run.journal, {"step": int}) if name in line]
    factor = 100 if name == "purity" else 1
    points = np.array([[line["step"] / PER_EPOCH, factor * float(line[name])] for line in lines])
    return points[np.isfinite(points[:, 1])]


def check_points(picture, identifier, expected):
    drawn = read_points(picture, identifier)
    for k, axis in enumerate(("data-x", "data-y")):
        v0, v1, p0, p1 = map(float, picture.get(axis).split())
        np.testing.assert_allclose(drawn[:, k], expected[:, k], rtol=0, atol=2 * DIGIT * abs((v1 - v0) / (p1 - p0)))


def check_markup(text):
    """The rules of HTML that an XML parser does not know, as far as this page could break them."""
    tree = read_page(text)
    ids = Counter(e.get("id") for e in tree.iter() if e.get("id"))
    assert max(ids.values()) == 1, ids.most_common(3)
    links = re.findall(r"url\(#([^)]*)\)|href=['\"]#([^'\"]*)", text)
    assert {a or b for a, b in links} <= ids.keys()
    named = [name for e in tree.iter() for name in e.get("aria-labelledby", "").split()]
    assert named and set(named) <= ids.keys()
    assert all(image.get("alt") for image in tree.iter("img"))
    for parent in ("p", "h1", "h2", "summary"):
        inner = {e.tag for block in tree.iter(parent) for e in block.iter()} - {parent}
        assert inner <= {"a", "code"}, parent
    for row in tree.iter("table"):
        assert len({len(tr) for tr in row.iter("tr")}) == 1, "every row has a cell of every column"
    return tree


def check_independence(text):
    """Nothing in the page names something that a browser would load."""
    assert not re.search(r"<script|@import|https?://|\ssrc=['\"](?!data:)|url\((?!#)", text)
    assert "default-src &#x27;none&#x27;" in text


@pytest.mark.parametrize("count", [1, 40])
def test_the_plotted_points_are_those_of_the_journals(tmp_path, make_run, count):
    runs = [make_run(tmp_path / f"r{k:02}", lr=0.1 + k / 100) for k in range(count)]
    (page,) = write_report([run.root for run in runs], tmp_path / "page.html")
    text = page.read_text()
    tree = check_markup(text)
    check_independence(text)
    for name in ("loss", "purity", "spread", "lr", "images_per_s"):
        picture = find_svg(tree, name)
        for k in range(count) if name == "loss" else (0, count - 1):
            check_points(picture, f"{name}-line-{k}-0", journal_points(runs[k], name))
    picture = find_svg(tree, "knn")
    for k in (0, count - 1):
        lr = 0.1 + k / 100
        check_points(picture, f"knn-line-{k}-0", np.array([(e, 40 + 10 * e * lr) for e in (0, 2, 4)]))
        check_points(picture, f"knn-line-{k}-1", np.array([(e, 50 + 10 * e) for e in (0, 2, 4)]))
    assert len(list(tree.iter("svg"))) == 6 + 1 + (count if count > 1 else 0), "curves, attempts, and a legend"
    legend = [li for ol in tree.iter("ol") for li in ol]
    looks = [
        (li.find("svg")[0].get("stroke-dasharray"), li.find("svg")[1].get("d")) for li in legend
    ]  # what is left of a line without color
    assert len(set(looks)) == len(looks) == (count if count > 1 else 0)


def test_a_changed_point_is_noticed(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    (page,) = write_report([run.root], tmp_path / "page.html")
    picture, expected = find_svg(read_page(page.read_text()), "lr"), journal_points(run, "lr")
    check_points(picture, "lr-line-0-0", expected)
    expected[7, 1] *= 1.001
    with pytest.raises(AssertionError):
        check_points(picture, "lr-line-0-0", expected)


def test_the_words_and_tables_state_what_happened(tmp_path, make_run):
    run = make_run(tmp_path / "<odd> & 'name'", ends=((0, 13, "preempted"), (9, None, ""), (20, 40, "done")))
    facts = read_facts(run, "it")
    assert [attempt.lost for attempt in facts.attempts] == [4, None, 0]
    assert facts.causes == {"preempted": 1, "lost": 1, "done": 1} and facts.interruptions == 2
    assert facts.lost_text == "4 or more" and facts.state == "finished" and facts.images_per_s == 125.0
    (page,) = write_report([run.root], tmp_path / "page.html")
    tree = check_markup(page.read_text())
    text = " ".join(tree.itertext())
    assert "<odd> & 'name'" in text and "<odd>" not in page.read_text()
    for number in ("40 of 40 steps", "3 attempts", "1 preempted and 1 lost", "4 or more steps"):
        assert number in text, number
    cells = [["".join(cell.itertext()) for cell in tr] for tr in tree.iter("tr")]
    assert ["1", "1970-01-01 00:16 UTC", "8:20", "0", "13", "preempted", "4", "2", "n1"] in cells
    assert ["2", "1970-01-01 00:33 UTC", "unknown", "9", "unknown", "lost", "unknown", "2", "n1"] in cells
    assert "lr: 0.1" in text, "the whole recipe is there"


@pytest.mark.parametrize(
    ("method", "uses_labels"),
    [
        ({"name": "cmsf", "rule": "two_queues"}, False),
        ({"name": "cmsf", "rule": "supervised"}, True),
        ({"name": "cmsf", "rule": "semi_supervised"}, True),
        ({"name": "nnclr", "neighbors": {"rule": "nearest"}}, False),
        ({"name": "nnclr", "neighbors": {"rule": "oracle"}}, True),
    ],
)
def test_the_page_says_whether_the_training_used_labels(method, uses_labels):
    text = words.describe_recipe({"method": method})
    assert text.endswith("Training used labels.") is uses_labels and ("no labels" in text) is not uses_labels


def test_a_folder_of_runs_gives_an_index_with_a_page_for_each(tmp_path, make_run):
    sweep = tmp_path / "my sweep"
    runs = [make_run(sweep / "points" / f"lr={lr}", lr=lr) for lr in (0.1, 0.2)]
    make_run(sweep / "points" / "waiting", steps=0, ends=())
    (sweep / "points" / "half").mkdir()
    (sweep / "points" / "half" / "config.yaml").write_text("a: [")  # it is being written
    (sweep / "notes.txt").write_text("no run")
    index, *pages = write_report([sweep], tmp_path / "index.html")
    assert [page.relative_to(tmp_path).as_posix() for page in pages] == ["index/lr=0.1.html", "index/lr=0.2.html"]
    tree = check_markup(index.read_text())
    assert [a.get("href") for a in tree.iter("a")] == ["index/lr%3D0.1.html", "index/lr%3D0.2.html"]
    assert all((tmp_path / a.get("href").replace("%3D", "=")).exists() for a in tree.iter("a"))
    text = " ".join(tree.itertext())
    assert "2 finished and 1 not begun" in text and "my sweep" in text
    cells = [["".join(cell.itertext()) for cell in tr] for tr in tree.iter("tr")]
    assert ["lr=0.2", "0.2"] in [[row[0], row[-1]] for row in cells if len(row) == 2 or row[0] == "lr=0.2"]
    below = check_markup(pages[0].read_text())
    assert next(below.iter("a")).get("href") == "../index.html"
    check_points(find_svg(below, "loss"), "loss-line-0-0", journal_points(runs[0], "loss"))


def test_runs_that_differ_are_compared_key_by_key(tmp_path, make_run):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.2, extra={"on": True})]
    facts = [read_facts(run, name) for run, name in zip(runs, name_runs(runs), strict=True)]
    assert find_differences(facts) == {"optim.lr": ["0.1", "0.2"], "extra.on": ["absent", "True"]}
    assert name_runs([make_run(tmp_path / x / "same") for x in "ab"]) == ["a/same", "b/same"]


def test_what_cannot_be_reported_is_refused(tmp_path, make_run):
    empty = make_run(tmp_path / "new", steps=0, ends=())
    with pytest.raises(EvalError) as caught:
        write_report([empty.root], tmp_path / "page.html")
    assert caught.value.what == f"run folder {empty.root}" and "journal" in caught.value.got
    with pytest.raises(EvalError):
        write_report([tmp_path / "absent"], tmp_path / "page.html")
    with pytest.raises(ConfigError) as suffix:
        write_report([empty.root], tmp_path / "page.pdf")
    assert suffix.value.what == f"--to {tmp_path / 'page.pdf'}" and suffix.value.expected == ".html"
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_the_page_and_replaces_the_former_option(tmp_path, make_run, capsys):
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as done:
        main(["report", str(run.root), "--to", str(tmp_path / "page.html")])
    assert done.value.code == 0 and capsys.readouterr().out.split() == [str(tmp_path / "page.html")]
    check_markup((tmp_path / "page.html").read_text())
    with pytest.raises(SystemExit) as refused:
        main(["results", str(run.root), "--html", str(tmp_path / "other.html")])
    assert refused.value.code == EXIT_USAGE and "hpcssl report RUN --to FILE" in capsys.readouterr().err


def test_a_text_alternative_describes_the_lines(tmp_path, make_run):
    runs = [make_run(tmp_path / f"r{k}", lr=0.1 * (k + 1)) for k in range(10)]
    text = panels.describe_quantity(curves.group_by_seed({run: curves.read_curves(run) for run in runs}), "lr")
    assert "1 r0: 0.098 at epoch 0.1, 0.02 at epoch 4, between 0.02 and 0.098." in text
    assert text.count(": ") == panels.MAX_DESCRIBED and "2 more lines" in text


def test_the_length_of_a_training_that_goes_on_is_exact(tmp_path, make_run):
    """Its epochs are counted by a curve that is not smoothed, whose last point is the last step."""
    run = make_run(tmp_path / "run", steps=299, ends=(), schedule={"epochs": 400})
    assert read_facts(run, "run").total == 400 * PER_EPOCH


def test_an_attempt_that_never_began_lost_nothing(tmp_path, make_run):
    run = make_run(tmp_path / "run", ends=((0, 13, "preempted"),))
    files.append_line(run.attempts, {"attempt": 2, "event": "start", "first_step": 13, "never_began": True})
    files.append_line(run.attempts, {"attempt": 2, "event": "end", "cause": "killed", "last_step": 13})
    files.append_line(run.attempts, {"attempt": 3, "event": "start", "first_step": 9})
    assert [attempt.lost for attempt in read_facts(run, "run").attempts] == [4, 0, 0]


def test_only_scores_of_the_same_kind_are_compared(tmp_path, make_run):
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", 0.1), ("b", 0.2))]
    compared = words.summarize([read_facts(run, run.root.name) for run in runs])[0]
    assert "20-NN accuracy is highest for b (48.0 %) and lowest for a (44.0 %)" in compared
    runs[1].eval_rows("knn").write_text('{"step": 40, "metrics": {"knn200": 99}}\n')
    assert "highest" not in words.summarize([read_facts(run, run.root.name) for run in runs])[0]
