"""From a folder of shards to a recipe that trains: ``hpcssl init``, ``train --dry-run`` and ``show --views``."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hpcssl.cli
from hpcssl import config
from hpcssl import run as runs
from hpcssl.checkpoint.reader import latest_valid
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ROW, ShardSet
from hpcssl.errors import ConfigError, DataError, Stopped
from hpcssl.planning import dry_run, init, view_picture
from hpcssl.planning.data_summary import DataSummary, read_summary
from hpcssl.planning.fit import fit_recipe
from hpcssl.planning.machine import Machine
from hpcssl.planning.methods import METHODS, find_method
from hpcssl.planning.recipe_text import write_yaml
from hpcssl.run_dir import RunDir
from hpcssl.train import builders, world_sizes
from hpcssl.views.augment import augment_batch
from tests.forked import fork_rank, free_port, launcher_variables, wait_for_exit_code
from tests.printed import numbers_in, printed_error

TINY = ["model.arch=resnet_tiny", "views.size=16", "views.crops.size=8", "machine.devices=cpu", "machine.threads=1"]
TINY += [f"model.{head}={{hidden: [8], out: 8}}" for head in ("projector", "predictor")]
QUICK = {("photos", name) for name in ("msf", "cmsf_2q", "cmsf_semi", "cmsf_cross", "nnsiam", "swav", "simclr_bsim")}
QUICK |= {("small", "moco_v2")}


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_shards, picture, encode):
    """Folders of 40 images: photos and small ones with labels and a second modality, and photos without both."""
    root = tmp_path_factory.mktemp("data")

    def samples(count, height, labeled):
        rows = []
        for n in range(count):
            image = encode(picture(n, height, height + 20))
            second = [encode(picture(n + 50, height, height + 20)[:, :, 0].copy(), "PNG")] if labeled else []
            rows.append((f"p/{n:03d}", image, n % 2 if labeled else -1, *second))
        return rows

    for name, height, labeled in (("photos", 72, True), ("small", 24, True), ("plain", 72, False)):
        make_shards(root / name / "train", samples(40, height, labeled), classes=2 * labeled)
        make_shards(root / name / "val", samples(8, height, labeled), classes=2 * labeled)
    return root


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """command(*words, code=0) -> (stdout, stderr) of ``hpcssl``, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        with pytest.raises(SystemExit) as ended:
            hpcssl.cli.main(list(map(str, words)))
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return out, err

    return run


def summary(images, side, labeled=0, val=0):
    """A data set that exists in memory only."""

    def part(count):
        rows = np.zeros(count, ROW)
        rows["label"] = np.where(np.arange(count) < labeled, 0, -1)
        return ShardSet("/nowhere", {"shards": [], "classes": []}, rows)

    return DataSummary(part(images), part(val) if val else None, side, 1, min(labeled, images))


def compose(path, text, *overrides):
    path.write_text(text)
    return runs.compose(str(path), list(overrides))


@pytest.mark.parametrize(
    "kind, method",
    [
        pytest.param(kind, method, marks=() if (kind, method) in QUICK else pytest.mark.full)
        for kind in ("photos", "small")
        for method in METHODS
    ],
)
def test_the_recipe_of_each_method_trains(command, data, kind, method):
    out, _ = command("init", data / kind, "--method", method, "--gpus", 0)
    Path("mine.yaml").write_text(out)
    steps = ["schedule.warmup_epochs=0", f"schedule.steps={6 if method == 'swav' else 2}"]  # its first epoch is frozen
    command("train", "mine.yaml", "--run", "run", *TINY, *steps, "evals.knn_every_epochs=0")
    assert RunDir("run").finished is not None


SIZES = [(images, side) for images in (16, 40, 500, 60_000, 1_300_000) for side in (8, 28, 64, 500)]
FAMILIES = ("msf", "cmsf_cross", "moco_v2", "swav")  # what differs in heads, banks and norms


