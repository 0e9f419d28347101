"""Running evaluations: result rows, identities, stops, the checks of sets and options, and former option names."""

import json
import logging
import shutil

import numpy as np
import pytest

from hpcssl import cli, config, files
from hpcssl.code_version import code_commit
from hpcssl.distributed.world import World
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE, ConfigError, EvalError, Stopped
from hpcssl.evals import registry
from hpcssl.evals.common.sync import raise_on_any_rank
from hpcssl.evals.options import EvalsOptions
from hpcssl.evals.registry import EVALS
from hpcssl.evals.resolve import resolve_evaluation
from hpcssl.evals.run import evaluate, evaluate_run
from hpcssl.nets import tensor_file, weights
from hpcssl.nets.run_weights import find_weights
from hpcssl.run_dir import RunDir
from tests.printed import printed_error

SINGLE = World.single_process()


@pytest.fixture
def run(data, weights_file, tmp_path):
    """The folder of a finished run: recipe, weights of steps 0 and 5, done.json."""
    run = RunDir(tmp_path / "run")
    train, val = data
    files.atomic_write(
        run.config,
        json.dumps(
            {
                "name": "x",
                "data": {"train": str(train.root), "val": str(val.root)},
                "evals": {"knn": {"k": [1, 7], "one_label_draws": 2, "forward_batch": 32}},
            }
        ),
    )
    for step in (0, 5):
        run.weights.mkdir(exist_ok=True)
        shutil.copy(weights_file, run.weights_at(step))
    tensors, header = tensor_file.read(weights_file)
    tensors["backbone.bn1.bias"] = tensors["backbone.bn1.bias"] + 0.01  # other weights than those of step 5
    tensor_file.write(run.weights_at(0), tensors, header)
    files.atomic_write(run.done, json.dumps({"step": 5, "weights": "weights/step-00000005.safetensors"}))
    return run


def test_both_encoders_are_evaluated_once_and_rows_record_everything(run, data, monkeypatch):
    rows = evaluate_run("knn", run, SINGLE)
    assert [row["weights"] for row in rows] == ["step-00000000.safetensors", "step-00000005.safetensors"]
    assert files.read_lines(run.eval_rows("knn")) == rows
    row = rows[1]
    assert row["weights_sha256"] == files.sha256_of_file(run.weights_at(5)) and row["step"] == 5
    assert (row["train"], row["val"]) == (data[0].digest, data[1].digest) and row["world"] == 1
    assert row["options"] == config.as_dict(EVALS["knn"].options(k=[1, 7], one_label_draws=2, forward_batch=32))
    assert {"knn1", "knn7", "knn7_top5", "knn20_weighted", "one_label"} <= row["metrics"].keys()
    assert row["fingerprint"] == "f" * 64 and row["method"] == "msf" and row["commit"] == code_commit()

    monkeypatch.setitem(
        registry.EVALS, "knn", registry.Evaluation(EVALS["knn"].options, None)
    )  # a second evaluation would fail
    assert evaluate_run("knn", run, SINGLE) == rows
    assert files.read_lines(run.eval_rows("knn")) == rows


@pytest.mark.parametrize("role", [0, 1])
def test_images_that_were_changed_since_they_were_written_give_no_row(run, data, role):
    """Two images of one size change places: the index, and with it the identity of the row, stays the same."""
    shards = data[role]
    path, (_, offset, size) = shards.path(0), shards.samples.image(0)
    before = path.read_bytes()
    evaluate_run("knn", run, SINGLE, step="first")
    path.write_bytes(before[:offset] + before[offset : offset + size][::-1] + before[offset + size :])
    try:
        with pytest.raises(EvalError) as caught:
            evaluate_run("knn", run, SINGLE)
        assert caught.value.what == f"shards of {shards.root}" and path.name in caught.value.got
        assert [row["weights"] for row in files.read_lines(run.eval_rows("knn"))] == ["step-00000000.safetensors"]
    finally:
        path.write_bytes(before)
    assert len(evaluate_run("knn", run, SINGLE)) == 2


def test_other_options_give_another_row(run):
    first = evaluate_run("knn", run, SINGLE, step="last")
    again = evaluate_run("knn", run, SINGLE, overrides=["k=[3]", "weighted_k=[]"])
    assert again[1]["options"]["k"] == [3] and "knn3" in again[1]["metrics"]
    assert again[1]["options"]["one_label_draws"] == 2  # from the recipe
    assert files.read_lines(run.eval_rows("knn")) == first + again
    with pytest.raises(ConfigError) as caught:
        evaluate_run("knn", run, SINGLE, overrides=["temprature=1"])
    assert caught.value.what == "options of knn, key temprature" and "'temperature'" in caught.value.fix


