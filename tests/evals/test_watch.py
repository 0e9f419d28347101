from types import SimpleNamespace

import pytest

from hpcssl import files
from hpcssl.errors import ConfigError
from hpcssl.evals.run import evaluate
from hpcssl.evals.together import never
from hpcssl.evals.watch import watch
from hpcssl.files import RunDir
from hpcssl.pulse import Pulse
from hpcssl.world import World


def recipe(train, val, **evals):
    data = SimpleNamespace(train=str(train), val=str(val), stage="", stage_gb=0.0, stall_seconds=60.0, tries=5)
    return SimpleNamespace(name="made up", evals=evals, data=data,
                           machine=SimpleNamespace(loader_threads=2))


def test_a_look_during_training_is_the_evaluations_own_row(data, weights_file, tmp_path):
    run, world = RunDir(tmp_path), World.alone()
    train, val = data
    look = watch(recipe(train.root, val.root, every_epochs=2, knn={"k": [1, 5]}), run, world, never)
    assert look.every_epochs == 2
    scores = look(weights_file, 5)
    row = evaluate("knn", run=None, weights=weights_file, train=train, val=val, world=world, options={"k": [1, 5]})
    assert scores == row["metrics"] and files.read_lines(run.eval_rows("knn"))[0]["metrics"] == scores
    assert look(weights_file, 5) == scores and not run.features.exists()


def test_fetching_a_set_for_a_look_is_no_hang(data, weights_file, tmp_path):
    world, (train, val) = World.alone(), data
    pulse = world.pulse = Pulse(None, hang_s=600, leave=lambda *_: None)
    seen, near = [], val.near
    val.near = lambda: (seen.append(pulse._patient), near())[1]
    try:
        evaluate("knn", run=None, weights=weights_file, train=train, val=val, world=world, options={"k": [1]})
    finally:
        val.near = near
    assert seen == [True] and not pulse._patient


def test_without_a_period_there_is_no_watch_and_mistakes_come_before_training(data):
    train, val = data
    world, run = World.alone(), RunDir("unused")
    assert watch(recipe(train.root, ""), run, world, never) is None
    for bad, told in ((recipe(train.root, "", every_epochs=1), "without data.val"),
                      (recipe(train.root, val.root, knnn={}), "did you mean 'knn'")):
        with pytest.raises(ConfigError, match=told):
            watch(bad, run, world, never)


def test_a_stop_during_the_look_gives_none_and_the_next_look_makes_up_for_it(data, weights_file, tmp_path):
    run, world = RunDir(tmp_path), World.alone()
    train, val = data
    options = recipe(train.root, val.root, every_epochs=2)
    assert watch(options, run, world, lambda: True)(weights_file, 5) is None
    assert not run.eval_rows("knn").exists()
    assert watch(options, run, world, never)(weights_file, 5)["knn1"] > 0
