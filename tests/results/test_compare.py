"""Comparison of settings: columns of the keys that differ, the ranking, and claims tested over seeds."""

import json
import math

import pytest

from hpcssl import config, files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.results import compare, tables
from hpcssl.results.command import main
from hpcssl.results.records import collect_records
from hpcssl.run_dir import RunDir


def write_run(root, seed, scores, *, name="own", method="msf", **optim):
    """Write a run folder with the scores of k-NN and of a linear classifier; of its step 0, lower ones."""
    run = RunDir(root)
    values = {"name": name, "seed": seed, "method": {"name": method}, "optim": {"batch": 64, "lr": 0.1, **optim}}
    files.atomic_write(run.config, json.dumps(values))  # JSON is YAML
    files.atomic_write(run.done, json.dumps({"step": 10}))
    about = {"method": method, "arch": "resnet_tiny", "train": "t", "val": "v", "train_name": "digits/train"}
    about |= {"val_name": "digits/val", "world": 1, "commit": "c", "fingerprint": "f", "time": "2026-01-01"}
    for step, lower in ((0, 50.0), (10, 0.0)):
        for evaluation, metric in (("knn", "knn1"), ("linear", "top1")):
            if evaluation in scores:
                row = {"eval": evaluation, "identity": f"{evaluation}{step}", "step": step, "options": {}}
                row |= {"weights_sha256": f"{step:064d}", "metrics": {metric: scores[evaluation] - lower}}
                files.append_line(run.eval_rows(evaluation), about | row)
    return run


@pytest.fixture
def sweep(tmp_path):
    """Three learning rates, two of them with three seeds."""
    for lr, linear in ((0.1, (90.0, 91.0, 92.0)), (0.2, (91.0, 92.5, 93.0)), (0.3, (70.0,))):
        for seed, score in enumerate(linear):
            write_run(tmp_path / f"lr={lr}_seed={seed}", seed, {"linear": score, "knn": 80.0 - 100 * lr}, lr=lr)
    return tmp_path


def read_table(text):
    head, *lines = [line.split("\t") for line in text.splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_a_folder_stands_for_its_runs_and_keys_that_differ_are_columns(sweep, capsys):
    main([sweep])
    rows = read_table(capsys.readouterr().out)
    trained = [row for row in rows if row["encoder"] == "trained" and not row["run"].startswith("mean")]
    assert [row["optim.lr"] for row in trained] == ["0.1"] * 3 + ["0.2"] * 3 + ["0.3"]
    assert "optim.batch" not in rows[0] and "seed" in rows[0]
    assert tables.to_csv(collect_records([sweep])).splitlines()[0].count("optim.lr") == 1


def test_keys_that_differ_only_between_recipes_are_no_columns():
    runs = [("a", {"x": 1, "y": 1}), ("a", {"x": 2, "y": 1}), ("b", {"x": 3, "y": 2, "z": 1})]
    assert compare.find_differing_keys(runs) == ["x"]
    assert config.flatten({"a": {"b": [1], "c": {}}, "d": None}) == {"a.b": [1], "a.c": {}, "d": None}


def test_settings_are_ranked_and_the_best_within_its_deviation_is_marked(sweep, capsys):
    main([sweep], sort="linear")
    rows = read_table(capsys.readouterr().out)
    assert [(row["optim.lr"], row["seed"]) for row in rows] == [("0.2", "3 seeds"), ("0.1", "3 seeds"), ("0.3", "0")]
    # 92.2 +- 1.04: 91.0 is more than one deviation below it
    assert [row["linear"] for row in rows] == ["92.2 ± 1.0 *", "91.0 ± 1.0", "70.0"]
    assert [row["1-NN"] for row in rows] == ["60.0 ± 0.0", "70.0 ± 0.0 *", "50.0"]
    write_run(sweep / "more", 3, {"linear": 95.0, "knn": 1.0}, lr=0.2)
    main([sweep], sort="linear")  # 92.9 +- 1.65
    assert [row["linear"][-1] for row in read_table(capsys.readouterr().out)] == ["*", "0", "0"]
    write_run(sweep / "again", 4, {"linear": 87.0, "knn": 1.0}, lr=0.2)
    main([sweep], sort="linear")  # 91.7 +- 3.0
    assert [row["linear"][-1] for row in read_table(capsys.readouterr().out)] == ["*", "*", "0"]


def test_a_claim_is_tested_over_the_seeds_that_both_have(sweep, capsys):
    write_run(sweep / "fourth", 3, {"linear": 10.0}, lr=0.1)  # no such seed on the other side
    linear, knn = sorted(
        compare.check_claim(collect_records([sweep]), "lr=0.2 > optim.lr=0.1"), key=lambda c: -c.difference
    )
    assert (linear.column, linear.seeds, knn.column) == ("linear", [0, 1, 2], "1-NN")
    assert linear.difference == pytest.approx(3.5 / 3) and linear.deviation == pytest.approx(math.sqrt(1 / 12))
    # Student's t with two degrees of freedom: P(T > t) = (1 - t / sqrt(2 + t^2)) / 2
    t = linear.difference / (linear.deviation / math.sqrt(3))
    assert linear.p == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2) and linear.verdict == "supported"
    assert knn.difference == pytest.approx(-10.0) and knn.p is None
    main([sweep], claim="lr=0.1 > lr=0.2", as_json=True)
    reverse = next(c for c in json.loads(capsys.readouterr().out) if c["column"] == "linear")
    assert reverse["p"] == pytest.approx(1 - linear.p) and reverse["verdict"] == "not supported"
    main([sweep], claim="lr=0.3 < lr=0.2")
    assert "one seed" in capsys.readouterr().out


