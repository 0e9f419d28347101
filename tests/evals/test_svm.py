"""SVMs: equal to the official steps, on any number of ranks and workers, and after interruptions."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from hpcssl import files, rng
from hpcssl.config import load
from hpcssl.data import shards
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, EvalError, Stopped
from hpcssl.evals.common import parallel_fits
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.metrics import average_precision
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.common.sync import never_stop
from hpcssl.evals.context import EvalContext
from hpcssl.evals.frozen import feature_maps, linear_svc, svm
from hpcssl.evals.frozen.lowshot import LowshotOptions
from hpcssl.evals.frozen.svm import SvmOptions
from hpcssl.evals.run import evaluate
from hpcssl.nets import resnet
from hpcssl.nets.resnet import Arch
from hpcssl.run_dir import RunDir
from hpcssl.signals import STOPPING
from tests.tolerances import rounding
from tests.waiting import wait_for_exit

SINGLE = World.single_process()
SVM = {"costs": [0.1, 10.0, 1.0], "forward_batch": 32}
LOWSHOT = SVM | {"shots": [1, 5], "draws": 3}


@pytest.fixture(scope="module")
def voc(data, tmp_path_factory):
    """The two sets with several classes per image: that of the label, some second ones, and a few difficult ones."""
    return tuple(with_targets(d, tmp_path_factory.mktemp("voc") / "set", seed) for seed, d in enumerate(data))


def with_targets(data, root, seed):
    shutil.copytree(data.root, root)
    draw = np.random.default_rng(seed)
    targets = svm.class_targets(data).copy()
    targets[draw.random(targets.shape) < 0.1] = 1
    targets[draw.random(targets.shape) < 0.1] = 0
    np.save(root / shards.TARGETS, targets)
    index = json.loads((root / shards.INDEX).read_text())
    body = (root / shards.TARGETS).read_bytes()
    (root / shards.INDEX).write_text(json.dumps(index | {"targets_sha256": hashlib.sha256(body).hexdigest()}))
    return shards.ShardSet.open(root)


def measure(name, options, path, data, world=SINGLE, run=None, stop=None, threads=1):
    return evaluate(
        name,
        run=run,
        weights=path,
        train=data[0],
        val=data[1],
        world=world,
        options=options,
        stop=stop,
        threads=threads,
    )


def svm_and_lowshot(world, path, data):
    short = {"costs": [0.1, 10.0], "forward_batch": 32, "feature": "pooled"}
    return (
        measure("svm", short, path, data, world)["metrics"]
        | measure("lowshot", short | {"shots": [1, 5], "draws": 2}, path, data, world)["metrics"]
    )


def literal_features(path, data):
    """Average the 4 × 4 map of the last stage over its four quarters and scale the result to length 1."""
    encoder, maps = FrozenEncoder.open(path, SINGLE), []
    hook = encoder.backbone.layer3.register_forward_hook(lambda *a: maps.append(a[2]))
    extract_features(encoder, data, FeatureOptions(forward_batch=32), SINGLE)
    hook.remove()
    x = torch.cat(maps)
    x = torch.stack([x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2).flatten(1).double()
    return (x / (x.norm(dim=1, keepdim=True) + 1e-5)).numpy()


@pytest.fixture
def extracted(monkeypatch):
    """The rows that an evaluation extracts: of the training set, then of the validation set."""
    rows, normalize_rows = [], linear_svc.normalize_rows
    monkeypatch.setattr(linear_svc, "normalize_rows", lambda x: rows.append(normalize_rows(x)) or rows[-1])
    return rows


def take_features(extracted, data, path):
    """Return the extracted rows, after comparing them with literal ones.

    The fits below get the same bits as the evaluation: its fits stop by comparisons, and scores depend on the order of
    images, so that a difference in a last bit may change either. A literal row has averages of four float32 numbers.
    """
    for rows, d in zip(extracted, data, strict=True):
        np.testing.assert_allclose(rows, literal_features(path, d), rtol=0, atol=rounding(torch.float32, 4))
    return extracted


def fit(x, y, cost, *address):
    state = rng.key(0, "svm", repr(cost), *address) & 0x7FFFFFFF
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=state).fit(x, y)


def test_protocols_have_the_published_values():
    oss, vissl = svm.PROTOCOLS["oss"], svm.PROTOCOLS["vissl"]
    assert len(oss.costs) == 19 and oss.costs[:4] == (1, 10, 100, 0.0625) and oss.costs[-1] == 0.5**19
    assert vissl.costs == (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    assert all(p.feature == "res5" and p.ap == "area" for p in (oss, vissl))
    assert LowshotOptions().shots == [1, 2, 4, 8, 16, 32, 64, 96] and LowshotOptions().draws == 5
    machine = linear_svc.build_svc(2.0, 0).get_params()
    assert (
        machine | {"random_state": 0}
        == LinearSVC(C=2.0, class_weight={1: 2, -1: 1}, tol=1e-4, max_iter=2000, dual=True, random_state=0).get_params()
    )


def test_svm_equals_the_official_steps(voc, weights_file, extracted):
    row = measure("svm", SVM, weights_file, voc)
    x, test_x = take_features(extracted, voc, weights_file)
    aps, costs = [], []
    for c in range(4):
        y = voc[0].targets[:, c].astype(int)
        y[y == 0] = -1  # difficult objects are negatives in training
        scores = []
        for cost in SVM["costs"]:
            folds = StratifiedKFold(3).split(x, y)
            scores.append(
                np.mean(
                    [
                        average_precision_score(y[test], fit(x[train], y[train], cost, c).decision_function(x[test]))
                        for train, test in folds
                    ]
                )
            )
        costs.append(SVM["costs"][int(np.argmax(scores))])
        target = voc[1].targets[:, c]
        decision = fit(x, y, costs[-1], c).decision_function(test_x)[target != 0]  # and not scored
        aps.append(average_precision(target[target != 0] == 1, decision, "area"))
    assert row["metrics"] == {"svm_map": pytest.approx(100 * np.mean(aps))}
    assert list(row["details"]["cost"].values()) == costs and len(set(aps)) == 4
    assert list(row["details"]["ap"].values()) == pytest.approx([100 * ap for ap in aps])


def test_lowshot_equals_the_official_steps(voc, weights_file, extracted):
    metrics = measure("lowshot", LOWSHOT, weights_file, voc)["metrics"]
    x, test_x = take_features(extracted, voc, weights_file)
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
                    rows, y = linear_svc.draw_low_shot(targets, k, 0, draw, c)  # the same, in liblinear's order
                    assert sorted(rows) == sorted(np.where(marks[:, c] != -9)[0]) and (marks[rows, c] == y).all()
                    known = test_targets[:, c] != 0
                    decision = fit(x[rows], y, cost, c, k, draw).decision_function(test_x)
                    aps.append(average_precision(test_targets[known, c] == 1, decision[known], "area"))
                table[draw, i] = np.mean(aps)
        best = table.mean(0).argmax()
        expected |= {f"lowshot_k{k}": 100 * table[:, best].mean(), f"lowshot_k{k}_std": 100 * np.std(table[:, best])}
    assert metrics == pytest.approx(expected)


def test_draws_depend_on_seed_shots_and_draw_only(voc):
    rows = {
        (k, draw, seed): tuple(linear_svc.draw_low_shot(voc[0].targets, k, seed, draw, 0)[0])
        for k in (2, 4)
        for draw in range(3)
        for seed in (0, 1)
    }
    assert len(set(rows.values())) == 12 and not set(rows[2, 0, 0]) <= set(rows[4, 0, 0])
    assert rows[2, 1, 0] == tuple(linear_svc.draw_low_shot(voc[0].targets, 2, 0, 1, 0)[0])


def test_scores_of_1_2_and_4_ranks_are_equal(data, weights_file, run_ranks):
    reference = svm_and_lowshot(SINGLE, weights_file, data)
    assert len(reference) == 5 and all(0 < value < 100 for value in reference.values())
    for size in (2, 4):
        assert run_ranks(size, svm_and_lowshot, weights_file, data) == [reference] * size


def test_worker_processes_give_equal_scores(data, weights_file):
    options = {"costs": [1.0], "forward_batch": 32, "feature": "pooled"}
    assert (
        measure("svm", options, weights_file, data, threads=2)["metrics"]
        == measure("svm", options, weights_file, data)["metrics"]
    )


def test_a_killed_and_a_stopped_evaluation_resume_with_equal_scores(data, weights_file, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_fits, "SAVE_PERIOD_S", 0.0)
    reference = measure("svm", SVM, weights_file, data)
    run, done = RunDir(tmp_path), []
    for kill in (3, 2, 9):  # after three fits of the first table, after two more, and in the second table
        process = multiprocessing.get_context("fork").Process(
            target=killed_after, args=(kill, weights_file, data, run, monkeypatch)
        )
        process.start()
        assert wait_for_exit(process) == -signal.SIGKILL and not run.eval_rows("svm").exists()
        [state] = (run.evals / "unfinished").iterdir()
        tables, _ = parallel_fits.state.read(state, read_identity(state))
        done.append(sum(int(t.isfinite().all(1).sum()) for t in tables.values()))
    assert done == [3, 5, 14]  # no fit is repeated
    checks = iter(range(100))
    with pytest.raises(Stopped):
        measure("svm", SVM, weights_file, data, run=run, stop=lambda: next(checks) >= 0)
    row = measure("svm", SVM, weights_file, data, run=run)
    assert row["metrics"] == reference["metrics"] and row["details"] == reference["details"]
    assert not list((run.evals / "unfinished").iterdir()) and len(files.read_lines(run.eval_rows("svm"))) == 1


def test_a_worker_killed_by_the_stop_signal_counts_as_a_stop(data, weights_file, monkeypatch):
    def lose_worker(calls):
        raise parallel_fits.TerminatedWorkerError

    monkeypatch.setattr(parallel_fits.joblib, "Parallel", lambda *a, **k: contextlib.nullcontext(lose_worker))
    for stop, error in ((lambda: True, Stopped), (lambda: False, EvalError)):
        with pytest.raises(error):
            parallel_fits.ParallelFits("fits", world=SINGLE, stop=stop, state_file=None, identity="").table(
                "t", 4, 1, str, workers=2
            )


def test_workers_ignore_stop_signals():
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGINT)}
    try:
        handlers = parallel_fits._ignore_stop_signals(lambda job: [signal.getsignal(n) for n in before], 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert handlers == [signal.SIG_IGN] * 4


def read_identity(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()["identity"]


def killed_after(writes, path, data, run, monkeypatch):
    original, remaining = parallel_fits.state.write, iter(range(writes - 1, -1, -1))

    def write(*arguments):
        original(*arguments)
        if next(remaining) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(parallel_fits.state, "write", write)
    measure("svm", SVM, path, data, run=run)


@pytest.mark.parametrize(
    "name, side, window, stride, layer",
    [
        ("res5", 7, 6, 1, "layer4"),
        ("res4", 14, 8, 3, "layer3"),
        ("res3", 28, 13, 5, "layer2"),
        ("res2", 56, 16, 8, "layer1"),
    ],
)
def test_stage_features_average_the_published_windows(name, side, window, stride, layer):
    backbone = resnet.build(Arch(arch="resnet18")).eval()
    resnet.initialize(backbone, 0)
    maps, x = [], torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    getattr(backbone, layer).register_forward_hook(lambda *a: maps.append(a[2]))
    features = feature_maps.StageFeatures(backbone, name, 224).eval()
    with torch.no_grad():
        backbone(x)
        row = features(x)[0]
    assert maps[0].shape[2:] == (side, side)
    whole = maps[-1][0]
    grid = (side - window) // stride + 1
    expected = torch.stack(
        [
            whole[:, i * stride : i * stride + window, j * stride : j * stride + window].mean((1, 2))
            for i in range(grid)
            for j in range(grid)
        ],
        1,
    ).flatten()
    tolerance = rounding(torch.float32, window**2, scale=float(expected.abs().max()))
    torch.testing.assert_close(row, expected, rtol=0, atol=tolerance)
    assert features.width == len(expected) == {"res5": 2048, "res4": 2304, "res3": 2048, "res2": 2304}[name]


def test_stage_features_of_other_sizes_and_their_cache_folders(weights_file, data, tmp_path):
    encoder = FrozenEncoder.open(weights_file, SINGLE)
    assert feature_maps.select_feature(encoder, "pooled") is encoder
    assert [feature_maps.select_feature(encoder, name).width for name in ("res5", "res3", "res2")] == [
        128 * 4,
        64 * 16,
        32 * 36,
    ]
    tiny = replace(encoder, meta=encoder.meta | {"size": 4})
    assert feature_maps.select_feature(tiny, "res5").width == 128  # a map of one pixel is not divided
    with pytest.raises(EvalError) as caught:
        feature_maps.select_feature(encoder, "res4")
    assert caught.value.what == "feature=res4" and "3 stages" in caught.value.got
    assert re.findall(r"res\d|pooled", caught.value.expected) == ["res2", "res3", "res5", "pooled"]
    for name in feature_maps.NAMES[3:]:
        extract_features(feature_maps.select_feature(encoder, name), data[1], FeatureOptions(), SINGLE, root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_default_view_squashes_large_images_only(weights_file, data, monkeypatch):
    views = []
    monkeypatch.setattr(svm, "extract_features", lambda e, d, options, *a, **k: views.append(options.view) or 1 / 0)
    encoder = FrozenEncoder.open(weights_file, SINGLE)
    for size, view in ((224, "auto"), (16, "auto"), (224, "eval")):
        context = EvalContext(
            options=SvmOptions(view=view),
            encoder=replace(encoder, meta=encoder.meta | {"size": size}),
            train=data[0],
            val=data[1],
            world=SINGLE,
            stop=never_stop,
            identity="",
        )
        with pytest.raises(ZeroDivisionError):
            svm.extract_svm_features(context, "pooled", "eval_squash")
    assert views == ["eval_squash", "auto", "eval"]


@pytest.mark.parametrize(
    "schema, options, what, got, hint",
    [
        (SvmOptions, {"protocol": "osss"}, "evaluation option protocol", "'osss'", "'oss'"),
        (SvmOptions, {"costs": [0.0]}, "evaluation option costs", "[0.0]", "costs=["),
        (SvmOptions, {"feature": "res6"}, "evaluation option feature", "'res6'", "'res5'"),
        (SvmOptions, {"ap": "coco"}, "evaluation option ap", "'coco'", "area, voc11"),
        (LowshotOptions, {"shots": 5}, "options, key shots", "5", "shots=[5]"),
        (LowshotOptions, {"draws": [5]}, "options, key draws", "[5]", "draws=5"),
        (LowshotOptions, {"shots": [0]}, "evals.lowshot.shots", "[0]", "at least 1"),
        (LowshotOptions, {"draws": 0}, "evals.lowshot.draws", "0", "at least 1"),
    ],
)
def test_invalid_options_are_refused(schema, options, what, got, hint):
    with pytest.raises(ConfigError) as caught:
        load(schema, options, where="options")
    assert caught.value.what == what and caught.value.got == got
    assert hint in caught.value.expected + caught.value.fix


def test_sets_with_too_few_images_or_several_classes_are_refused(voc, data, weights_file):
    with pytest.raises(EvalError) as few:
        measure("lowshot", {}, weights_file, data)
    assert few.value.what == f"shard folder {data[0].root}" and few.value.expected.endswith(" 96")
    assert re.fullmatch(r"\d+ images with class [abcd]", few.value.got)
    with pytest.raises(EvalError) as several:
        measure("knn", {}, weights_file, voc)
    assert several.value.what == f"shard folder {voc[0].root}" and "lowshot" in several.value.fix


def test_a_set_of_one_class_is_refused(write_shards, tmp_path, weights_file):
    images = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    one = write_shards(tmp_path / "one", images, np.zeros(8, int), classes=["a"])
    for name, options, got in (("svm", {}, "0 images without class a"), ("lowshot", {"shots": [1]}, "one class")):
        with pytest.raises(EvalError) as caught:
            measure(name, options, weights_file, (one, one))
        assert caught.value.what == f"shard folder {one.root}" and caught.value.got == got


def test_normalized_rows_equal_the_official_ones():
    x = np.random.default_rng(0).random((5, 7), np.float32)
    expected = [[v / (math.sqrt(sum(w * w for w in row)) + 1e-5) for v in row] for row in x.astype(float).tolist()]
    np.testing.assert_allclose(linear_svc.normalize_rows(x), expected, rtol=0, atol=rounding(torch.float64, 10))
    assert linear_svc.normalize_rows(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
