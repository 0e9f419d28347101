"""Transfer to other data sets: scores compared with scikit-learn, means over sets, and resuming."""

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
from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, DataError, EvalError, Stopped
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.metrics import average_precision
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.frozen import logistic, transfer, transfer_sets
from hpcssl.evals.frozen.transfer import TransferOptions
from hpcssl.evals.linear.heads import LinearHeads
from hpcssl.evals.linear.protocols import PROTOCOLS, LinearProtocol
from hpcssl.evals.resolve import resolve_evaluation
from hpcssl.evals.run import evaluate_run, evaluate_sets, missing_weights
from hpcssl.run_dir import RunDir

SINGLE = World.single_process()
PENALTIES = np.logspace(-3, 0, 4)


@pytest.fixture(autouse=True)
def few_penalties(monkeypatch):
    monkeypatch.setattr(transfer, "PENALTIES", PENALTIES)
    monkeypatch.setattr(transfer, "CHAIN_LENGTH", 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory, write_shards, striped_images):
    """A folder of three data sets: dtd and pets with one class per image, voc07 with several."""
    root = tmp_path_factory.mktemp("transfer")
    for seed, name in enumerate(("dtd", "pets", "voc07")):
        for part, count in (("train", 60), ("val", 40), ("test", 50)):
            images, labels = striped_images(count, 10 * seed + count)
            if name == "pets":
                labels[:10] = 0  # classes of unequal sizes
            data = write_shards(root / name / part, images, labels)
            index = json.loads((data.root / shards.INDEX).read_text()) | {"dataset": name}
            if name == "voc07":
                draw = np.random.default_rng(count)
                others = draw.choice([-1, 0, 1], (count, 4), p=[0.8, 0.1, 0.1])
                targets = np.where(labels[:, None] == np.arange(4), 1, others)
                np.save(data.root / shards.TARGETS, targets.astype(np.int8))
                index["targets_sha256"] = files.sha256_of_file(data.root / shards.TARGETS)
            (data.root / shards.INDEX).write_text(json.dumps(index))
    return root


def rows_of(world, path, options, run=None, stop=None):
    values, sets = resolve_evaluation("transfer", {}, overrides=[f"{k}={v}" for k, v in options.items()])
    return evaluate_sets(
        "transfer", run=run, weights=path, world=world, options=values, sets=sets, stop=stop, threads=1
    )


def metrics_on(world, *arguments):
    return [row["metrics"] for row in rows_of(world, *arguments)]


def extract(path, folder):
    data = ShardSet.open(folder)
    features = extract_features(FrozenEncoder.open(path, SINGLE), data, FeatureOptions(forward_batch=32), SINGLE)
    return torch.cat(features.parts).double().numpy(), data


def test_penalties_sets_and_metrics_are_the_published_ones(monkeypatch):
    monkeypatch.undo()
    assert len(transfer.PENALTIES) == 45 and transfer.PENALTIES[[0, -1]] == pytest.approx([1e-6, 1e5])
    assert len(transfer.PENALTIES) % transfer.CHAIN_LENGTH == 0
    assert len(transfer.METRICS) == 12 and len(transfer.MSF_SETS) == 10
    assert {n for n, m in transfer.METRICS.items() if m == "per_class"} == {"aircraft", "caltech101", "pets", "flowers"}
    assert [n for n, m in transfer.METRICS.items() if m == "voc11"] == ["voc07"]


@pytest.mark.parametrize("name", ["dtd", "pets", "voc07"])
def test_the_score_equals_one_computed_with_scikit_learn(name, root, weights_file, monkeypatch):
    """The penalty is chosen on the validation part, the classifier fitted on both parts and tested once."""
    monkeypatch.setattr(logistic.fit, "__kwdefaults__", {"tolerance": 1e-7})
    (x, train), (x_val, val), (x_test, test) = (extract(weights_file, root / name / p) for p in transfer_sets.PARTS)

    def score(x, data, x_scored, scored, l2):
        if name == "voc07":  # difficult objects are negatives
            return np.mean(
                [
                    average_precision(
                        scored.targets[:, c] == 1,
                        LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000)
                        .fit(x, data[:, c] == 1)
                        .decision_function(x_scored),
                        "voc11",
                    )
                    for c in range(4)
                ]
            )
        guess = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(x, data).predict(x_scored)
        return balanced_accuracy_score(scored.labels, guess) if name == "pets" else (guess == scored.labels).mean()

    truth = [data.targets if name == "voc07" else data.labels for data in (train, val)]
    scores = [score(x, truth[0], x_val, val, l2) for l2 in PENALTIES]
    l2 = PENALTIES[int(np.argmax(scores))]
    expected = score(np.concatenate((x, x_val)), np.concatenate(truth), x_test, test, l2)
    [row] = rows_of(SINGLE, weights_file, {"root": root, "sets": name, "forward_batch": 32})
    assert row["metrics"] == {name: pytest.approx(100 * expected)} and len(set(scores)) > 2
    assert row["details"] == {
        "metric": transfer.METRICS[name],
        "l2": pytest.approx(l2),
        "validation": pytest.approx(100 * max(scores)),
    }
    assert row["options"]["sets"] == name and row["options"]["root"] == "" and row["test"] == test.digest


