import json
import shutil

import numpy as np
import pytest

from hpcssl import config, files
from hpcssl.errors import EXIT_STOPPED, ConfigError, EvalError
from hpcssl.evals import run as running
from hpcssl.evals.options import EvalsOptions
from hpcssl.evals.run import EVALS, code_commit, evaluate, evaluate_run, weights_of
from hpcssl.evals.together import Stopped, agree
from hpcssl.files import RunDir
from hpcssl.world import World

ALONE = World.alone()


@pytest.fixture
def run(data, weights_file, tmp_path):
    """A finished run's folder: config, weights of steps 0 and 5, done.json."""
    run = RunDir(tmp_path / "run")
    train, val = data
    files.atomic_write(run.config, json.dumps({
        "name": "x", "data": {"train": str(train.root), "val": str(val.root)},
        "evals": {"knn": {"k": [1, 7], "one_label": 2, "batch": 32}}}))
    for step in (0, 5):
        run.weights.mkdir(exist_ok=True)
        shutil.copy(weights_file, run.weights_at(step))
    body = bytearray(run.weights_at(0).read_bytes())
    body[-40] ^= 1  # other weights, if hardly
    run.weights_at(0).write_bytes(body)
    files.atomic_write(run.done, json.dumps({"step": 5, "weights": "weights/step-00000005.safetensors"}))
    return run


def test_both_encoders_are_measured_once_and_rows_say_everything(run, data, monkeypatch):
    rows = evaluate_run("knn", run, ALONE)
    assert [row["weights"] for row in rows] == ["step-00000000.safetensors", "step-00000005.safetensors"]
    assert files.read_lines(run.eval_rows("knn")) == rows
    row = rows[1]
    assert row["weights_sha256"] == files.digest(run.weights_at(5)) and row["step"] == 5
    assert (row["train"], row["val"]) == (data[0].digest, data[1].digest) and row["world"] == 1
    assert row["options"] == config.as_dict(EVALS["knn"].options(k=[1, 7], one_label=2, batch=32))
    assert {"knn1", "knn7", "knn7_top5", "knn20_weighted", "one_label"} <= row["metrics"].keys()
    assert row["fingerprint"] == "f" * 64 and row["method"] == "msf" and row["commit"] == code_commit(run)

    monkeypatch.setitem(running.EVALS, "knn", running.Evaluation(EVALS["knn"].options, None))  # would crash
    assert evaluate_run("knn", run, ALONE) == rows
    assert files.read_lines(run.eval_rows("knn")) == rows


def test_other_options_are_another_row(run):
    first = evaluate_run("knn", run, ALONE, step="last")
    again = evaluate_run("knn", run, ALONE, overrides=["k=[3]", "weighted_k=[]"])
    assert again[1]["options"]["k"] == [3] and "knn3" in again[1]["metrics"]
    assert again[1]["options"]["one_label"] == 2  # the recipe's section still counts
    assert files.read_lines(run.eval_rows("knn")) == first + again
    with pytest.raises(ConfigError, match="did you mean 'tau'"):
        evaluate_run("knn", run, ALONE, overrides=["taw=1"])


def test_baseline_and_steps_can_be_chosen(run):
    assert [row["weights"] for row in evaluate_run("knn", run, ALONE, step=0)] == ["step-00000000.safetensors"]
    assert len(evaluate_run("knn", run, ALONE, step="first")) == 1
    files.atomic_write(run.config, run.config.read_text().replace('"evals": {', '"evals": {"baseline": false, '))
    assert len(evaluate_run("knn", run, ALONE)) == 1
    with pytest.raises(EvalError, match=r"no step-00000003\.safetensors; expected one of the steps 0, 5"):
        evaluate_run("knn", run, ALONE, step=3)
    with pytest.raises(ConfigError, match="last, first or a step's number"):
        evaluate_run("knn", run, ALONE, step="newest")
    run.done.unlink()
    assert weights_of(run) == run.weights_at(5)


def test_two_ranks_write_one_row_and_both_return_it(run, ranks):
    alone = evaluate_run("knn", RunDir(shutil.copytree(run.root, run.root.parent / "copy")), ALONE)
    rows = ranks(2, rows_of, run)
    assert rows[0] == rows[1] == files.read_lines(run.eval_rows("knn"))
    assert [row["metrics"] for row in rows[0]] == [row["metrics"] for row in alone]
    assert all(row["world"] == 2 for row in rows[0])


def rows_of(world, run):
    return evaluate_run("knn", run, world)


def test_a_stop_has_its_exit_code_and_leaves_no_row(run):
    with pytest.raises(Stopped, match="run the same command again"):
        evaluate_run("knn", run, ALONE, stop=lambda: True)
    assert not run.eval_rows("knn").exists()
    assert Stopped.exit_code == EXIT_STOPPED == 75
    assert len(evaluate_run("knn", run, ALONE)) == 2


def test_without_a_run_folder_nothing_is_written(data, weights_file, tmp_path):
    before = sorted(weights_file.parent.iterdir())
    row = evaluate("knn", run=None, weights=weights_file, train=data[0], val=data[1], world=ALONE)
    assert row["metrics"]["knn1"] > 30 and sorted(weights_file.parent.iterdir()) == before


def test_features_stay_out_of_the_run_folder_where_asked(run, data):
    evaluate("knn", run=run, weights=run.weights_at(5), train=data[0], val=data[1], world=ALONE, cache=False)
    assert not run.features.exists() and run.eval_rows("knn").exists()


def test_wrong_input_is_one_sentence(run, data, weights_file, shards_of, tmp_path):
    def tried(**changed):
        evaluate(**({"name": "knn", "run": None, "weights": weights_file, "train": data[0], "val": data[1],
                     "world": ALONE} | changed))

    images = np.zeros((30, 16, 16, 3), np.uint8)
    fewer = shards_of(tmp_path / "fewer", images, np.zeros(30, int), classes=["a", "b"])
    without = shards_of(tmp_path / "without", images, np.full(30, -1))
    empty = shards_of(tmp_path / "empty", images[:0], [])
    for changed, kind, told in (
            ({"name": "nkn"}, ConfigError, "did you mean 'knn'"),
            ({"options": {"kk": 1}}, ConfigError, "unknown key 'kk'"),
            ({"val": fewer}, EvalError, "2 classes"),
            ({"train": without}, EvalError, "30 images without a label"),
            ({"val": empty}, EvalError, "no samples"),
            ({"weights": tmp_path / "absent"}, EvalError, "no such file")):
        with pytest.raises(kind, match=told):
            tried(**changed)
    files.atomic_write(run.config, "name: x\n")
    with pytest.raises(ConfigError, match="none named and none in the recipe"):
        evaluate_run("knn", run, ALONE)


def test_an_error_of_one_rank_is_everyones(ranks):
    told = ranks(2, agreed)
    assert told[0] == told[1] and "one only" in told[0]


def agreed(world):
    error = EvalError("one only", got="x", expected="y", mend="z") if world.rank == 1 else None
    try:
        agree(world, "test", stop=world.rank == 0, error=error)
    except EvalError as raised:
        return str(raised)
    return "nothing"


def test_every_evaluation_has_its_section_in_the_recipe():
    section = config.as_dict(EvalsOptions())
    for name, entry in EVALS.items():
        assert config.load(entry.options, section[name]) == entry.options()
    with pytest.raises(ConfigError, match="did you mean 'one_label'"):
        config.load(EvalsOptions, {"knn": {"one_lable": 3}})
