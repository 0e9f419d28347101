import csv
import io
import json
import math

import pytest

from hpcssl import config, files, results
from hpcssl.errors import EvalError
from hpcssl.files import RunDir


def make_run(root, *, seed=0, knn=(88.1, 95.26), linear=97.2, last=100, done=True):
    """A run folder as training and evaluations leave it: two attempts of two ranks, 36 s and 54 s."""
    run = RunDir(root)
    recipe = {"name": "digits_msf", "seed": seed, "data": {"train": "T", "val": "V"}, "method": {"name": "msf"},
              "optim": {"batch": 128}, "schedule": {"epochs": 100}, "machine": {"threads": seed},
              "about": {"published": {"20-NN": 95.3}}}
    files.atomic_write(run.config, json.dumps(recipe))  # JSON is YAML
    assert config.read_yaml(run.config) == recipe
    for attempt, cause, seconds in ((1, "stopped", 36), (2, "done", 54)):
        about = {"attempt": attempt, "world": 2}
        files.append_line(run.attempts, about | {"event": "start", "first_step": 0, "time": 1000.0 * attempt})
        files.append_line(run.attempts, about | {"event": "end", "cause": cause, "last_step": last,
                                                 "time": 1000.0 * attempt + seconds})
    if done:
        files.atomic_write(run.done, json.dumps({"step": last, "weights": f"weights/step-{last:08d}.safetensors"}))
    for step, scores in ((0, (81.4, 88.06)), (last, knn)):
        add(run, "knn", step, {"knn1": scores[0], "knn20": scores[1], "knn20_top5": 99.0}, identity=f"k{step}")
    add(run, "linear", last, {"top1": linear, "top5": 99.9, "top1_last": 97.0, "top5_last": 99.8})
    return run


def add(run, name, step, metrics, identity="x", **options):
    if name == "linear":
        options = {"protocol": "msf"} | options
    files.append_line(run.eval_rows(name), {
        "eval": name, "identity": f"{name}{identity}{options}", "step": step, "weights_sha256": f"{step:04d}" * 16,
        "method": "msf", "arch": "resnet_tiny", "options": options, "metrics": metrics, "train": "t", "val": "v",
        "world": 2, "commit": "abc123", "fingerprint": "f", "time": f"2026-01-01T00:00:0{len(name)}+00:00"})


GOLDEN = """\
| recipe | encoder | method | arch | epochs | batch | 1-NN | 20-NN | linear | linear top-5 | published | seed | world | \
rank·h | run | weights | commit |
| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | --- | --- | --- | --- |
| digits_msf | untrained | msf | resnet_tiny | 0 | 128 | 81.4 | 88.1 |  |  |  | 0 | 2 | 0.0 | demo | 000000000000 | abc123 |
| digits_msf | trained | msf | resnet_tiny | 100 | 128 | 88.1 | 95.3 | 97.2 | 99.9 | 20-NN 95.3 | 0 | 2 | 0.05 | demo | \
010001000100 | abc123 |
"""  # noqa: E501


def test_markdown_is_the_golden_text(tmp_path):
    run = make_run(tmp_path / "demo")
    results.write_markdown(tmp_path / "RESULTS.md", results.collect([run.root]))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Results\n") and GOLDEN in text


def test_only_the_part_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Mine\n\nPublished part.\n")
    run = make_run(tmp_path / "demo")
    results.write_markdown(page, results.collect([run.root]))
    with page.open("a") as file:
        file.write("\nNotes below.\n")
    add(run, "knn", 100, {"knn200": 93.0}, identity="later")
    results.write_markdown(page, results.collect([run.root]))
    text = page.read_text()
    assert text.startswith("# Mine\n\nPublished part.\n") and text.endswith("\nNotes below.\n")
    assert text.count(results.BEGIN) == 1 and "200-NN" in text
    results.write_markdown(page, results.collect([run.root]))
    assert page.read_text() == text  # nothing new, nothing changed
    page.write_text(text.replace(results.END, ""))
    with pytest.raises(EvalError, match="markers"):
        results.write_markdown(page, results.collect([run.root]))


def test_seeds_give_mean_and_deviation(tmp_path):
    scores = [94.0, 95.0, 97.5]
    runs = [make_run(tmp_path / f"s{i}", seed=i, knn=(90.0, x)).root for i, x in enumerate(scores)]
    records = results.collect(runs)
    mean = next(r for r in records if r["seed"] == "3 seeds" and r["encoder"] == "trained")
    average = sum(scores) / 3
    spread = math.sqrt(sum((x - average) ** 2 for x in scores) / 2)
    assert mean["metrics"]["20-NN"] == pytest.approx(average) and mean["deviation"]["20-NN"] == pytest.approx(spread)
    assert f"{average:.1f} ± {spread:.1f}" in results.markdown(records)
    make_run(tmp_path / "again", seed=2)  # the same seed twice is no third sample
    assert not [r for r in results.collect([runs[2], tmp_path / "again"]) if "seeds" in str(r["seed"])]


def test_other_options_never_overwrite_a_number(tmp_path):
    run = make_run(tmp_path / "demo")
    add(run, "linear", 100, {"top1": 50.0}, epochs=1)
    add(run, "linear", 100, {"top1": 96.0}, protocol="moco")
    add(run, "knn", 100, {"knn1": 1.0}, identity="k100")  # the same identity: the first stands
    trained = [r["metrics"] for r in results.collect([run.root]) if r["step"] == 100]
    assert [m.get("linear") for m in trained] == [97.2, 50.0]
    assert trained[0]["linear moco"] == 96.0 and trained[0]["1-NN"] == 88.1


def test_plain_csv_and_json_hold_everything(tmp_path):
    run = make_run(tmp_path / "demo")
    plain = results.show([run.root]).splitlines()
    assert len(plain) == 3 and len({line.count("\t") for line in plain}) == 1
    rows = list(csv.DictReader(io.StringIO(results.show([run.root], style="csv"))))
    assert rows[1]["20-NN"] == "95.26" and rows[1]["linear, last epoch"] == "97.0" and rows[0]["linear"] == ""
    records = json.loads(results.show([run.root], style="json"))
    assert records[1]["metrics"]["20-NN top-5"] == 99.0 and records[1]["fingerprint"] == "f"


def test_the_terminal_table_drops_columns_that_say_nothing(tmp_path):
    run = make_run(tmp_path / "demo")
    drawn = results.show([run.root], terminal=True, width=200)
    assert "95.3" in drawn and "untrained" in drawn and "resnet_tiny" not in drawn


def test_an_attempt_without_an_end_makes_the_cost_a_lower_bound(tmp_path):
    run = make_run(tmp_path / "demo")
    files.append_line(run.attempts, {"attempt": 3, "event": "start", "world": 2, "time": 5000.0})
    assert results.collect([run.root])[1]["rank·h"] == "≥ 0.05"


def test_an_unfinished_run_names_the_step(tmp_path):
    run = make_run(tmp_path / "demo", done=False)
    record = results.collect([run.root])[1]
    assert record["encoder"] == "step 100" and record["published"] == ""


def test_wrong_folders_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text("seed: 0\n")
    for name, got in (("absent", "no such folder"), ("empty", "no config.yaml"), ("bare", "no results yet")):
        with pytest.raises(EvalError, match=got):
            results.show([tmp_path / name])
