"""The example in docs/tutorials/add_evaluation.md works: its code, registration, recipe and commands."""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from hpcssl import config, files
from hpcssl.config_docs import field_docs
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, EvalError, Stopped
from hpcssl.evals import options as eval_options
from hpcssl.evals import registry
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.run import evaluate, evaluate_run
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "add_evaluation.md"
SINGLE = World.single_process()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.S)


def line_of(start):
    """The line of registration that begins with ``start``."""
    (line,) = re.findall(rf"^    ({start}.*)$", re.sub(r"```.*?```", "", GUIDE.read_text(), flags=re.S), re.M)
    return line


@pytest.fixture
def class_means(tmp_path, monkeypatch):
    """The module of the page, registered by the lines of the page."""
    (source,) = code_blocks("python")
    (tmp_path / "class_means.py").write_text(source)
    spec = importlib.util.spec_from_file_location("class_means", tmp_path / "class_means.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "class_means", module)
    spec.loader.exec_module(module)
    names = {"Evaluation": registry.Evaluation, "class_means": module}
    for name, entry in eval("{" + line_of('"class_means": ') + "}", names).items():
        monkeypatch.setitem(registry.EVALS, name, entry)
    field = line_of("class_means: ")
    scope = {
        "ClassMeansOptions": module.ClassMeansOptions,
        "field": dataclasses.field,
        "Base": eval_options.EvalsOptions,
    }
    exec(f"class EvalsOptions(Base):\n    {field}", scope)
    extended = dataclasses.dataclass(frozen=True, kw_only=True)(scope["EvalsOptions"])
    monkeypatch.setattr(eval_options, "EvalsOptions", extended)
    return module


@pytest.fixture
def run(class_means, data, weights_file, tmp_path):
    """A run folder of the recipe of the page, with weights of step 5."""
    (text,) = code_blocks("yaml")
    (tmp_path / "digits_class_means.yaml").write_text(text)
    train, val = data
    composed = recipe.compose(
        str(tmp_path / "digits_class_means.yaml"), [f"data.train={train.root}", f"data.val={val.root}"]
    )
    section = eval_options.parse_evals_section(composed.evals, composed.name)
    assert (section.class_means.images_per_class, section.class_means.draws) == (5, 20)
    run = RunDir(tmp_path / "run")
    run.weights.mkdir(parents=True)
    shutil.copy(weights_file, run.weights_at(5))
    files.atomic_write(run.config, json.dumps(config.as_dict(composed)))
    return run


def unit_features(path, data):
    features = extract_features(FrozenEncoder.open(path, SINGLE), data, FeatureOptions(), SINGLE)
    rows = torch.cat(features.parts).double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), data.labels


def score(world, path, data, stop=None, run=None, **options):
    return evaluate(
        "class_means",
        run=run,
        weights=path,
        train=data[0],
        val=data[1],
        world=world,
        options=options,
        stop=stop,
        threads=1,
    )


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")  # constant features of the tiny network
def test_the_commands_of_the_page_give_scores_equal_to_scikit_learns(run, class_means, data, weights_file):
    evals = [line.split() for block in code_blocks("console") for line in block.splitlines() if "hpcssl eval " in line]
    assert [words[3] for words in evals] == ["class_means"] * 2
    few, whole = (evaluate_run(words[3], run, SINGLE, overrides=words[6:])[-1] for words in evals)
    (x, y), (test_x, test_y) = (unit_features(weights_file, part) for part in data)
    assert whole["metrics"]["top1"] == pytest.approx(100 * NearestCentroid().fit(x, y).score(test_x, test_y))
    accuracies = []
    for draw in range(20):
        index = np.concatenate([class_means.choose(torch.as_tensor(y), c, 5, 0, draw).numpy() for c in range(4)])
        assert np.bincount(y[index]).tolist() == [5] * 4 and len(set(index)) == 20
        accuracies.append(100 * NearestCentroid().fit(x[index], y[index]).score(test_x, test_y))
    assert few["details"]["top1"] == pytest.approx(accuracies) and len(set(accuracies)) > 5
    assert few["metrics"]["top1"] == pytest.approx(np.mean(accuracies))
    assert files.read_lines(run.eval_rows("class_means")) == [few, whole]
    assert evaluate_run("class_means", run, SINGLE) == [few]  # the stored row


def test_separated_features_score_100_and_equal_ones_score_chance(class_means):
    y = torch.arange(40) % 4
    corners, equal = torch.eye(4, dtype=torch.float64)[y], torch.ones(40, 4, dtype=torch.float64)
    for per_class in (0, 3):
        assert class_means.score_draw(corners, y, corners, y, 4, per_class, 0, 0) == [1.0]
        assert class_means.score_draw(equal, y, equal, y, 4, per_class, 0, 0) == [0.25]  # always class 0


def top1(world, *arguments):
    row = score(world, *arguments, images_per_class=3, draws=7)
    return row["metrics"], row["details"]


def test_scores_of_1_2_and_4_ranks_are_equal(class_means, data, weights_file, run_ranks):
    reference = top1(SINGLE, weights_file, data)
    for size in (2, 4):
        assert run_ranks(size, top1, weights_file, data) == [reference] * size


def test_a_stopped_evaluation_resumes_with_equal_scores(class_means, data, weights_file, tmp_path, monkeypatch):
    reference, run, draws, stops = top1(SINGLE, weights_file, data), RunDir(tmp_path / "run"), [], 0
    score_draw = class_means.score_draw
    monkeypatch.setattr(class_means, "score_draw", lambda *a: draws.append(a[-1]) or score_draw(*a))
    while True:  # stopped after each draw
        try:
            result = top1(SINGLE, weights_file, data, lambda done=len(draws): len(draws) > done, run)
            break
        except Stopped:
            stops += 1
    assert result == reference and stops == 7 and draws == list(range(7))
    assert not list((run.evals / "unfinished").iterdir())


@pytest.mark.parametrize(
    "options, what, hint",
    [
        ({"images_per_class": -1}, "evals.class_means.images_per_class", "images_per_class=0"),
        ({"draws": 0}, "evals.class_means.draws", "draws=1"),
        ({"image_per_class": 1}, "options of class_means, key image_per_class", "'images_per_class'"),
    ],
)
def test_invalid_options_are_refused(class_means, data, weights_file, options, what, hint):
    with pytest.raises(ConfigError) as caught:
        score(SINGLE, weights_file, data, **options)
    assert caught.value.what == what and hint in caught.value.fix


def test_too_few_images_of_a_class_are_refused(class_means, data, weights_file):
    with pytest.raises(EvalError) as caught:
        score(SINGLE, weights_file, data, images_per_class=80)
    fewest = int(np.bincount(data[0].labels).min())
    assert caught.value.what == f"shard folder {data[0].root}"
    assert caught.value.got.startswith(f"{fewest} ") and "80" in caught.value.expected


def test_every_option_of_the_page_has_a_meaning(class_means):
    assert {"images_per_class", "draws", "seed", "forward_batch"} <= field_docs(class_means.ClassMeansOptions).keys()


def test_the_page_names_every_evaluation():
    table = GUIDE.read_text().partition("## Evaluations to start from")[2]
    missing = [name for name in registry.EVALS if f"`{name}`" not in table]
    assert not missing, f"{GUIDE} does not show {missing}"