def test_images_are_resized_with_bicubic_to_their_short_side(monkeypatch, root, weights_file):
    views = []
    monkeypatch.setattr(
        transfer, "_score_logistic", lambda context, metric: views.append(context.encoder.view(context.options)) or 1.0
    )
    rows_of(SINGLE, weights_file, {"root": root, "sets": "dtd"})
    [view] = views
    assert (view.augment.crop, view.augment.zoom, view.augment.interpolation) == ("center", 1.0, "bicubic")


def test_scores_of_1_2_and_4_ranks_are_equal(root, weights_file, run_ranks):
    options = {"root": root, "sets": "voc07", "forward_batch": 32}
    reference = metrics_on(SINGLE, weights_file, options)
    assert [list(m) for m in reference] == [["voc07"]]
    for size in (2, 4):
        assert run_ranks(size, metrics_on, weights_file, options) == [reference] * size


def test_an_evaluation_that_is_stopped_after_each_fit_resumes_with_equal_scores(
    root, weights_file, tmp_path, monkeypatch
):
    options, run = {"root": root, "sets": "dtd", "forward_batch": 32}, RunDir(tmp_path)
    reference, fits, stops = metrics_on(SINGLE, weights_file, options), [], 0
    fit = logistic.fit
    monkeypatch.setattr(logistic, "fit", lambda *a, **k: fits.append(a[3]) or fit(*a, **k))
    while True:  # stopped after each round of fits
        try:
            scores = metrics_on(SINGLE, weights_file, options, run, lambda done=len(fits): len(fits) > done)
            break
        except Stopped:
            stops += 1
    assert scores == reference and stops == 3 and len(fits) == len(PENALTIES) + 1  # no fit is repeated
    assert not list((run.evals / "unfinished").iterdir())


def test_each_set_is_scored_once_and_the_mean_once_all_sets_are_scored(root, weights_file, tmp_path, monkeypatch):
    for module in (transfer, transfer_sets):
        monkeypatch.setattr(module, "METRICS", {"dtd": "top1", "pets": "per_class", "voc07": "voc11"})
    monkeypatch.setattr(transfer, "MSF_SETS", ("dtd", "pets"))
    run = RunDir(tmp_path / "run")
    run.weights.mkdir(parents=True)
    shutil.copy(weights_file, run.weights_at(5))
    files.atomic_write(run.config, json.dumps({"evals": {"transfer": {"root": str(root), "forward_batch": 32}}}))
    assert missing_weights("transfer", run) == [run.weights_at(5)]
    first = evaluate_run("transfer", run, SINGLE, overrides=["sets=dtd"])
    assert [row["metrics"].keys() for row in first] == [{"dtd"}]
    assert missing_weights("transfer", run, overrides=["sets=dtd"]) == [] and missing_weights("transfer", run) == [
        run.weights_at(5)
    ]
    rows = evaluate_run("transfer", run, SINGLE)
    assert rows[0] == first[0] and rows == files.read_lines(run.eval_rows("transfer"))
    scores = [next(iter(row["metrics"].values())) for row in rows[:3]]
    assert rows[3]["metrics"] == {
        "transfer_mean3": pytest.approx(np.mean(scores)),
        "transfer_mean2": pytest.approx(np.mean(scores[:2])),
    }
    assert rows[3]["train_name"] == "3 sets" and missing_weights("transfer", run) == []
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    assert (
        evaluate_run("transfer", run, SINGLE, overrides=[f"root={moved}"]) == rows
    )  # the folder is not part of the identity
    ten = evaluate_run("transfer", run, SINGLE, overrides=["protocol=logistic", "sets=pets+dtd"])
    assert list(ten[-1]["metrics"]) == ["transfer_mean2"] and len(ten) == 3


