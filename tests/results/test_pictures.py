"""Learning curves and galleries: what is drawn, and that it is drawn."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.files import RunDir
from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch
from hpcssl.results import curves, gallery

STEPS, PER_EPOCH = 40, 10


def make_run(root, *, name="mine", seed=0, lr=0.1, steps=STEPS, start=0.0, knn=True, more=True):
    """A run folder of 4 epochs whose loss falls by 0.01 a step from ``start``."""
    run = RunDir(root)
    files.atomic_write(run.config, json.dumps({"name": name, "seed": seed, "optim": {"lr": lr}}))
    lines = [{"step": step, "epoch": (step - 1) / PER_EPOCH, "loss": start - step / 100}
             | ({"lr": lr, "spread": 0.8, "purity": 0.25} if more else {}) for step in range(1, steps + 1)]
    write_lines(run.journal, [*lines, {"step": steps, "eval": True, "knn1": 1.0}])
    if knn:
        write_lines(run.eval_rows("knn"), [{"step": step, "metrics": {
            "knn1": 50.0 + step, "knn20": 40.0 + step, "knn20_weighted": 41.0, "knn20_top5": 99.0, "one_label": 3.0}}
            for step in (0, 20, 40)])
    return run


def write_lines(path, lines):
    files.atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))


def size_of(path):
    with Image.open(path) as image:
        return image.format, image.size


def test_curves_have_the_run_s_own_numbers(tmp_path):
    found = curves.curves_of(make_run(tmp_path / "run"))
    assert set(found) == {"loss", "spread", "purity", "lr", "knn"} and set(found["knn"]) == {"20-NN", "1-NN"}
    epochs, loss = found["loss"][""]
    np.testing.assert_allclose(epochs, np.arange(1, STEPS + 1) / PER_EPOCH)
    np.testing.assert_allclose(loss, -np.arange(1, STEPS + 1) / 100)
    epochs, score = found["knn"]["20-NN"]
    assert epochs.tolist() == [0.0, 2.0, 4.0] and score.tolist() == [40.0, 60.0, 80.0]
    assert found["purity"][""][1][0] == 25.0


def test_a_long_run_is_averaged_and_a_bad_loss_is_a_gap(tmp_path):
    run = make_run(tmp_path / "run", steps=0, knn=False)
    lines = [{"step": s, "epoch": (s - 1) / 100, "loss": "nan" if s == 7 else float(s)} for s in range(1, 1001)]
    write_lines(run.journal, lines)
    epochs, loss = curves.curves_of(run)["loss"][""]
    assert len(loss) == curves.WINDOWS and np.isnan(loss[0]) and loss[1] == np.mean(range(11, 21))
    assert epochs[1] == pytest.approx(0.2)


def test_seeds_are_one_line_and_other_settings_another(tmp_path):
    runs = [make_run(tmp_path / "a", seed=0, start=1.0), make_run(tmp_path / "b", seed=1, start=3.0),
            make_run(tmp_path / "c", lr=0.2), make_run(tmp_path / "x" / "c", name="other")]
    groups = curves._groups({run: curves.curves_of(run) for run in runs})
    assert [len(g.curves["loss"][""]) for g in groups] == [2, 1, 1]
    assert len({g.label for g in groups}) == 3, "two folders of one name are told apart"
    epochs, mean, spread = curves._mean(groups[0].curves["loss"][""])
    np.testing.assert_allclose(mean, 2.0 - epochs / 10)
    np.testing.assert_allclose(spread, np.sqrt(2.0))
    short = (epochs[:5], mean[:5])
    assert len(curves._mean([groups[0].curves["loss"][""][0], short])[0]) == 5, "as far as both have come"


def test_pictures_are_written_whole(tmp_path, caplog):
    runs = [make_run(tmp_path / name, seed=seed, more=False).root for seed, name in enumerate("ab")]
    made = curves.draw([*runs, make_run(tmp_path / "new", steps=0, knn=False).root], tmp_path / "plots")
    assert "new has no steps yet" in caplog.text
    assert [path.name for path in made] == ["curves.png", "loss.png", "knn.png"]
    assert all(size_of(path)[0] == "PNG" for path in made)
    colours = {tuple(c) for c in np.asarray(Image.open(made[1]).convert("RGB")).reshape(-1, 3)}
    assert (0x00, 0x72, 0xB2) in colours
    with pytest.raises(EvalError, match="journal without steps"):
        curves.draw([make_run(tmp_path / "new", steps=0, knn=False).root], tmp_path / "plots")


# -- gallery ------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(tmp_path, make_shards):
    """A run with weights and shards of two classes, black and white: neighbours are of the query's class, but for two
    white images that the training set calls black."""
    def images(count, swapped=()):
        samples = []
        for i in range(count):
            body = io.BytesIO()
            shade = np.full((20, 30, 3), 250 * (i % 2) + i % 5, np.uint8)
            shade[i % 20, :, :] = 128
            Image.fromarray(shade).save(body, "PNG")
            samples.append((f"{i:03d}", body.getvalue(), (i % 2) ^ (i in swapped)))
        return samples

    sets = {"train": make_shards(tmp_path / "train", images(30, swapped=(1, 3))),
            "val": make_shards(tmp_path / "val", images(24))}
    run = RunDir(tmp_path / "run")
    files.atomic_write(run.config, json.dumps({
        "name": "mine", "data": {kind: str(shards.root) for kind, shards in sets.items()}}))
    arch = Arch(arch="resnet_tiny", stem="small")
    backbone = resnet.build(arch)
    resnet.initialise(backbone, 3)
    weights.save(run.weights_at(7), backbone, arch, mean=(0.5,) * 3, std=(0.5,) * 3, size=16, fingerprint="f" * 64,
                 step=7, method="msf")
    threads = torch.get_num_threads()
    yield run, sets
    torch.set_num_threads(threads)


def test_the_gallery_frames_right_and_wrong(seen, tmp_path, monkeypatch):
    run, _ = seen
    monkeypatch.setattr(gallery, "QUERIES", 3)
    path = gallery.draw(run.root, tmp_path / "gallery.png")
    kind, size = size_of(path)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    framed = {name: int((pixels == [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).all(1).sum())
              for name, (colour, _) in (("right", gallery.RIGHT), ("wrong", gallery.WRONG))}
    assert kind == "PNG" and size[0] > 1500 > size[1] and framed["right"] > framed["wrong"] > 0
    before = {file: file.read_bytes() for file in run.features.rglob("*.safetensors")}
    assert before, "features are kept for the evaluations"
    first = path.read_bytes()
    gallery.draw(run.root, path)
    assert path.read_bytes() == first and before == {file: file.read_bytes() for file in before}


def test_queries_are_drawn_by_lot_of_every_class():
    labels = np.repeat(np.arange(5), 20)
    chosen = gallery.drawn(labels, 5)
    assert sorted(labels[chosen]) == list(range(5)) and chosen.tolist() == gallery.drawn(labels, 5).tolist()
    more = gallery.drawn(labels, 12)
    assert len(set(more)) == 12 and more[:5].tolist() == chosen.tolist()
    assert len(gallery.drawn(labels[:3], 10)) == 3 and gallery.drawn(labels, 5, seed=1).tolist() != chosen.tolist()


def test_a_gallery_that_cannot_be_drawn_is_one_sentence(seen, tmp_path):
    run, sets = seen
    with pytest.raises(ConfigError, match=r"\.png"):
        gallery.draw(run.root, tmp_path / "gallery.jpg")
    run.weights_at(7).unlink()
    with pytest.raises(EvalError, match="weights"):
        gallery.draw(run.root, tmp_path / "gallery.png")
    files.atomic_write(run.config, json.dumps({"name": "mine", "data": {"train": str(sets["train"].root)}}))
    with pytest.raises(ConfigError, match="val shards"):
        gallery.draw(run.root, tmp_path / "gallery.png")
    assert not (tmp_path / "gallery.png").exists()
