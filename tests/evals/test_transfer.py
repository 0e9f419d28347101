import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from hpcssl import files
from hpcssl.config import load
from hpcssl.data import shards
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, DataError, EvalError
from hpcssl.evals import linear, logistic, transfer
from hpcssl.evals.features import Encoder, FeatureOptions, extract
from hpcssl.evals.metrics import average_precision
from hpcssl.evals.run import evaluate_run, evaluate_sets, missing, question
from hpcssl.evals.together import Stopped
from hpcssl.evals.transfer import TransferOptions
from hpcssl.files import RunDir
from hpcssl.world import World

ALONE = World.alone()
PENALTIES = np.logspace(-3, 0, 4)


@pytest.fixture(autouse=True)
def few_penalties(monkeypatch):
    monkeypatch.setattr(transfer, "PENALTIES", PENALTIES)
    monkeypatch.setattr(transfer, "CHAIN", 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory, shards_of, pictures_of):
    """dtd and pets, of one class per image, and voc07, of several."""
    root = tmp_path_factory.mktemp("transfer")
    for seed, name in enumerate(("dtd", "pets", "voc07")):
        for part, count in (("train", 60), ("val", 40), ("test", 50)):
            images, labels = pictures_of(count, 10 * seed + count)
            if name == "pets":
                labels[:10] = 0  # classes of other sizes
            data = shards_of(root / name / part, images, labels)
            index = json.loads((data.root / shards.INDEX).read_text()) | {"dataset": name}
            if name == "voc07":
                draw = np.random.default_rng(count)
                others = draw.choice([-1, 0, 1], (count, 4), p=[0.8, 0.1, 0.1])
                targets = np.where(labels[:, None] == np.arange(4), 1, others)
                np.save(data.root / shards.TARGETS, targets.astype(np.int8))
                index["targets_sha256"] = files.digest(data.root / shards.TARGETS)
            (data.root / shards.INDEX).write_text(json.dumps(index))
    return root


def rows_of(world, path, options, run=None, stop=None):
    values, sets = question("transfer", {}, overrides=[f"{k}={v}" for k, v in options.items()])
    return evaluate_sets("transfer", run=run, weights=path, world=world, options=values, sets=sets, stop=stop,
                         threads=1)


def metrics_on(world, *arguments):
    return [row["metrics"] for row in rows_of(world, *arguments)]


def features(path, folder):
    data = ShardSet.open(folder)
    found = extract(Encoder.open(path, ALONE), data, FeatureOptions(batch=32), ALONE)
    return torch.cat(found.parts).double().numpy(), data


def test_the_protocol_is_the_published_one(monkeypatch):
    monkeypatch.undo()
    assert len(transfer.PENALTIES) == 45 and transfer.PENALTIES[[0, -1]] == pytest.approx([1e-6, 1e5])
    assert len(transfer.PENALTIES) % transfer.CHAIN == 0
    assert len(transfer.METRICS) == 12 and len(transfer.TEN) == 10
    assert {n for n, m in transfer.METRICS.items() if m == "per_class"} == {"aircraft", "caltech101", "pets", "flowers"}
    assert [n for n, m in transfer.METRICS.items() if m == "voc11"] == ["voc07"]