def test_the_baseline_can_be_switched_off_and_a_step_chosen(run):
    assert [row["weights"] for row in evaluate_run("knn", run, SINGLE, step=0)] == ["step-00000000.safetensors"]
    assert len(evaluate_run("knn", run, SINGLE, step="first")) == 1
    files.atomic_write(run.config, run.config.read_text().replace('"evals": {', '"evals": {"baseline": false, '))
    assert len(evaluate_run("knn", run, SINGLE)) == 1
    with pytest.raises(EvalError) as missing:
        evaluate_run("knn", run, SINGLE, step=3)
    assert missing.value.what == f"weights of {run.root}"
    assert "step-00000003.safetensors" in missing.value.got and "0, 5" in missing.value.expected
    for word in ("newest", "²"):  # "²".isdigit(), but it is no number
        with pytest.raises(ConfigError) as unknown:
            evaluate_run("knn", run, SINGLE, step=word)
        assert unknown.value.what == "--step" and unknown.value.got == repr(word)
    run.done.unlink()
    assert find_weights(run) == run.weights_at(5)


def test_two_ranks_write_one_row_and_both_return_it(run, run_ranks):
    reference = evaluate_run("knn", RunDir(shutil.copytree(run.root, run.root.parent / "copy")), SINGLE)
    rows = run_ranks(2, rows_of, run)
    assert rows[0] == rows[1] == files.read_lines(run.eval_rows("knn"))
    assert [row["metrics"] for row in rows[0]] == [row["metrics"] for row in reference]
    assert all(row["world"] == 2 for row in rows[0])


def rows_of(world, run):
    return evaluate_run("knn", run, world)


def test_a_stop_has_exit_code_75_and_leaves_no_row(run):
    with pytest.raises(Stopped) as caught:
        evaluate_run("knn", run, SINGLE, stop=lambda: True)
    assert caught.value.exit_code == EXIT_STOPPED == 75 and "same command" in caught.value.fix
    assert not run.eval_rows("knn").exists()
    assert len(evaluate_run("knn", run, SINGLE)) == 2


def test_without_a_run_folder_nothing_is_written(data, weights_file, tmp_path):
    before = sorted(weights_file.parent.iterdir())
    row = evaluate("knn", run=None, weights=weights_file, train=data[0], val=data[1], world=SINGLE)
    assert row["metrics"]["knn1"] > 30 and sorted(weights_file.parent.iterdir()) == before


def test_features_are_not_kept_without_cache(run, data):
    evaluate("knn", run=run, weights=run.weights_at(5), train=data[0], val=data[1], world=SINGLE, cache=False)
    assert not run.features.exists() and run.eval_rows("knn").exists()


def test_unusable_input_is_refused(run, data, weights_file, write_shards, tmp_path):
    images = np.zeros((30, 16, 16, 3), np.uint8)
    fewer = write_shards(tmp_path / "fewer", images, np.zeros(30, int), classes=["a", "b"])
    unlabeled = write_shards(tmp_path / "unlabeled", images, np.full(30, -1))
    for changes, kind, what, detail in (
        ({"name": "nkn"}, ConfigError, "evaluation", "'knn'"),
        ({"options": {"kk": 1}}, ConfigError, "options of knn, key kk", "'k'"),
        ({"val": fewer}, EvalError, f"classes of {fewer.root}", "2 classes"),
        ({"train": unlabeled}, EvalError, f"shard folder {unlabeled.root}", "30 images"),
        ({"weights": tmp_path / "absent"}, EvalError, str(tmp_path / "absent"), "no such file"),
    ):
        inputs = {"name": "knn", "run": None, "weights": weights_file, "train": data[0], "val": data[1]} | changes
        with pytest.raises(kind) as caught:
            evaluate(**inputs, world=SINGLE)
        assert what in caught.value.what and detail in caught.value.got + caught.value.fix
    files.atomic_write(run.config, "name: x\n")
    with pytest.raises(ConfigError) as caught:
        evaluate_run("knn", run, SINGLE)
    assert caught.value.what == "evaluation knn, train shards" and "--train" in caught.value.fix


