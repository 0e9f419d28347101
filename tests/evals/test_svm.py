import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from hpcssl import files, rng
from hpcssl.config import load
from hpcssl.data import shards
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals import jobs, linear_svc, maps, svm
from hpcssl.evals.features import Encoder, FeatureOptions, extract
from hpcssl.evals.lowshot import LowshotOptions
from hpcssl.evals.metrics import average_precision
from hpcssl.evals.run import evaluate
from hpcssl.evals.svm import SvmOptions
from hpcssl.evals.together import Stopped
from hpcssl.files import RunDir
from hpcssl.nets import resnet
from hpcssl.nets.resnet import Arch
from hpcssl.signals import STOPPING
from hpcssl.world import World

ALONE = World.alone()
SVM = {"costs": [0.1, 10.0, 1.0], "batch": 32}
LOWSHOT = SVM | {"k": [1, 5], "draws": 3}


@pytest.fixture(scope="module")
def voc(data, tmp_path_factory):
    """The two sets with several classes at once: the label's, some second class, and a few difficult ones."""
    return tuple(with_targets(d, tmp_path_factory.mktemp("voc") / "set", seed) for seed, d in enumerate(data))


def with_targets(data, root, seed):
    shutil.copytree(data.root, root)
    draw = np.random.default_rng(seed)
    targets = svm.targets_of(data).copy()
    targets[draw.random(targets.shape) < 0.1] = 1
    targets[draw.random(targets.shape) < 0.1] = 0
    np.save(root / shards.TARGETS, targets)
    index = json.loads((root / shards.INDEX).read_text())
    body = (root / shards.TARGETS).read_bytes()
    (root / shards.INDEX).write_text(json.dumps(index | {"targets_sha256": hashlib.sha256(body).hexdigest()}))
    return shards.ShardSet.open(root)


def measure(name, options, path, data, world=ALONE, run=None, stop=None, threads=1):
    return evaluate(name, run=run, weights=path, train=data[0], val=data[1], world=world, options=options, stop=stop,
                    threads=threads)


def both_on(world, path, data):
    short = {"costs": [0.1, 10.0], "batch": 32, "feature": "pooled"}
    return measure("svm", short, path, data, world)["metrics"] | measure(
        "lowshot", short | {"k": [1, 5], "draws": 2}, path, data, world)["metrics"]