def test_sides_of_a_claim_are_recipes_methods_and_values(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"m{seed}", seed, {"linear": 90.0 + seed}, name="small_msf")
        write_run(tmp_path / f"b{seed}", seed, {"linear": 80.0 - seed}, name="small_byol_asym", method="byol")
    records = collect_records([tmp_path])
    for claim in ("msf > byol_asym", "small_msf>byol", "byol < msf"):
        (comparison,) = compare.check_claim(records, claim)
        assert comparison.difference == 11.0 and comparison.p == pytest.approx(0.5 - math.atan(11.0) / math.pi)
        assert "+11.00 ± 1.41 over 2 seeds" in comparison.line()


def test_values_of_a_claim_are_written_as_in_recipes(tmp_path):
    for number, (nesterov, schedule) in enumerate([(True, None), (False, None), (False, 5)]):
        write_run(tmp_path / str(number), 0, {"linear": 90.0 - number}, nesterov=nesterov, schedule=schedule)
    records = collect_records([tmp_path])
    for claim in ("nesterov=true > nesterov=false schedule=5", "nesterov=True > schedule=5"):
        assert [one.difference for one in compare.check_claim(records, claim)] == [2.0]
    (one,) = compare.check_claim(records, "nesterov=true > nesterov=false schedule=null")
    assert one.difference == 1.0
    with pytest.raises(ConfigError):
        compare.check_claim(records, "nesterov= > schedule=5")


@pytest.mark.parametrize(
    ("claim", "got"),
    [("lr=0.1", "'lr=0.1'"), ("lr=0.1 > lr=0.9", "no setting"), ("own > lr=0.1", "lr=0.1 and own optim.lr=0.2")],
)
def test_a_claim_that_names_no_two_settings_is_refused(sweep, claim, got):
    with pytest.raises(ConfigError) as caught:
        main([sweep], claim=claim)
    assert caught.value.what == "option --claim" and got in caught.value.got and caught.value.fix


def test_what_cannot_be_compared_is_refused(tmp_path):
    write_run(tmp_path / "a", 0, {"linear": 90.0}, lr=0.1)
    write_run(tmp_path / "b", 1, {"linear": 90.0}, lr=0.2)
    with pytest.raises(EvalError):
        main([tmp_path], claim="lr=0.1 > lr=0.2")
    with pytest.raises(ConfigError) as caught:
        main([tmp_path], sort="liner")
    assert "'linear'" in caught.value.fix
    with pytest.raises(ConfigError) as nothing:
        compare.rank_settings([], "linear")
    assert "hpcssl eval" in nothing.value.fix, "there is no column to choose"
    with pytest.raises(ConfigError):
        main([tmp_path], sort="linear", claim="lr=0.1 > lr=0.2")