def test_a_weights_file_has_no_steps(weights_file, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "knn", "--weights", str(weights_file), "--step", "3"])
    error = printed_error(capsys.readouterr().err)
    assert ended.value.code == EXIT_USAGE and "--step 3" in error.got


def test_shards_at_an_address_are_scored_like_those_in_a_folder(data, weights_file, tmp_path, capsys):
    scores = []
    for prefix, stage in (("", []), ("file://", ["--stage-dir", str(tmp_path / "stage")])):
        words = ["eval", "knn", "k=[1]", "--weights", str(weights_file), "--devices", "cpu", *stage]
        for role, shards in zip(("--train", "--val"), data, strict=True):
            words += [role, f"{prefix}{shards.root}"]
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        scores.append(capsys.readouterr().out)
        assert ended.value.code == EXIT_DONE
    assert scores[0] == scores[1] and "knn1=" in scores[0]
    with pytest.raises(SystemExit) as ended:
        cli.main([word for word in words if word not in stage])
    error = printed_error(capsys.readouterr().err)
    assert ended.value.code == EXIT_USAGE and error.what == "data.stage_dir" and "--stage-dir" in error.fix


def test_an_empty_set_is_refused_in_every_role(data, weights_file, write_shards, tmp_path):
    """A shard set without samples is false in a boolean context, and must still not count as one that is not there."""
    empty = write_shards(tmp_path / "empty", np.zeros((0, 16, 16, 3), np.uint8), [])
    train, val = data
    for name, sets in (
        ("knn", {"train": empty, "val": val}),
        ("knn", {"train": train, "val": empty}),
        ("detect", {"train": train, "val": empty}),
        ("transfer", {"train": train, "val": val, "test": empty}),
    ):
        with pytest.raises(EvalError) as caught:
            evaluate(name, run=None, weights=weights_file, world=SINGLE, **sets)
        assert caught.value.what == f"shard folder {empty.root}" and caught.value.expected == "at least one"
    recipe = {"data": {"train": str(train.root), "val": str(val.root)}}
    _, sets = resolve_evaluation("knn", recipe, val=empty)
    assert sets["val"] is empty  # and not the recipe's
    with pytest.raises(ConfigError) as refused:
        resolve_evaluation("transfer", {}, val=empty)
    assert "--val" in refused.value.got


def test_a_stored_result_of_weights_without_a_step_is_logged(run, data, weights_file, tmp_path, caplog):
    """Weights of other projects have no step."""
    backbone, meta = weights.load(weights_file)
    kept = {name: meta[name] for name in ("mean", "std", "size", "fingerprint", "method")}
    weights.save(tmp_path / "other.safetensors", backbone, meta["arch"], step=None, **kept)

    def score():
        return evaluate(
            "knn", run=run, weights=tmp_path / "other.safetensors", train=data[0], val=data[1], world=SINGLE
        )

    row = score()
    with caplog.at_level(logging.INFO, "hpcssl"):
        assert score() == row and row["step"] is None
    logged = [record.getMessage() for record in caplog.records if str(run.eval_rows("knn")) in record.getMessage()]
    assert len(logged) == 1 and "other.safetensors" in logged[0]


def test_an_error_of_one_rank_is_raised_on_all(run_ranks):
    errors = run_ranks(2, error_of_rank_1)
    assert [error.what for error in errors] == ["only rank 1"] * 2


def error_of_rank_1(world):
    error = EvalError("only rank 1", got="x", expected="y", fix="z") if world.rank == 1 else None
    try:
        raise_on_any_rank(world, "test", stop=world.rank == 0, error=error)
    except EvalError as raised:
        return raised
    return None


def test_every_evaluation_has_a_section_in_the_recipe():
    section = config.as_dict(EvalsOptions())
    for name, entry in EVALS.items():
        assert config.load(entry.options, section[name]) == entry.options()
    with pytest.raises(ConfigError) as caught:
        config.load(EvalsOptions, {"knn": {"one_lable_draws": 3}})
    assert caught.value.what.endswith("key knn.one_lable_draws") and "'one_label_draws'" in caught.value.fix


def test_show_refuses_former_and_misspelled_options_of_evaluations(capsys):
    for key, fix in (("evals.knn.tau", "knn.temperature"), ("evals.linear.ecophs", "'epochs'")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["show", "digits_msf", f"{key}=1"])
        error = printed_error(capsys.readouterr().err)
        assert ended.value.code == EXIT_USAGE
        assert error.what.endswith("key " + key.removeprefix("evals.")) and fix in error.fix
