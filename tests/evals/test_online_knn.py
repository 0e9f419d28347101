"""k-NN inside a training run: the rows of the evaluation, its checks before training, and stops."""

from types import SimpleNamespace

import pytest

from hpcssl import files
from hpcssl.distributed.liveness.heartbeat import Heartbeat
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.evals.common.sync import never_stop
from hpcssl.evals.online_knn import build_online_knn
from hpcssl.evals.run import evaluate
from hpcssl.run_dir import RunDir


def build_recipe(train, val, **evals):
    data = SimpleNamespace(
        train=str(train),
        val=str(val),
        stage_dir="",
        stage_limit_gb=0.0,
        stall_timeout_seconds=60.0,
        download_attempts=5,
    )
    return SimpleNamespace(name="example", evals=evals, data=data, machine=SimpleNamespace(loader_threads=2))


def test_scores_during_training_are_the_rows_of_hpcssl_eval(data, weights_file, tmp_path):
    run, world = RunDir(tmp_path), World.single_process()
    train, val = data
    online_knn = build_online_knn(
        build_recipe(train.root, val.root, knn_every_epochs=2, knn={"k": [1, 5]}), run, world, never_stop
    )
    assert online_knn.every_epochs == 2
    scores = online_knn(weights_file, 5)
    row = evaluate("knn", run=None, weights=weights_file, train=train, val=val, world=world, options={"k": [1, 5]})
    assert scores == row["metrics"] and files.read_lines(run.eval_rows("knn"))[0]["metrics"] == scores
    assert online_knn(weights_file, 5) == scores and not run.features.exists()


def test_copying_shards_for_an_evaluation_is_not_reported_as_a_hang(data, weights_file, tmp_path):
    world, (train, val) = World.single_process(), data
    heartbeat = world.heartbeat = Heartbeat(None, limits=PhaseLimits(600), leave=lambda *_: None)
    patient, to_local = [], val.to_local
    val.to_local = lambda: (patient.append(heartbeat.activity.patient), to_local())[1]
    try:
        evaluate("knn", run=None, weights=weights_file, train=train, val=val, world=world, options={"k": [1]})
    finally:
        val.to_local = to_local
    assert patient == [True] and not heartbeat.activity.patient


def test_without_a_period_there_is_no_evaluation_and_invalid_options_are_refused_before_training(data):
    train, val = data
    world, run = World.single_process(), RunDir("unused")
    assert build_online_knn(build_recipe(train.root, ""), run, world, never_stop) is None
    for recipe, what, detail in (
        (build_recipe(train.root, "", knn_every_epochs=1), "evals.knn_every_epochs", "data.val"),
        (build_recipe(train.root, val.root, knnn={}), "recipe example, section evals, key knnn", "'knn'"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_online_knn(recipe, run, world, never_stop)
        assert caught.value.what == what and detail in caught.value.got + caught.value.fix


def test_a_stopped_evaluation_returns_none_and_the_next_one_completes_it(data, weights_file, tmp_path):
    run, world = RunDir(tmp_path), World.single_process()
    train, val = data
    options = build_recipe(train.root, val.root, knn_every_epochs=2)
    assert build_online_knn(options, run, world, lambda: True)(weights_file, 5) is None
    assert not run.eval_rows("knn").exists()
    assert build_online_knn(options, run, world, never_stop)(weights_file, 5)["knn1"] > 0