def test_msf_trains_its_head_on_train_and_validation(root, weights_file, monkeypatch):
    short = LinearProtocol(**{**vars(PROTOCOLS["msf_center"]), "epochs": 3, "batch": 25, "lr": 0.1})
    monkeypatch.setitem(PROTOCOLS, "msf_center", short)
    [row] = rows_of(SINGLE, weights_file, {"root": root, "sets": "pets", "protocol": "msf", "forward_batch": 32})
    (x, train), (x_val, val), (x_test, test) = (extract(weights_file, root / "pets" / p) for p in transfer_sets.PARTS)
    whole = F.normalize(torch.tensor(np.concatenate((x, x_val))).float())
    var, mean = torch.var_mean(whole, 0)
    heads, order = [], Order([100], seed=0, global_batch=25, window="all")
    for data in (whole, F.normalize(torch.tensor(x_test).float())):
        heads.append((data - mean) / torch.sqrt(var + 1e-5))
    linear = LinearHeads(4, 128, short, (0.1,), 0, SINGLE.device, 4)
    labels, scores = torch.tensor(np.concatenate((train.labels, val.labels))), []
    for step in range(12):
        index = torch.tensor(order.batch(step))
        linear.train_step(heads[0][index], labels[index])
        if step % 4 == 3:
            scores.append(linear.score(heads[1], torch.tensor(test.labels))[0]["top1"])
    assert row["metrics"] == {"pets": pytest.approx(max(scores))} and max(scores) > 30


@pytest.mark.parametrize(
    "options, what, hint",
    [
        ({"sets": "dtdd"}, "evals.transfer.sets", "'dtd'"),
        ({"protocol": "mfs"}, "evals.transfer.protocol", "'msf'"),
        ({"sets": "voc07", "protocol": "msf"}, "evals.transfer.sets", "'voc07'"),
    ],
)
def test_invalid_options_are_refused(options, what, hint):
    with pytest.raises(ConfigError) as caught:
        load(TransferOptions, options, where="options of transfer")
    assert caught.value.what == what and hint in caught.value.got + caught.value.fix


def test_unusable_folders_are_refused(root, weights_file, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(root / "dtd", tmp_path / "renamed" / "pets")
    shutil.copytree(root / "voc07", tmp_path / "several" / "dtd")
    for part in transfer_sets.PARTS:
        index = tmp_path / "several" / "dtd" / part / shards.INDEX
        index.write_text(index.read_text().replace('"dataset": "voc07"', '"dataset": "dtd"'))
    shutil.copytree(root / "dtd", tmp_path / "half" / "dtd")
    shutil.rmtree(tmp_path / "half" / "dtd" / "test")
    for options, kind, what, detail in (
        ({}, ConfigError, "evals.transfer.root", "root="),
        ({"root": tmp_path / "absent"}, DataError, f"folder {tmp_path / 'absent'}", "no such folder"),
        ({"root": tmp_path / "empty"}, DataError, f"folder {tmp_path / 'empty'}", "food101, cifar10"),
        ({"root": root, "sets": "cars"}, DataError, f"folder {root}", "no cars (it holds voc07, dtd, pets)"),
        ({"root": tmp_path / "renamed"}, DataError, f"{tmp_path / 'renamed' / 'pets'}", "dtd"),
        ({"root": tmp_path / "several"}, DataError, f"{tmp_path / 'several' / 'dtd'}", "several classes"),
        ({"root": tmp_path / "half"}, DataError, f"{tmp_path / 'half' / 'dtd' / 'test'}", "no such folder"),
    ):
        with pytest.raises(kind) as caught:
            rows_of(SINGLE, weights_file, options)
        error = caught.value
        assert what in error.what and detail in f"{error.got} {error.expected} {error.fix}"


def test_shards_named_by_option_are_refused(root):
    with pytest.raises(ConfigError) as caught:
        resolve_evaluation("transfer", {}, train=root, overrides=[f"root={root}"])
    assert caught.value.what == "evaluation transfer" and "--train" in caught.value.got


def test_parts_with_different_classes_are_refused(root, weights_file, tmp_path):
    shutil.copytree(root / "dtd", tmp_path / "dtd")
    test = tmp_path / "dtd" / "test"
    index = test / shards.INDEX
    index.write_text(index.read_text().replace('"a", "b"', '"a", "z"'))
    with pytest.raises(EvalError) as caught:
        rows_of(SINGLE, weights_file, {"root": tmp_path})
    assert caught.value.what == f"classes of {test}" and "'z'" in caught.value.got