@pytest.mark.parametrize("name", ["dtd", "pets", "voc07"])
def test_the_score_is_scikit_learns(name, root, weights_file, monkeypatch):
    """Chosen on the validation part, fitted on both, tested once: with scikit-learn alone, to its own tolerance."""
    monkeypatch.setattr(logistic.fit, "__kwdefaults__", {"tolerance": 1e-7})
    (x, train), (x_val, val), (x_test, test) = (features(weights_file, root / name / p) for p in transfer.PARTS)

    def score(x, data, x_scored, scored, l2):
        if name == "voc07":  # difficult: a negative everywhere
            return np.mean([average_precision(
                scored.targets[:, c] == 1, LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(x, data[:, c] == 1)
                .decision_function(x_scored), "voc11") for c in range(4)])
        guess = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(x, data).predict(x_scored)
        return balanced_accuracy_score(scored.labels, guess) if name == "pets" else (guess == scored.labels).mean()

    truth = [data.targets if name == "voc07" else data.labels for data in (train, val)]
    scores = [score(x, truth[0], x_val, val, l2) for l2 in PENALTIES]
    l2 = PENALTIES[int(np.argmax(scores))]
    expected = score(np.concatenate((x, x_val)), np.concatenate(truth), x_test, test, l2)
    [row] = rows_of(ALONE, weights_file, {"root": root, "sets": name, "batch": 32})
    assert row["metrics"] == {name: pytest.approx(100 * expected)} and len(set(scores)) > 2
    assert row["details"] == {"metric": transfer.METRICS[name], "l2": pytest.approx(l2),
                              "validation": pytest.approx(100 * max(scores))}
    assert row["options"]["sets"] == name and row["options"]["root"] == "" and row["test"] == test.digest


def test_images_are_resized_with_bicubic_to_their_short_side(monkeypatch, root, weights_file):
    seen = []
    monkeypatch.setattr(transfer, "_logistic", lambda context, metric: seen.append(
        context.encoder.view(context.options)) or 1.0)
    rows_of(ALONE, weights_file, {"root": root, "sets": "dtd"})
    [view] = seen
    assert (view.augment.crop, view.augment.zoom, view.augment.interpolation) == ("center", 1.0, "bicubic")


def test_worlds_of_1_2_and_4_give_the_same_numbers(root, weights_file, ranks):
    options = {"root": root, "sets": "voc07", "batch": 32}
    alone = metrics_on(ALONE, weights_file, options)
    assert [list(m) for m in alone] == [["voc07"]]
    for size in (2, 4):
        assert ranks(size, metrics_on, weights_file, options) == [alone] * size


def test_stopped_at_any_moment_the_numbers_are_the_same(root, weights_file, tmp_path, monkeypatch):
    options, run = {"root": root, "sets": "dtd", "batch": 32}, RunDir(tmp_path)
    alone, fits, stops = metrics_on(ALONE, weights_file, options), [], 0
    before = logistic.fit
    monkeypatch.setattr(logistic, "fit", lambda *a, **k: fits.append(a[3]) or before(*a, **k))
    while True:  # after each job
        try:
            found = metrics_on(ALONE, weights_file, options, run, lambda done=len(fits): len(fits) > done)
            break
        except Stopped:
            stops += 1
    assert found == alone and stops == 3 and len(fits) == len(PENALTIES) + 1  # none twice
    assert not list((run.evals / "unfinished").iterdir())


def test_each_set_is_measured_once_and_the_mean_when_all_are_there(root, weights_file, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "METRICS", {"dtd": "top1", "pets": "per_class", "voc07": "voc11"})
    monkeypatch.setattr(transfer, "TEN", ("dtd", "pets"))
    run = RunDir(tmp_path / "run")
    run.weights.mkdir(parents=True)
    shutil.copy(weights_file, run.weights_at(5))
    files.atomic_write(run.config, json.dumps({"evals": {"transfer": {"root": str(root), "batch": 32}}}))
    assert missing("transfer", run) == [run.weights_at(5)]
    first = evaluate_run("transfer", run, ALONE, overrides=["sets=dtd"])
    assert [row["metrics"].keys() for row in first] == [{"dtd"}]
    assert missing("transfer", run, overrides=["sets=dtd"]) == [] and missing("transfer", run) == [run.weights_at(5)]
    rows = evaluate_run("transfer", run, ALONE)
    assert rows[0] == first[0] and rows == files.read_lines(run.eval_rows("transfer"))
    scores = [next(iter(row["metrics"].values())) for row in rows[:3]]
    assert rows[3]["metrics"] == {"transfer_mean3": pytest.approx(np.mean(scores)),
                                  "transfer_mean2": pytest.approx(np.mean(scores[:2]))}
    assert rows[3]["train_name"] == "3 sets" and missing("transfer", run) == []
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert evaluate_run("transfer", run, ALONE, overrides=[f"root={moved}"]) == rows  # the place is no part of it
    ten = evaluate_run("transfer", run, ALONE, overrides=["protocol=logistic", "sets=pets+dtd"])
    assert list(ten[-1]["metrics"]) == ["transfer_mean2"] and len(ten) == 3


