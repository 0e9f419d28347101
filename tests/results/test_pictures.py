"""Pictures of ``hpcssl results``: the numbers in learning curves, and the images and frames of galleries."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.results import curves, gallery
from hpcssl.run_dir import RunDir
from tests import scored_runs

STEPS, PER_EPOCH = 40, 10


def make_run(root, *, name="mine", seed=0, lr=0.1, steps=STEPS, per_epoch=PER_EPOCH, start=0.0, knn=True, more=True):
    """Write a run folder of 4 epochs whose loss falls from ``start`` by 0.01 per step."""
    run = RunDir(root)
    files.atomic_write(run.config, json.dumps({"name": name, "seed": seed, "optim": {"lr": lr}}))
    lines = [
        {"step": step, "epoch": (step - 1) / per_epoch, "loss": start - step / 100}
        | ({"lr": lr, "spread": 0.8, "purity": 0.25} if more else {})
        for step in range(1, steps + 1)
    ]
    write_lines(run.journal, [*lines, {"step": steps, "eval": True, "knn1": 1.0}])
    if knn:
        write_lines(
            run.eval_rows("knn"),
            [
                {
                    "step": step,
                    "metrics": {
                        "knn1": 50.0 + step,
                        "knn20": 40.0 + step,
                        "knn20_weighted": 41.0,
                        "knn20_top5": 99.0,
                        "one_label": 3.0,
                    },
                }
                for step in (0, 20, 40)
            ],
        )
    return run


def write_lines(path, lines):
    files.atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))


def format_and_size(path):
    with Image.open(path) as image:
        return image.format, image.size


def test_curves_hold_the_numbers_of_the_journal_and_of_the_evaluations(tmp_path):
    series = curves.read_curves(make_run(tmp_path / "run"))
    assert set(series) == {"loss", "spread", "purity", "lr", "knn"} and set(series["knn"]) == {"20-NN", "1-NN"}
    epochs, loss = series["loss"][""]
    np.testing.assert_allclose(epochs, np.arange(1, STEPS + 1) / PER_EPOCH)
    np.testing.assert_allclose(loss, -np.arange(1, STEPS + 1) / 100)
    epochs, score = series["knn"]["20-NN"]
    assert epochs.tolist() == [0.0, 2.0, 4.0] and score.tolist() == [40.0, 60.0, 80.0]
    assert series["purity"][""][1][0] == 25.0


def test_a_long_run_is_averaged_in_windows_and_a_nonfinite_loss_is_a_gap(tmp_path):
    run = make_run(tmp_path / "run", steps=0, knn=False)
    lines = [{"step": s, "epoch": (s - 1) / 100, "loss": "nan" if s == 7 else float(s)} for s in range(1, 1001)]
    write_lines(run.journal, lines)
    epochs, loss = curves.read_curves(run)["loss"][""]
    assert len(loss) == curves.WINDOWS and np.isnan(loss[0]) and loss[1] == np.mean(range(11, 21))
    assert epochs[1] == pytest.approx(0.2)


def test_seeds_share_a_line_and_other_settings_have_their_own(tmp_path):
    runs = [
        make_run(tmp_path / "a", seed=0, start=1.0),
        make_run(tmp_path / "b", seed=1, start=3.0),
        make_run(tmp_path / "c", lr=0.2),
        make_run(tmp_path / "x" / "c", name="other"),
    ]
    groups = curves.group_by_seed({run: curves.read_curves(run) for run in runs})
    assert [len(g.curves["loss"][""]) for g in groups] == [2, 1, 1]
    assert len({g.label for g in groups}) == 3, "labels of two folders with the same name differ"
    epochs, mean, spread = curves.average_members(groups[0].curves["loss"][""])
    np.testing.assert_allclose(mean, 2.0 - epochs / 10)
    np.testing.assert_allclose(spread, np.sqrt(2.0))
    short = (epochs[:5], mean[:5])
    assert len(curves.average_members([groups[0].curves["loss"][""][0], short])[0]) == 5, (
        "up to the last epoch of the shorter one"
    )


def test_runs_of_different_lengths_share_all_epochs_of_the_shorter_one(tmp_path):
    assert 53 / (53 / 49) != 49, "the steps of an epoch cannot be read from this length without rounding"
    runs = [make_run(tmp_path / str(n), seed=n, steps=n, per_epoch=49, knn=False) for n in (54, 60)]
    (group,) = curves.group_by_seed({run: curves.read_curves(run) for run in runs})
    assert len(curves.average_members(group.curves["loss"][""])[0]) == 54


def test_pictures_are_png_files_and_runs_without_steps_are_logged(tmp_path, caplog):
    runs = [make_run(tmp_path / name, seed=seed, more=False).root for seed, name in enumerate("ab")]
    pictures = curves.draw_curves([*runs, make_run(tmp_path / "new", steps=0, knn=False).root], tmp_path / "plots")
    assert [record.args for record in caplog.records] == [(tmp_path / "new",)]
    assert [path.name for path in pictures] == ["curves.png", "loss.png", "knn.png"]
    assert all(format_and_size(path)[0] == "PNG" for path in pictures)
    colors = {tuple(c) for c in np.asarray(Image.open(pictures[1]).convert("RGB")).reshape(-1, 3)}
    assert (0x00, 0x72, 0xB2) in colors
    with pytest.raises(EvalError) as caught:
        curves.draw_curves([make_run(tmp_path / "new", steps=0, knn=False).root], tmp_path / "plots")
    assert caught.value.what == f"run folder {tmp_path / 'new'}" and "journal" in caught.value.got


# -- gallery ------------------------------------------------------------------------------------------------


@pytest.fixture
def scored_run(tmp_path, make_shards):
    """A run with weights of step 7, whose neighbors are known, and its shards."""
    sets = scored_runs.write_shards(tmp_path, make_shards)
    run = RunDir(tmp_path / "run")
    files.atomic_write(
        run.config, json.dumps({"name": "mine", "data": {kind: str(shards.root) for kind, shards in sets.items()}})
    )
    scored_runs.write_weights(run)
    threads = torch.get_num_threads()
    yield run, sets
    torch.set_num_threads(threads)


def test_the_gallery_frames_neighbors_of_the_same_and_of_other_classes(scored_run, tmp_path, monkeypatch):
    run, _ = scored_run
    monkeypatch.setattr(gallery, "QUERIES", 3)
    path = gallery.draw_gallery(run.root, tmp_path / "gallery.png")
    kind, size = format_and_size(path)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    framed = {
        name: int((pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(1).sum())
        for name, (color, _) in (("right", gallery.RIGHT), ("wrong", gallery.WRONG))
    }
    assert kind == "PNG" and size[0] > 1500 > size[1] and framed["right"] > framed["wrong"] > 0
    before = {file: file.read_bytes() for file in run.features.rglob("*.safetensors")}
    assert before, "features stay in the run folder, where evaluations reuse them"
    first = path.read_bytes()
    gallery.draw_gallery(run.root, path)
    assert path.read_bytes() == first and before == {file: file.read_bytes() for file in before}


def test_queries_are_drawn_at_random_from_every_class():
    labels = np.repeat(np.arange(5), 20)
    chosen = gallery.choose_queries(labels, 5)
    assert sorted(labels[chosen]) == list(range(5)) and chosen.tolist() == gallery.choose_queries(labels, 5).tolist()
    more = gallery.choose_queries(labels, 12)
    assert len(set(more)) == 12 and more[:5].tolist() == chosen.tolist()
    assert (
        len(gallery.choose_queries(labels[:3], 10)) == 3
        and gallery.choose_queries(labels, 5, seed=1).tolist() != chosen.tolist()
    )


def test_a_gallery_without_png_suffix_weights_or_validation_shards_is_refused(scored_run, tmp_path):
    run, sets = scored_run
    with pytest.raises(ConfigError) as suffix:
        gallery.draw_gallery(run.root, tmp_path / "gallery.jpg")
    assert suffix.value.what == f"--gallery {tmp_path / 'gallery.jpg'}" and suffix.value.expected == ".png"
    run.weights_at(7).unlink()
    with pytest.raises(EvalError) as weightless:
        gallery.draw_gallery(run.root, tmp_path / "gallery.png")
    assert weightless.value.what == f"weights of {run.root}"
    files.atomic_write(run.config, json.dumps({"name": "mine", "data": {"train": str(sets["train"].root)}}))
    with pytest.raises(ConfigError) as shards:
        gallery.draw_gallery(run.root, tmp_path / "gallery.png")
    assert shards.value.what == "evaluation knn, val shards"
    assert not (tmp_path / "gallery.png").exists()