@pytest.mark.parametrize(
    "method, sizes, gpus",
    [(method, SIZES[at::7], at % 3) for at, method in enumerate(FAMILIES)]
    + [pytest.param(method, SIZES, at % 3, marks=pytest.mark.full) for at, method in enumerate(METHODS)],
)
def test_the_values_fit_each_other(tmp_path, method, sizes, gpus):
    choice = METHODS[method]
    for images, side in sizes:
        for val in (0, images // 2)[: 1 + (side == 28)]:
            fit = fit_recipe(summary(images, side, images, val), choice, Machine(gpus))
            recipe = compose(tmp_path / "r.yaml", write_yaml([], fit.base.name, fit.with_length(1, "")))
            built = builders.build_method(recipe)
            world_sizes.check(recipe, max(1, gpus), needs_whole_batch=built.needs_whole_batch)
            assert recipe.optim.batch * 4 <= images
            assert 16 <= recipe.views.size <= (224 if gpus else 64)
            assert recipe.optim.precision == ("bf16" if gpus else "fp32")
            assert recipe.data.val == ("/nowhere" if val else "")
            assert (recipe.evals.get("knn_every_epochs", 0) > 0) == bool(val)
            assert all(k <= images for k in recipe.evals["knn"].get("weighted_k", []) if val)
            if built.bank is not None:
                builders.check_bank_size(recipe, built.bank)
                assert recipe.bank.size <= max(images // 2, recipe.optim.batch)
                assert getattr(recipe.method, "k", 1) <= recipe.bank.size // 4
            assert recipe.method.name == method.split("_")[0]


@pytest.mark.parametrize("images", [100, 1_300_000])
def test_the_number_of_gpus_that_is_suggested_fits(images):
    with pytest.raises(ConfigError) as caught:
        fit_recipe(summary(images, 28), METHODS["msf"], Machine(5000))
    assert caught.value.what == "--gpus"
    most = numbers_in(caught.value.fix)[0]
    assert fit_recipe(summary(images, 28), METHODS["msf"], Machine(most)).batch == 2 * most


@pytest.mark.parametrize("gpus", [3, 6])
def test_the_batch_is_divided_evenly_over_any_number_of_gpus(tmp_path, gpus):
    fit = fit_recipe(summary(5000, 300), METHODS["msf"], Machine(gpus))
    recipe = compose(tmp_path / "r.yaml", write_yaml([], fit.base.name, fit.with_length(3, "")))
    world_sizes.check(recipe, gpus)
    assert recipe.optim.batch % gpus == 0 and recipe.machine.devices == "gpu"


def test_a_small_gpu_gets_a_smaller_batch():
    def batch(gpu_bytes):
        values = fit_recipe(summary(200_000, 500), METHODS["msf"], Machine(1, 1, int(gpu_bytes), 8)).values
        return next(value.value for value in values if value.key == "optim.batch")

    assert batch(4e9) < batch(8e9) < batch(80e9) == 256
    with pytest.raises(ConfigError):
        batch(1e8)


def test_knn_needs_a_label_for_each_image_of_both_sets(data, make_shards, picture, encode, tmp_path):
    assert read_summary(data / "photos").has_scores
    for root in (data / "photos" / "train", data / "plain"):
        found = read_summary(root)
        assert not found.has_scores and (found.side, found.images) == (72, 40)
        recipe = compose(tmp_path / "r.yaml", init.make_recipe(root, gpus=0).text)
        assert recipe.evals["knn_every_epochs"] == 0
        assert recipe.data.val == (str(root / "val") if root.name == "plain" else "")
        assert recipe.data.train == str(found.train.root)
    body = encode(picture(0))
    make_shards(tmp_path / "mixed" / "train", [(f"{n}", body, n % 2 - 1) for n in range(20)], classes=1)
    make_shards(tmp_path / "mixed" / "val", [("a", body, 0)], classes=1)
    found = read_summary(tmp_path / "mixed")
    assert found.labeled == 10 and not found.has_scores
    assert init.make_recipe(tmp_path / "mixed", method="cmsf_semi", gpus=0).text


def test_the_printed_recipe_runs_as_it_is_and_names_the_next_commands(command, data, tmp_path, monkeypatch):
    """Standard output goes to a file, as with ``hpcssl init DATA > mine.yaml``."""
    monkeypatch.chdir(tmp_path)
    saved = os.dup(1)
    with open("mine.yaml", "w") as file:
        os.dup2(file.fileno(), 1)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(sys, "stdout", file)
                init.print_result(init.make_recipe(data / "photos", gpus=0), data / "photos")
        finally:
            os.dup2(saved, 1)
            os.close(saved)
    text = Path("mine.yaml").read_text()
    assert 20 <= len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    assert all("#" in line for line in text.splitlines() if line.strip().startswith(("size:", "batch:", "epochs:")))
    out, err = command("init", data / "photos", "--gpus", 0)
    assert {line for line in text.splitlines() if "cores" not in line} >= {
        line for line in out.splitlines() if "cores" not in line
    }
    assert [line.strip() for line in err.splitlines()][-2:] == [
        "hpcssl train photos.yaml --run runs/photos --dry-run",
        "hpcssl train photos.yaml --run runs/photos",
    ]
    out, err = command("init", data / "photos", "--gpus", 4)
    assert err.splitlines()[-1].split() == (
        ["hpcssl-submit", "photos.yaml", "--run", "runs/photos", "--gpus-per-node", "4"]
    )


def test_the_file_of_a_redirection_is_named_in_the_next_commands(data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my recipe.yaml").touch()
    monkeypatch.setattr(Path, "readlink", lambda self: tmp_path / "my recipe.yaml")
    init.print_result(init.InitResult("", [], Machine(0)), data / "photos")
    assert capfd.readouterr().err.splitlines()[-1].split(" train ")[-1] == "'my recipe.yaml' --run 'runs/my recipe'"


def test_hours_are_filled_with_epochs_of_a_measured_step(command, data, monkeypatch, tmp_path):
    for name in ("WARM_UP_STEPS", "MEASURED_STEPS"):
        monkeypatch.setattr(dry_run, name, 1)
    reports = []
    real = init.dry_run
    monkeypatch.setattr(init, "dry_run", lambda recipe: reports.append(real(recipe)) or reports[-1])
    out, _ = command("init", data / "small", "--hours", 0.05, "--gpus", 0)
    recipe = compose(tmp_path / "r.yaml", out)
    assert reports[0].steps == 2 and reports[0].batch == recipe.optim.batch
    seconds = recipe.schedule.epochs * reports[0].steps_per_epoch * reports[0].step_s
    assert seconds <= 0.05 * 3600 * 0.9 and (seconds + reports[0].epoch_s > 0.05 * 3600 * 0.9)
    monkeypatch.setattr(init, "dry_run", lambda recipe: SimpleNamespace(step_s=1000.0))
    _, err = command("init", data / "small", "--hours", 1, "--gpus", 0, code=2)
    error = printed_error(err)
    assert error.what == "--hours" and numbers_in(error.fix)[0] * 3600 >= 5000
    monkeypatch.setattr(init, "dry_run", lambda recipe: SimpleNamespace(step_s=0.001))
    assert compose(tmp_path / "r.yaml", init.make_recipe(data / "small", gpus=0, hours=10).text).schedule.epochs == 1000


def test_names_of_methods_may_be_written_in_several_ways():
    assert find_method("MoCo-v2") is find_method("mocov2") is METHODS["moco_v2"]
    with pytest.raises(ConfigError) as caught:
        find_method("simclrr")
    assert "'simclr'" in caught.value.fix


def test_a_folder_of_data_sets_is_told_from_one_of_images(tmp_path, make_shards, encode, picture):
    make_shards(tmp_path / "data" / "mine" / "train", [("a", encode(picture(1)), 0)])
    with pytest.raises(DataError) as caught:
        read_summary(tmp_path / "data")
    assert caught.value.fix == f"name {tmp_path / 'data' / 'mine'}"


@pytest.mark.parametrize(
    "words, what, code",
    [
        (["photos", "--method", "dino"], "--method", 2),
        (["plain", "--method", "cmsf_sup"], "shard folder", 1),
        (["plain", "--method", "cmsf_semi"], "shard folder", 1),
        (["plain", "--method", "cmsf_cross"], "shard folder", 1),
        (["nowhere"], "DATA", 1),
        (["album"], "DATA", 1),
        (["few"], "shard folder", 1),
        (["photos", "--gpus", "30"], "--gpus", 2),
        (["photos", "--hours", "0", "--gpus", "0"], "--hours", 2),
        (["photos", "--hours", "nan", "--gpus", "0"], "--hours", 2),
        (["photos", "--hours", "inf", "--gpus", "0"], "--hours", 2),
        (["photos", "--hours", "2", "--gpus", "1"], "--hours", 2),
    ],
)
def test_what_cannot_work_is_refused(command, data, encode, picture, make_shards, monkeypatch, words, what, code):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if words[0] == "few" and not (data / "few").exists():
        make_shards(data / "few", [(f"{n}", encode(picture(n)), 0) for n in range(15)])
    if words[0] == "album":
        (data / "album").mkdir()
        (data / "album" / "a.jpg").write_bytes(encode(picture(1)))
    out, err = command("init", data / words[0], *words[1:], code=code)
    error = printed_error(err)
    assert out == "" and error.what.startswith(what) and error.fix


# -- dry run --------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A dry run of two steps, whose temporary folders must be gone in the end."""
    for name in ("WARM_UP_STEPS", "MEASURED_STEPS"):
        monkeypatch.setattr(dry_run, name, 1)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield
    assert list((tmp_path / "tmp").iterdir()) == []


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_a_dry_run_leaves_nothing_behind(command, data, quick, tmp_path):
    train = ["train", "digits_msf", "--run", "run", f"data.train={data / 'photos' / 'train'}", *TINY]
    train += ["optim.batch=8", "bank.size=32", "schedule.epochs=2"]
    out, _ = command(*train, "--dry-run")
    report = dict(line.split("\t") for line in out.splitlines())
    assert not Path("run").exists()
    assert numbers_in(report["steps taken"]) == [2] and numbers_in(report["training"])[0] == 10
    assert numbers_in(report["images per second"])[0] > 0
    # a run that goes on from a checkpoint
    command(*train, "machine.checkpoint_steps=5")
    done = RunDir("run").root / "done.json"
    saved, _ = latest_valid(RunDir("run"))
    size = sum(part.stat().st_size for part in saved.folder.glob("part-*"))
    before = snapshot(tmp_path / "run")
    out, _ = command(*train, "--dry-run")
    report = dict(line.split("\t") for line in out.splitlines())
    assert snapshot(tmp_path / "run") == before and done.exists()
    assert numbers_in(report["training"])[0] == 0
    assert numbers_in(report["checkpoint"])[0] * 1e6 == pytest.approx(size, rel=0.05)  # three digits, and the headers
    # a branch of it
    out, _ = command("train", "--from", "run@5", "--run", "new", "schedule.epochs=4", "--dry-run")
    report = dict(line.split("\t") for line in out.splitlines())
    assert numbers_in(report["training"])[0] == 15 and not Path("new").exists()


def test_a_dry_run_reports_the_warm_steps(data, monkeypatch, tmp_path):
    monkeypatch.setattr(dry_run, "MEASURED_STEPS", 3)
    overrides = [*TINY, "optim.batch=8", "bank.size=32", "schedule.epochs=9", f"data.train={data / 'photos' / 'train'}"]
    report = dry_run.dry_run(runs.compose("digits_msf", overrides))
    assert report.steps == dry_run.WARM_UP_STEPS + 3 and report.is_warm and np.isfinite(report.loss)
    assert report.epoch_s == pytest.approx(5 * report.step_s) and report.remaining_s == pytest.approx(
        45 * report.step_s
    )
    assert 0 < report.memory_bytes < report.device_bytes
    short = dry_run.dry_run(runs.compose("digits_msf", [*overrides[:-2], overrides[-1], "schedule.steps=1"]))
    assert short.steps == 1 and not short.is_warm


def test_a_dry_run_can_be_stopped(data, quick):
    overrides = [*TINY, "optim.batch=8", "bank.size=32", f"data.train={data / 'photos' / 'train'}"]
    with pytest.raises(Stopped):
        dry_run.dry_run(runs.compose("digits_msf", overrides), stop=lambda: True)


def test_a_dry_run_on_two_ranks_prints_once(data, quick, tmp_path):
    words = ["train", "digits_msf", "--run", str(tmp_path / "run"), f"data.train={data / 'photos' / 'train'}", *TINY]
    words += ["optim.batch=8", "bank.size=32", "--dry-run"]
    port = free_port()

    def work(stop):
        with open(1, "w", closefd=False) as log, contextlib.redirect_stdout(log):  # not what pytest captures
            try:
                hpcssl.cli.main(words)
            except SystemExit as ended:
                return ended.code

    logs = [tmp_path / f"rank-{rank}.log" for rank in range(2)]
    ranks = [fork_rank(log, launcher_variables(rank, 2, port), work) for rank, log in enumerate(logs)]
    assert [wait_for_exit_code(pid, 120) for pid in ranks] == [0, 0], "\n".join(log.read_text() for log in logs)
    assert "processes\t2" in logs[0].read_text() and "processes" not in logs[1].read_text()
    assert not (tmp_path / "run").exists()


# -- views ----------------------------------------------------------------------------------------------------


def test_the_drawn_views_are_those_of_the_training(data):
    shards = ShardSet.open(data / "photos" / "train")
    recipe = runs.compose("digits_nnclr_mc", ["views.query=strong", "views.target=byol_2", "seed=3"])
    plan = builders.build_view_plan(recipe, builders.build_method(recipe))
    indices = [3, 17, 8]
    with Reader(shards) as reader:
        images = [reader.read_images(index, 0)[1] for index in indices]
        columns = view_picture.make_columns(recipe, plan, indices, images, [])
        order = Order([shard.samples for shard in shards.shards], seed=3, global_batch=40, window="all")
        specs = [builders.view_spec(number, view) for number, view in enumerate(plan.views)]
        with Loader(reader, order, specs, seed=3) as loader:
            batch = next(iter(loader.iterate(0, 1)))
            rows = [batch.index.tolist().index(index) for index in indices]
            for column, view, cut, params in zip(columns, plan.views, batch.images, batch.params, strict=True):
                whole = augment_batch(cut, params, view.augmentation, mean=(0, 0, 0), std=(1, 1, 1))
                for image, row in zip(column.images, rows, strict=True):
                    expected = (whole[row].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
                    # one row alone may round differently in the last bit of a float
                    assert np.abs(image.astype(float) - expected).max() <= 1


def test_the_picture_depends_on_the_seed_alone(command, data, tmp_path, encode, picture):
    def draw(name, *words, source=data / "photos"):
        command("show", "digits_simclr", *words, "--views", source, "--to", name)
        return Path(name).read_bytes()

    first = draw("a.png")
    assert first == draw("b.png") and first != draw("c.png", "seed=1")
    assert first != draw("d.png", "mix.kind=cutmix")
    (tmp_path / "album" / "2020").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "album" / "2020" / f"{n}.jpg").write_bytes(encode(picture(n)))
    (tmp_path / "album" / "notes.txt").write_text("no image")
    assert draw("e.png", source=tmp_path / "album").startswith(b"\x89PNG")


def test_mixed_views_are_mixed_from_the_drawn_ones(data):
    recipe = runs.compose("digits_simclr_bsim", ["seed=2"])
    plan = builders.build_view_plan(recipe, builders.build_method(recipe))
    with Reader(ShardSet.open(data / "photos" / "train")) as reader:
        images = [reader.read_images(index, 0)[1] for index in range(4)]
    first, _, mixed, _ = view_picture.make_columns(recipe, plan, range(4), images, [])
    for row in range(4):
        own, partner = (mixed.images[row] == first.images[source] for source in (row, row ^ 1))
        assert (own | partner).all() and not own.all()


@pytest.mark.parametrize(
    "words, what",
    [
        (["digits_msf", "--views", "photos"], "hpcssl show"),
        (["digits_msf", "--to", "v.png"], "hpcssl show"),
        (["digits_msf", "--views", "photos", "--to", "v.jpg"], "--to v.jpg"),
        (["digits_msf", "--views", "nowhere", "--to", "v.png"], "DATA"),
        (["digits_msf", "--views", "empty", "--to", "v.png"], "DATA"),
        (["digits_cmsf_cross", "--views", "plain", "--to", "v.png"], "shard folder"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused(command, data, words, what):
    (data / "empty").mkdir(exist_ok=True)
    words = [str(data / word) if word in ("photos", "nowhere", "empty", "plain") else word for word in words]
    _, err = command("show", *words, code=1 if what in ("DATA", "shard folder") else 2)
    assert printed_error(err).what.startswith(what) and not list(Path.cwd().glob("v.*"))


def test_a_run_folder_is_shown_as_it_was_started(command, data, tmp_path):
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(config.to_yaml(runs.compose("digits_msf", ["views.size=20"])))
    out, _ = command("show", str(run.root))
    assert out == run.config.read_text()
    _, err = command("show", str(run.root), "views.size=24", code=2)
    assert "views.size=24" in printed_error(err).got
    picture = ["--views", str(data / "photos"), "--to", "v.png"]
    pictures = []
    for words in ([], ["views.size=24"]):
        command("show", str(run.root), *words, *picture)
        pictures.append(Path("v.png").read_bytes())
    assert pictures[0] != pictures[1], "other values change the picture"
    _, err = command("show", str(data), *picture, code=1)
    assert printed_error(err).what == f"folder {data}"