def test_msf_trains_its_head_on_train_and_validation(root, weights_file, monkeypatch):
    short = linear.Protocol(**{**vars(linear.PROTOCOLS["msf_center"]), "epochs": 3, "batch": 25, "lr": 0.1})
    monkeypatch.setitem(linear.PROTOCOLS, "msf_center", short)
    [row] = rows_of(ALONE, weights_file, {"root": root, "sets": "pets", "protocol": "msf", "batch": 32})
    (x, train), (x_val, val), (x_test, test) = (features(weights_file, root / "pets" / p) for p in transfer.PARTS)
    whole = F.normalize(torch.tensor(np.concatenate((x, x_val))).float())
    var, mean = torch.var_mean(whole, 0)
    heads, order = [], linear.Order([100], seed=0, global_batch=25, window="all")
    for data in (whole, F.normalize(torch.tensor(x_test).float())):
        heads.append((data - mean) / torch.sqrt(var + 1e-5))
    made = linear.Heads(4, 128, short, (0.1,), 0, ALONE.device, 4)
    labels, scores = torch.tensor(np.concatenate((train.labels, val.labels))), []
    for step in range(12):
        index = torch.tensor(order.batch(step))
        made.learn(heads[0][index], labels[index])
        if step % 4 == 3:
            scores.append(made.score(heads[1], torch.tensor(test.labels))[0]["top1"])
    assert row["metrics"] == {"pets": pytest.approx(max(scores))} and max(scores) > 30


def test_wrong_input_is_one_sentence(root, weights_file, tmp_path):
    for wrong, told in (({"sets": "dtdd"}, "did you mean 'dtd'"), ({"protocol": "mfs"}, "did you mean 'msf'"),
                        ({"sets": "voc07", "protocol": "msf"}, "'voc07'")):
        with pytest.raises(ConfigError, match=told):
            load(TransferOptions, wrong, where="options of transfer")
    (tmp_path / "empty").mkdir()
    shutil.copytree(root / "dtd", tmp_path / "wrong" / "pets")
    shutil.copytree(root / "voc07", tmp_path / "several" / "dtd")
    for part in transfer.PARTS:
        index = tmp_path / "several" / "dtd" / part / shards.INDEX
        index.write_text(index.read_text().replace('"dataset": "voc07"', '"dataset": "dtd"'))
    shutil.copytree(root / "dtd", tmp_path / "half" / "dtd")
    shutil.rmtree(tmp_path / "half" / "dtd" / "test")
    for words, kind, told in (
            ({}, ConfigError, "root=FOLDER"),
            ({"root": tmp_path / "absent"}, DataError, "no such folder"),
            ({"root": tmp_path / "empty"}, DataError, "an empty one; expected folders food101, cifar10"),
            ({"root": root, "sets": "cars"}, DataError, r"no cars \(it holds "),
            ({"root": tmp_path / "wrong"}, DataError, "the data set dtd; expected pets"),
            ({"root": tmp_path / "several"}, DataError, "several classes for each image"),
            ({"root": tmp_path / "half"}, DataError, "dtd/test: got no such folder")):
        with pytest.raises(kind, match=told):
            rows_of(ALONE, weights_file, words)
    with pytest.raises(ConfigError, match="got --train or --val"):
        question("transfer", {}, train=root, overrides=[f"root={root}"])
    other = tmp_path / "classes"
    shutil.copytree(root / "dtd", other / "dtd")
    index = other / "dtd" / "test" / shards.INDEX
    index.write_text(index.read_text().replace('"a", "b"', '"a", "z"'))
    with pytest.raises(EvalError, match="other ones"):
        rows_of(ALONE, weights_file, {"root": other})
