"""Tables of results: records of run folders, published values beside them, RESULTS.md, and the command."""

import csv
import io
import json
import math
from pathlib import Path

import pytest

from hpcssl import config, files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.results import columns, page, tables
from hpcssl.results.command import main, render_records
from hpcssl.results.records import collect_records, select_shown
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe

ROOT = Path(__file__).resolve().parents[2]
ROW = "msf_r50_ep200_1m"  # MSF w/s (1M): linear 72.4, 1-NN 62.0, 20-NN 64.9
LAST = 200 * (1_281_167 // 256)  # its last step on ImageNet


@pytest.fixture(scope="module")
def resolved():
    """``resolved(name)`` returns a recipe as a run folder stores it. Each recipe is composed once."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = config.as_dict(recipe.compose(name))
        return json.loads(json.dumps(known[name]))

    return get


@pytest.fixture
def make_run(resolved):
    """``make_run(folder)`` writes a run folder with results, after two attempts on two ranks, of 36 s and 54 s."""

    def make(
        root,
        *,
        name="digits_msf",
        seed=0,
        knn=(88.1, 95.26),
        linear=97.2,
        last=100,
        done=True,
        trained_on="t",
        **sections,
    ):
        run = RunDir(root)
        values = config.merge(resolved(name), {"seed": seed, "machine": {"threads": seed}}, sections)
        files.atomic_write(run.config, json.dumps(values))  # JSON is YAML
        files.atomic_write(run.data, json.dumps({"train": trained_on}))
        for attempt, cause, seconds in ((1, "stopped", 36), (2, "done", 54)):
            about = {"attempt": attempt, "world": 2}
            files.append_line(run.attempts, about | {"event": "start", "first_step": 0, "time": 1000.0 * attempt})
            files.append_line(
                run.attempts,
                about | {"event": "end", "cause": cause, "last_step": last, "time": 1000.0 * attempt + seconds},
            )
        if done:
            files.atomic_write(run.done, json.dumps({"step": last, "weights": f"weights/step-{last:08d}.safetensors"}))
        for step, scores in ((0, (81.4, 88.06)), (last, knn)):
            add_row(run, "knn", step, {"knn1": scores[0], "knn20": scores[1], "knn20_top5": 99.0}, identity=f"k{step}")
        add_row(run, "linear", last, {"top1": linear, "top5": 99.9, "top1_last": 97.0, "top5_last": 99.8})
        return run

    return make


def add_row(run, name, step, metrics, identity="x", data="digits", **options):
    if name == "linear":
        options = {"protocol": "msf"} | options
    files.append_line(
        run.eval_rows(name),
        {
            "eval": name,
            "identity": f"{name}{identity}{options}",
            "step": step,
            "weights_sha256": f"{step:04d}" * 16,
            "method": "msf",
            "arch": "resnet_tiny",
            "options": options,
            "metrics": metrics,
            "train": "t" if data == "digits" else data,
            "val": "v",
            "train_name": f"{data}/train",
            "val_name": f"{data}/val",
            "world": 2,
            "commit": "abc123",
            "fingerprint": "f",
            "time": f"2026-01-01T00:00:0{len(name)}+00:00",
        },
    )


GOLDEN = """\
| recipe | encoder | method | arch | data | epochs | batch | changed | 1-NN | 20-NN | linear | linear top-5 | seed | \
world | rank·h | run | weights | commit |
| --- | --- | --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | --- | --- | --- |
| digits_msf | untrained | msf | resnet_tiny | digits | 0 | 128 |  | 81.4 | 88.1 |  |  | 0 | 2 | 0.0 | demo | \
000000000000 | abc123 |
| digits_msf | trained | msf | resnet_tiny | digits | 100 | 128 |  | 88.1 | 95.3 | 97.2 | 99.9 | 0 | 2 | 0.05 | demo | \
010001000100 | abc123 |
"""


# -- records ------------------------------------------------------------------------------------------------


def test_runs_with_other_seeds_give_mean_and_standard_deviation(tmp_path, make_run):
    scores = [94.0, 95.0, 97.5]
    runs = [make_run(tmp_path / f"s{i}", seed=i, knn=(90.0, x)).root for i, x in enumerate(scores)]
    records = collect_records(runs)
    mean = next(r for r in records if r["seed"] == "3 seeds" and r["encoder"] == "trained")
    average = sum(scores) / 3
    spread = math.sqrt(sum((x - average) ** 2 for x in scores) / 2)
    assert mean["metrics"]["20-NN"] == pytest.approx(average) and mean["deviation"]["20-NN"] == pytest.approx(spread)
    assert mean["run"] == "mean of s0, s1, s2"
    assert f"{average:.1f} ± {spread:.1f}" in page.format_measured(records)
    make_run(tmp_path / "again", seed=2)  # the same seed twice is one sample
    assert not [r for r in collect_records([runs[2], tmp_path / "again"]) if "seeds" in str(r["seed"])]


def test_a_mean_states_the_number_of_seeds_it_covers(tmp_path, make_run):
    runs = [make_run(tmp_path / f"s{i}", seed=i) for i in range(3)]
    for run, score in zip(runs, (60.0, 62.0), strict=False):
        add_row(run, "knn", 100, {"knn200": score}, identity="more")
    add_row(runs[2], "linear", 100, {"top1": 10.0}, protocol="moco")
    mean = next(r for r in collect_records([run.root for run in runs]) if "n" in r and r["step"] == 100)
    assert mean["metrics"]["200-NN"] == 61.0 and mean["n"]["200-NN"] == 2 and mean["n"]["20-NN"] == 3
    assert "linear:moco" not in mean["metrics"]
    assert "61.0 ± 1.4 [n 2]" in tables.to_tsv([mean])


def test_scores_with_different_options_are_not_averaged(tmp_path, make_run):
    """One run was scored with the short protocol first, the other with the long one first."""
    runs = [make_run(tmp_path / f"s{i}", seed=i, linear=(97.0, 50.0)[i]) for i in range(2)]
    for run, score, epochs in ((runs[0], 51.0, 1), (runs[1], 96.0, 40)):
        files.append_line(
            run.eval_rows("linear"),
            files.read_lines(run.eval_rows("linear"))[0]
            | {"identity": "later", "metrics": {"top1": score}, "options": {"protocol": "msf", "epochs": epochs}},
        )
    means = [r for r in collect_records([run.root for run in runs]) if "n" in r and "linear" in r["metrics"]]
    assert [m["metrics"]["linear"] for m in means] == [pytest.approx(73.5)], "97 and 50 have the same options"


def test_scores_with_other_options_have_their_own_column(tmp_path, make_run):
    run = make_run(tmp_path / "demo")
    add_row(run, "linear", 100, {"top1": 50.0}, epochs=1)
    add_row(run, "linear", 100, {"top1": 96.0}, protocol="moco")
    add_row(run, "knn", 100, {"knn1": 1.0}, identity="k100")  # of rows with one identity the first counts
    (trained,) = [r["metrics"] for r in collect_records([run.root]) if r["step"] == 100]
    assert trained["linear"] == 97.2 and trained["linear(epochs=1)"] == 50.0
    assert trained["linear:moco"] == 96.0 and trained["1-NN"] == 88.1


def test_every_evaluation_has_a_column(tmp_path, make_run):
    """Known evaluations have the names of the papers; an unknown one needs no code for its column."""
    run = make_run(tmp_path / "demo", name=ROW, last=LAST)
    add_row(run, "svm", LAST, {"svm_map": 84.0}, protocol="oss", data="voc07")
    add_row(run, "lowshot", LAST, {"lowshot_k96": 81.0, "lowshot_k96_std": 0.2}, protocol="vissl", data="voc07")
    add_row(run, "detect", LAST, {"AP50": 82.0, "AP": 56.0}, protocol="voc_c4", data="voc0712")
    add_row(run, "detect", LAST, {"AP": 40.0, "AP_mask": 35.0}, protocol="coco_fpn_1x", data="coco17")
    for name, score in (("dtd", 73.0), ("caltech101", 92.0)):
        add_row(run, "transfer", LAST, {name: score}, protocol="logistic", sets=name, data=name)
    add_row(run, "transfer", LAST, {"transfer_mean10": 75.4}, protocol="msf", data="10 sets")
    add_row(
        run, "finetune", LAST, {"top1": 60.0, "top5": 80.0, "top1_best": 61.0}, protocol="bsim", data="imagenet_1pct"
    )
    add_row(run, "finetune", LAST, {"top1": 70.0}, protocol="swav", percent=10, data="imagenet_part")
    add_row(run, "knn", LAST, {"knn200_weighted": 66.0}, protocol="lightly")
    add_row(run, "probe", LAST, {"top1": 1.5, "top5": 2.5, "mean_rank": 3.5, "note": "text"}, protocol="new")
    _, trained = collect_records([run.root])
    names = trained["metrics"]
    assert set(names) == set(columns.sort_columns(names))
    for name in (
        "1-NN",
        "20-NN",
        "linear",
        "SVM mAP",
        "SVM:vissl 96-shot",
        "SVM:vissl 96-shot std",
        "detect AP50",
        "detect:coco_fpn_1x AP on coco17",
        "detect:coco_fpn_1x AP mask on coco17",
        "transfer DTD",
        "transfer Caltech-101",
        "transfer:msf mean of 10",
        "finetune 1 %",
        "finetune 1 % top-5",
        "finetune 1 %, best epoch",
        "finetune:swav 10 %",
        "knn:lightly 200-NN weighted",
        "probe:new",
        "probe:new top-5",
        "probe:new mean rank",
    ):
        assert name in names, name
    assert not any("note" in name for name in names) and trained["data"] == "digits", "one row per encoder"
    order = columns.sort_columns(reversed(names), wide=False)
    places = [
        order.index(name)
        for name in (
            "20-NN",
            "linear",
            "finetune 1 %",
            "SVM mAP",
            "SVM:vissl 96-shot",
            "transfer DTD",
            "detect AP",
            "probe:new",
        )
    ]
    assert places == sorted(places)
    assert not {"SVM:vissl 96-shot std", "finetune 1 %, best epoch", "20-NN top-5"} & set(order)
    published = {name: value["text"] for name, value in trained["published"].items()}
    assert published == {
        "1-NN": "62.0",
        "20-NN": "64.9",
        "linear": "72.4",
        "detect AP50": "82.2",
        "detect AP": "56.6",
        "transfer DTD": "73.2",
        "transfer Caltech-101": "92.7",
        "transfer:msf mean of 10": "75.5",
    }


def test_a_repeated_score_is_listed_once(tmp_path, make_run):
    """Options that a later version adds change the identity of a row, and must not give a second record."""
    run = make_run(tmp_path / "demo")
    add_row(run, "knn", 100, {"knn1": 88.1, "knn20": 95.26, "knn5": 90.0}, identity="again", feature_dtype="fp32")
    trained = [r for r in collect_records([run.root]) if r["step"] == 100]
    assert len(trained) == 1 and trained[0]["metrics"]["5-NN"] == 90.0


def test_published_values_are_shown_beside_runs_of_the_same_recipe_and_data(tmp_path, make_run):
    run = make_run(tmp_path / "right", name=ROW, last=LAST, knn=(61.9, 64.7), linear=72.1)
    untrained, trained = collect_records([run.root])
    texts = {column: anchor["text"] for column, anchor in trained["published"].items()}
    assert texts == {"1-NN": "62.0", "20-NN": "64.9", "linear": "72.4"}
    assert "MSF w/s (1M)" in trained["published"]["linear"]["source"] and untrained["published"] == {}
    text = page.format_measured(collect_records([run.root]))
    assert "| 61.9 (62.0) | 64.7 (64.9) | 72.1 (72.4) |" in text
    assert f"- {ROW}: MSF, " in text and text.count("row MSF w/s (1M)") == 1
    # none for a changed recipe, an unfinished run or another data set
    changed = make_run(tmp_path / "changed", name=ROW, last=LAST, schedule={"epochs": 10})
    record = collect_records([changed.root])[-1]
    assert record["changed"] == ["schedule.epochs=10"] and record["published"] == {}
    assert collect_records([make_run(tmp_path / "half", name=ROW, last=LAST, done=False).root])[-1]["published"] == {}
    other = make_run(tmp_path / "other", name=ROW, last=LAST, trained_on="imagenet")
    assert collect_records([other.root])[-1]["published"] == {}
    assert (
        collect_records([make_run(tmp_path / "own", name=ROW, bank={"placement": "replicated"}).root])[-1]["changed"]
        == []
    )
    assert collect_records([make_run(tmp_path / "small", name=ROW).root])[-1]["published"] == {}, (
        "trained on fewer images"
    )


def test_the_header_of_an_own_recipe_gives_published_values(tmp_path, make_run):
    run = make_run(tmp_path / "own", about={"published": {"linear_top1": 97.5, "a_word": 1.0}, "source": "us"})
    files.atomic_write(run.config, run.config.read_text().replace('"digits_msf"', '"mine"'))
    record = collect_records([run.root])[-1]
    assert record["changed"] == [] and record["recipe"] == "mine"
    assert record["published"] == {"linear": {"value": 97.5, "text": "97.5", "source": "us"}}
    assert "- mine: its own header" in page.format_measured([record])


def test_the_cost_is_a_lower_bound_if_an_attempt_has_no_end(tmp_path, make_run):
    run = make_run(tmp_path / "demo")
    files.append_line(run.attempts, {"attempt": 3, "event": "start", "world": 2, "time": 5000.0})
    assert collect_records([run.root])[1]["rank·h"] == "≥ 0.05"


def test_the_effective_training_time_is_exported(tmp_path, make_run):
    run = make_run(tmp_path / "demo")
    assert [record["effective"] for record in collect_records([run.root])] == ["", ""], "the journal has no times"
    files.append_line(run.journal, {"step": 100, "total_step_s": 90.0})
    record = collect_records([run.root])[1]
    assert 0 < record["effective"] < 1
    assert tables.to_csv([record]).splitlines()[1].endswith(f",{record['effective']}")


def test_tables_show_the_untrained_and_the_newest_encoder(tmp_path, make_run):
    run = make_run(tmp_path / "demo", done=False)
    add_row(run, "knn", 50, {"knn20": 91.0}, identity="half")
    records = collect_records([run.root])
    assert [r["encoder"] for r in records] == ["untrained", "step 50", "step 100"]
    assert [r["step"] for r in select_shown(records)] == [0, 100] and len(select_shown(records, steps=True)) == 3
    assert records[1]["rank·h"] == "" and records[2]["rank·h"] == 0.05


def test_the_first_encoder_of_a_run_that_starts_from_weights_is_not_called_untrained(tmp_path, make_run):
    run = make_run(tmp_path / "demo", model={"weights": "/a/file", "weights_sha256": "ab" * 32})
    assert [r["encoder"] for r in collect_records([run.root])] == ["given", "trained"]


def test_folders_without_results_are_refused_or_left_out(tmp_path, make_run, caplog):
    absent, empty, bare = (tmp_path / name for name in ("absent", "empty", "bare"))
    empty.mkdir()
    bare.mkdir()
    (bare / "config.yaml").write_text("seed: 0\n")
    run = make_run(tmp_path / "demo")

    def refused(*folders):
        with pytest.raises(EvalError) as caught:
            collect_records(list(folders))
        return caught.value

    for folder, got in ((absent, "no such folder"), (empty, "config.yaml"), (bare, "no results")):
        error = refused(folder)
        assert error.what == f"run folder {folder}" and got in error.got
    caplog.clear()
    assert len(collect_records([run.root, bare, run.root])) == 2  # each run counts once
    assert len(collect_records([run.root, empty])) == 2
    assert [Path(record.args[0]) for record in caplog.records] == [bare, empty]
    assert "config.yaml" in refused(empty, empty).got
    assert refused(run.root, absent).what == f"run folder {absent}"


# -- tables -------------------------------------------------------------------------------------------------


def test_csv_and_json_hold_every_record(tmp_path, make_run):
    run = make_run(tmp_path / "demo", name=ROW, last=LAST)
    add_row(run, "knn", 50, {"knn20": 91.0}, identity="half")
    records = collect_records([run.root])
    plain = render_records(records).splitlines()
    assert len(plain) == 3 and len({line.count("\t") for line in plain}) == 1
    rows = list(csv.DictReader(io.StringIO(render_records(records, style="csv"))))
    assert rows[2]["20-NN"] == "95.26" and rows[2]["linear, last epoch"] == "97.0" and rows[0]["linear"] == ""
    assert rows[2]["20-NN published"] == "64.9" and rows[1]["step"] == "50"
    parsed = json.loads(render_records(records, style="json"))
    assert parsed[2]["metrics"]["20-NN top-5"] == 99.0 and parsed[2]["fingerprint"] == "f"


@pytest.mark.parametrize("width", (200, 60))
def test_the_terminal_table_drops_constant_columns_and_is_transposed_if_narrow(tmp_path, make_run, width):
    records = collect_records([make_run(tmp_path / "demo").root])
    drawn = render_records(records, terminal=True, width=width)
    assert "95.3" in drawn and "untrained" in drawn and "resnet_tiny" not in drawn and "abc123" not in drawn
    by_rows = drawn.index("encoder") < drawn.index("20-NN") < drawn.index("untrained")
    assert by_rows == (width == 200), "a narrow terminal shows one column per encoder"


# -- RESULTS.md ---------------------------------------------------------------------------------------------


def test_results_md_of_this_repository_is_generated():
    """Its published part follows from the data files, and its measured rows are as the command wrote them."""
    text = (ROOT / "RESULTS.md").read_text()
    assert page.format_published() in text, "run `hpcssl results --published --write RESULTS.md`"
    kept = page.read_measured_rows(ROOT / "RESULTS.md")
    assert page.format_measured([], keep=kept) in text and len(kept) >= 4


def test_the_markdown_table_equals_the_golden_text(tmp_path, make_run):
    run = make_run(tmp_path / "demo")
    page.update_page(tmp_path / "RESULTS.md", collect_records([run.root]))
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Results\n") and GOLDEN in text


def test_only_the_part_between_the_markers_is_replaced(tmp_path, make_run):
    sheet = tmp_path / "RESULTS.md"
    sheet.write_text("# Mine\n\nPublished part.\n")
    run = make_run(tmp_path / "demo")
    page.update_page(sheet, collect_records([run.root]))
    with sheet.open("a") as file:
        file.write("\nNotes below.\n")
    add_row(run, "knn", 100, {"knn200": 93.0}, identity="later")
    page.update_page(sheet, collect_records([run.root]))
    text = sheet.read_text()
    assert text.startswith("# Mine\n\nPublished part.\n") and text.endswith("\nNotes below.\n")
    assert text.count(page.BEGIN) == 1 and "200-NN" in text and page.PUBLISHED_BEGIN not in text
    page.update_page(sheet, collect_records([run.root]))
    assert sheet.read_text() == text  # without new results nothing changes
    page.update_page(sheet, None, with_published=True)
    assert (
        page.format_published() in sheet.read_text()
        and page.format_measured(collect_records([run.root])) in sheet.read_text()
    )
    for broken in (text.replace(page.END, ""), text + page.END):
        sheet.write_text(broken)
        with pytest.raises(EvalError) as caught:
            page.update_page(sheet, collect_records([run.root]))
        assert caught.value.what == str(sheet) and sheet.read_text() == broken


def test_rows_of_other_runs_are_kept(tmp_path, make_run):
    sheet = tmp_path / "RESULTS.md"
    runs = [make_run(tmp_path / f"s|{i}", seed=i).root for i in range(3)]  # a bar in a name does not end a cell
    page.update_page(sheet, collect_records(runs[:2]))
    before = page.read_measured_rows(sheet)
    assert [row["run"] for row in before] == ["s|0"] * 2 + ["s|1"] * 2 + ["mean of s|0, s|1"] * 2
    add_row(RunDir(runs[1]), "svm", 100, {"svm_map": 70.0}, data="voc07")
    page.update_page(sheet, collect_records([runs[1], runs[2]]))
    after = page.read_measured_rows(sheet)
    assert [row["run"] for row in after] == ["s|0"] * 2 + ["s|1"] * 2 + ["s|2"] * 2 + ["mean of s|1, s|2"] * 2, (
        "the mean of a run that is named twice is computed again"
    )
    assert after[0] == before[0] | {"SVM mAP": ""} and after[3]["SVM mAP"] == "70.0"


def test_runs_of_two_sweeps_that_have_the_same_values_are_two(tmp_path, make_run):
    sheet = tmp_path / "RESULTS.md"
    for sweep, size in (("one", 512), ("two", 128)):
        run = make_run(tmp_path / sweep / "seed=0", bank={"size": size})
        page.update_page(sheet, collect_records([run.root]))
    rows = page.read_measured_rows(sheet)
    assert [(row["run"], row["changed"]) for row in rows if row["encoder"] == "trained"] == [
        ("one/seed=0", ""),
        ("two/seed=0", "bank.size=128"),
    ]


def test_rows_edited_by_hand_are_refused(tmp_path, make_run):
    sheet = tmp_path / "RESULTS.md"
    run = make_run(tmp_path / "demo")
    page.update_page(sheet, collect_records([run.root]))
    edited = sheet.read_text().replace("| 95.3 |", "| 98.3 |")
    sheet.write_text(edited)
    with pytest.raises(EvalError) as caught:
        page.update_page(sheet, collect_records([run.root]))
    assert caught.value.what == f"{sheet}, measured part"
    assert sheet.read_text() == edited


def test_contradictory_options_are_refused_and_published_values_printed(tmp_path, capsys):
    for options, got in (
        ({}, "no run folders"),
        ({"runs": ["a"], "as_csv": True, "as_json": True}, "--csv and --json"),
        ({"runs": ["a"], "published": True}, "--published and runs"),
        ({"published": True, "as_csv": True, "write": "w"}, "--published --write with"),
        ({"runs": ["a", "b"], "gallery": "g.png"}, "2 runs"),
        ({"runs": ["a"], "plots": "p", "write": "w"}, "a table and a picture"),
    ):
        with pytest.raises(ConfigError) as caught:
            main(**{"runs": []} | options)
        assert caught.value.what.startswith("hpcssl results") and got in caught.value.got
    main([], published=True, as_csv=True)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {
        "document": "BSIM",
        "source": "Table 5",
        "row": "SimSiam-WBSIM",
        "column": "linear_top1",
        "value": "70.8",
        "deviation": "",
        "difference": "0.8",
        "recipe": "simsiam_r50_ep200_wbsim",
    } in rows


def test_a_score_with_changed_options_has_no_published_column():
    from hpcssl.evals.linear.options import LinearOptions

    def column_of(**options):
        row = {"eval": "linear", "options": config.as_dict(LinearOptions(**options)), "metrics": {"top1": 50.0}}
        (column,) = columns.scores_by_column(row)
        return column, columns.strip_protocol(column)

    assert column_of(protocol="byol") == ("linear:byol", "linear") and column_of(seed=3) == ("linear", "linear")
    assert column_of(epochs=2) == ("linear(epochs=2)", "linear(epochs=2)")
    column, quantity = column_of(protocol="byol", epochs=2, train_batch=256)
    assert column == quantity == "linear:byol(epochs=2;train_batch=256)"


def test_a_length_that_counts_incomplete_batches_is_the_published_one(tmp_path, make_run):
    name, column = "nnclr_r50_ep1000", "linear"
    right = make_run(tmp_path / "right", name=name, last=312_784, linear=75.0)
    assert collect_records([right.root])[-1]["published"][column]["text"] == "75.4"
    whole = make_run(tmp_path / "whole", name=name, last=312_000, linear=75.0)
    assert collect_records([whole.root])[-1]["published"] == {}