def literal_features(path, data):
    """The network's own last stage, averaged over the four quarters of its 4 × 4 map, and of length 1."""
    encoder, maps_ = Encoder.open(path, ALONE), []
    hook = encoder.backbone.layer3.register_forward_hook(lambda *a: maps_.append(a[2]))
    extract(encoder, data, FeatureOptions(batch=32), ALONE)
    hook.remove()
    x = torch.cat(maps_)
    x = torch.stack([x[:, :, i:i + 2, j:j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2).flatten(1).double()
    return (x / (x.norm(dim=1, keepdim=True) + 1e-5)).numpy()


def fitted(x, y, cost, *address):
    state = rng.key(0, "svm", repr(cost), *address) & 0x7FFFFFFF
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=state).fit(x, y)


def test_the_protocols_are_the_published_ones():
    oss, vissl = svm.PROTOCOLS["oss"], svm.PROTOCOLS["vissl"]
    assert len(oss.costs) == 19 and oss.costs[:4] == (1, 10, 100, 0.0625) and oss.costs[-1] == 0.5**19
    assert vissl.costs == (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    assert all(p.feature == "res5" and p.ap == "area" for p in (oss, vissl))
    assert LowshotOptions().k == [1, 2, 4, 8, 16, 32, 64, 96] and LowshotOptions().draws == 5
    machine = linear_svc.machine(2.0, 0).get_params()
    assert machine | {"random_state": 0} == LinearSVC(
        C=2.0, class_weight={1: 2, -1: 1}, tol=1e-4, max_iter=2000, dual=True, random_state=0).get_params()


def test_svm_agrees_with_the_official_steps(voc, weights_file):
    x, test_x = (literal_features(weights_file, d) for d in voc)
    aps, costs = [], []
    for c in range(4):
        y = voc[0].targets[:, c].astype(int)
        y[y == 0] = -1  # difficult: a negative while training
        scores = []
        for cost in SVM["costs"]:
            folds = StratifiedKFold(3).split(x, y)
            scores.append(np.mean([average_precision_score(y[test], fitted(x[train], y[train], cost, c)
                                                           .decision_function(x[test])) for train, test in folds]))
        costs.append(SVM["costs"][int(np.argmax(scores))])
        target = voc[1].targets[:, c]
        decision = fitted(x, y, costs[-1], c).decision_function(test_x)[target != 0]  # and left out of the test
        aps.append(average_precision(target[target != 0] == 1, decision, "area"))
    row = measure("svm", SVM, weights_file, voc)
    assert row["metrics"] == {"svm_map": pytest.approx(100 * np.mean(aps), abs=1e-6)}
    assert list(row["details"]["cost"].values()) == costs and len(set(aps)) == 4
    assert list(row["details"]["ap"].values()) == pytest.approx([100 * ap for ap in aps], abs=1e-6)


def test_lowshot_agrees_with_a_literal_loop(voc, weights_file):
    x, test_x = (literal_features(weights_file, d) for d in voc)
    targets, test_targets = voc[0].targets, voc[1].targets
    expected = {}
    for k in (1, 5):
        table = np.zeros((3, 3))
        for draw in range(3):
            marks = np.full(targets.shape, -9)  # create_voc_low_shot_challenge_samples.py, with our random numbers
            for symbol, number in ((1, k), (-1, 3 * k)):
                for c in range(4):
                    there = np.where(targets[:, c] == symbol)[0]
                    order = rng.permutation(rng.key(0, "lowshot", draw, k, c, symbol), len(there))
                    marks[there[order[:number]], c] = symbol
            for i, cost in enumerate(SVM["costs"]):
                aps = []
                for c in range(4):
                    rows, positives = np.where(marks[:, c] != -9)[0], np.where(marks[:, c] == 1)[0]
                    assert (len(rows), len(positives)) == (4 * k, k)
                    rows, y = linear_svc.sample(targets, k, 0, draw, c)  # the same, in liblinear's order
                    assert sorted(rows) == sorted(np.where(marks[:, c] != -9)[0]) and (marks[rows, c] == y).all()
                    known = test_targets[:, c] != 0
                    decision = fitted(x[rows], y, cost, c, k, draw).decision_function(test_x)
                    aps.append(average_precision(test_targets[known, c] == 1, decision[known], "area"))
                table[draw, i] = np.mean(aps)
        best = table.mean(0).argmax()
        expected |= {f"lowshot_k{k}": 100 * table[:, best].mean(), f"lowshot_k{k}_std": 100 * np.std(table[:, best])}
    assert measure("lowshot", LOWSHOT, weights_file, voc)["metrics"] == pytest.approx(expected, abs=1e-6)


def test_draws_are_independent_and_addressed(voc):
    rows = {(k, draw, seed): tuple(linear_svc.sample(voc[0].targets, k, seed, draw, 0)[0])
            for k in (2, 4) for draw in range(3) for seed in (0, 1)}
    assert len(set(rows.values())) == 12 and not set(rows[2, 0, 0]) <= set(rows[4, 0, 0])
    assert rows[2, 1, 0] == tuple(linear_svc.sample(voc[0].targets, 2, 0, 1, 0)[0])


def test_worlds_of_1_2_and_4_give_the_same_numbers(data, weights_file, ranks):
    alone = both_on(ALONE, weights_file, data)
    assert len(alone) == 5 and all(0 < value < 100 for value in alone.values())
    for size in (2, 4):
        assert ranks(size, both_on, weights_file, data) == [alone] * size


def test_worker_processes_give_the_same_numbers(data, weights_file):
    options = {"costs": [1.0], "batch": 32, "feature": "pooled"}
    assert measure("svm", options, weights_file, data, threads=2)["metrics"] == \
        measure("svm", options, weights_file, data)["metrics"]


def test_stopped_and_killed_the_numbers_are_the_same(data, weights_file, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "EVERY_S", 0.0)
    alone = measure("svm", SVM, weights_file, data)
    run, done = RunDir(tmp_path), []
    for kill in (3, 2, 9):  # after three jobs of the first table, two more, and in the second table
        victim = multiprocessing.get_context("fork").Process(
            target=killed_after, args=(kill, weights_file, data, run, monkeypatch))
        victim.start()
        victim.join(60)
        assert victim.exitcode == -signal.SIGKILL and not run.eval_rows("svm").exists()
        [state] = (run.evals / "unfinished").iterdir()
        tables, _ = jobs.state.read(state, files_identity(state))
        done.append(sum(int(t.isfinite().all(1).sum()) for t in tables.values()))
    assert done == [3, 5, 14]  # nothing twice
    looks = iter(range(100))
    with pytest.raises(Stopped):
        measure("svm", SVM, weights_file, data, run=run, stop=lambda: next(looks) >= 0)
    row = measure("svm", SVM, weights_file, data, run=run)
    assert row["metrics"] == alone["metrics"] and row["details"] == alone["details"]
    assert not list((run.evals / "unfinished").iterdir()) and len(files.read_lines(run.eval_rows("svm"))) == 1


def test_a_worker_that_dies_of_the_stop_is_a_stop(data, weights_file, monkeypatch):
    def dies(calls):
        raise jobs.TerminatedWorkerError

    monkeypatch.setattr(jobs.joblib, "Parallel", lambda *a, **k: contextlib.nullcontext(dies))
    for stop, error in ((lambda: True, Stopped), (lambda: False, EvalError)):
        context = SimpleNamespace(world=ALONE, state=None, identity="", stop=stop)
        with pytest.raises(error):
            jobs.Jobs(context, "fits").table("t", 4, 1, str, workers=2)


def test_a_worker_does_not_hear_the_stopping_signals():
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGINT)}
    try:
        heard = jobs._deaf(lambda job: [signal.getsignal(n) for n in before], 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == [signal.SIG_IGN] * 4


def files_identity(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()["identity"]


def killed_after(writes, path, data, run, monkeypatch):
    before, left = jobs.state.write, iter(range(writes - 1, -1, -1))

    def write(*arguments):
        before(*arguments)
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(jobs.state, "write", write)
    measure("svm", SVM, path, data, run=run)


@pytest.mark.parametrize("name, side, window, stride, layer", [
    ("res5", 7, 6, 1, "layer4"), ("res4", 14, 8, 3, "layer3"), ("res3", 28, 13, 5, "layer2"),
    ("res2", 56, 16, 8, "layer1")])
def test_maps_are_the_published_windows(name, side, window, stride, layer):
    backbone = resnet.build(Arch(arch="resnet18")).eval()
    resnet.initialise(backbone, 0)
    taken, x = [], torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    getattr(backbone, layer).register_forward_hook(lambda *a: taken.append(a[2]))
    made = maps.Maps(backbone, name, 224).eval()
    with torch.no_grad():
        backbone(x)
        found = made(x)
    assert taken[0].shape[2:] == (side, side)
    whole = taken[-1][0]
    grid = (side - window) // stride + 1
    expected = torch.stack([whole[:, i * stride:i * stride + window, j * stride:j * stride + window].mean((1, 2))
                            for i in range(grid) for j in range(grid)], 1).flatten()
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert made.width == len(expected) == {"res5": 2048, "res4": 2304, "res3": 2048, "res2": 2304}[name]


def test_maps_of_other_sizes_and_their_place_in_the_cache(weights_file, data, tmp_path):
    encoder = Encoder.open(weights_file, ALONE)
    assert maps.of(encoder, "pooled") is encoder
    assert [maps.of(encoder, name).width for name in ("res5", "res3", "res2")] == [128 * 4, 64 * 16, 32 * 36]
    tiny = replace(encoder, meta=encoder.meta | {"size": 4})
    assert maps.of(tiny, "res5").width == 128  # a map of one pixel stays one
    with pytest.raises(EvalError, match="a network of 3 stages; expected res2 or res3, res5 or pooled"):
        maps.of(encoder, "res4")
    for name in maps.NAMES[3:]:
        extract(maps.of(encoder, name), data[1], FeatureOptions(), ALONE, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_large_images_are_squashed_and_small_ones_whole(weights_file, data, monkeypatch):
    seen = []
    monkeypatch.setattr(svm, "extract", lambda e, d, options, *a, **k: seen.append(options.view) or 1 / 0)
    encoder = Encoder.open(weights_file, ALONE)
    for size, view in ((224, "auto"), (16, "auto"), (224, "eval")):
        context = type("C", (), {"options": SvmOptions(view=view), "train": data[0], "val": data[1], "cache": None,
                                 "encoder": replace(encoder, meta=encoder.meta | {"size": size}), "world": ALONE,
                                 "threads": 1, "stop": None})
        with pytest.raises(ZeroDivisionError):
            svm.features(context, "pooled", "eval_squash")
    assert seen == ["eval_squash", "auto", "eval"]


def test_wrong_input_is_one_sentence(voc, data, weights_file):
    for options, wrong, told in ((SvmOptions, {"protocol": "osss"}, "did you mean 'oss'"),
                                 (SvmOptions, {"costs": [0.0]}, "costs above 0"),
                                 (SvmOptions, {"feature": "res6"}, "did you mean 'res5'"),
                                 (SvmOptions, {"ap": "coco"}, "area or voc11"),
                                 (LowshotOptions, {"k": 5}, r"got 5; expected a list; to mend: k=\[5\]"),
                                 (LowshotOptions, {"draws": [5]}, r"got \[5\]; expected one value.*draws=5"),
                                 (LowshotOptions, {"k": [0]}, r"evals\.lowshot\.k"),
                                 (LowshotOptions, {"draws": 0}, r"evals\.lowshot\.draws")):
        with pytest.raises(ConfigError, match=told):
            load(options, wrong, where="options")
    with pytest.raises(EvalError, match=r"images with class \w; expected at least 96"):
        measure("lowshot", {}, weights_file, data)
    with pytest.raises(EvalError, match="several classes at once; expected one class for each image"):
        measure("knn", {}, weights_file, voc)


def test_unit_features_are_the_official_ones():
    x = np.random.default_rng(0).random((5, 7), np.float32)
    expected = F.normalize(torch.tensor(x).double(), dim=1).numpy()
    np.testing.assert_allclose(linear_svc.unit(x), expected, rtol=2e-5)
    assert linear_svc.unit(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
