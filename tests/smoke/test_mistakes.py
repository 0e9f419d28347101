"""Mistakes of a new user. Each gets one line that says what, what was got, what was expected and how to mend it, on
stderr, with the exit code 1 (what was asked for failed) or 2 (wrong usage), and changes nothing."""

import re
import shutil
import sys

import pytest

import data_prep.cli
import hpcssl.cli
import slurm.cli

SENTENCE = re.compile(r"^(hpcssl(?:-shard|-submit)?): (.+?): got (.+?); expected (.+?); to mend: (.+)$")
TINY = ["machine.devices=cpu", "views.size=16", "optim.batch=16", "schedule.steps=2", "bank.size=32"]


@pytest.fixture
def door(capsys, monkeypatch, tmp_path):
    """door("hpcssl train …") -> (exit code, stderr lines); runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    mains = {"hpcssl": hpcssl.cli.main, "hpcssl-submit": slurm.cli.main, "hpcssl-shard": data_prep.cli.main}

    def run(*words):
        with pytest.raises(SystemExit) as left:
            mains[words[0]](list(map(str, words[1:])))
        return left.value.code, [line for line in capsys.readouterr().err.splitlines() if line.strip()]

    return run


@pytest.fixture
def refused(door):
    """refused(code, part of the sentence, *words): the mistake gets its one line, with all four parts."""

    def check(code, part, *words):
        left, lines = door(*words)
        assert lines, f"nothing was said (exit code {left})"
        found = SENTENCE.match(lines[-1])
        assert found, f"not the four parts: {lines[-1]}"
        assert left == code, lines[-1]
        assert part in lines[-1], lines[-1]
        assert "Traceback" not in "\n".join(lines)
        assert all(len(x.strip()) > 1 for x in found.groups()[1:2] + found.groups()[3:])
        return found

    return check


@pytest.fixture
def train(shards):
    return lambda *more: ("hpcssl", "train", "digits_msf", "--run", "run", f"data.train={shards.root}", *TINY, *more)


def test_typo_in_a_recipes_name(refused):
    assert "did you mean 'digits_msf'" in refused(2, "no recipe", "hpcssl", "train", "digit_msf", "--run", "r")[5]


def test_typo_in_a_key(refused, train):
    assert "did you mean 'lr'" in refused(2, "optim.lrr", *train("optim.lrr=0.1"))[5]


def test_value_of_another_type(refused, train):
    refused(2, "optim.lr", *train("optim.lr=fast"))


def test_override_without_a_sign(refused, train):
    refused(2, "optim.lr", *train("optim.lr"))


def test_unknown_method(refused, train):
    refused(2, "method.name", *train("method.name=msff"))


def test_unknown_augmentation(refused, train):
    refused(2, "views.query", *train("views.query=strang"))


def test_secret_from_the_environment(refused, train):
    refused(2, "interpolation", *train("about.title=${oc.env:HOME}"))


def test_recipe_file_that_is_not_there(refused):
    refused(2, "no such file", "hpcssl", "train", "mine.yaml", "--run", "r")


def test_recipe_file_that_is_not_yaml(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.1\nmethod:")
    refused(2, "mine.yaml", "hpcssl", "train", "mine.yaml", "--run", "r")


def test_no_data(refused):
    refused(2, "data.train", "hpcssl", "train", "digits_msf", "--run", "r")


def test_wrong_path(refused):
    refused(1, "no such folder", "hpcssl", "train", "digits_msf", "--run", "r", "data.train=nowhere")


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(1, "it holds nothing", "hpcssl", "train", "digits_msf", "--run", "r", "data.train=empty")


def test_folder_above_the_shards(refused, tmp_path, shards):
    shutil.copytree(shards.root, tmp_path / "out" / "train")
    found = refused(1, "no index.json", "hpcssl", "train", "digits_msf", "--run", "r", "data.train=out")
    assert "OUT/train" in found[5]


def test_truncated_shard(refused, tmp_path, shards):
    shutil.copytree(shards.root, tmp_path / "cut")
    body = (tmp_path / "cut" / "shard-000002.tar").read_bytes()
    (tmp_path / "cut" / "shard-000002.tar").write_bytes(body[:5000])
    refused(1, "shard-000002.tar: got 5000 bytes", "hpcssl", "train", "digits_msf", "--run", "r", "data.train=cut")


def test_missing_shard(refused, tmp_path, shards):
    shutil.copytree(shards.root, tmp_path / "cut")
    (tmp_path / "cut" / "shard-000001.tar").unlink()
    refused(1, "shard-000001.tar: got no such file", "hpcssl", "train", "digits_msf", "--run", "r", "data.train=cut")


def test_batch_larger_than_the_data(refused, train):
    refused(1, "global batch", *train("optim.batch=64"))


def test_groups_that_do_not_tile_the_batch(refused, train):
    refused(1, "norm groups of 5", *train("model.norm=ghost", "model.norm_group=5"))


def test_gpu_where_there_is_none(refused, train, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(1, "no usable CUDA device", *train("machine.devices=gpu"))


def test_half_of_the_launchers_variables(refused, train, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    refused(1, "LOCAL_RANK, WORLD_SIZE", *train())


def test_world_that_does_not_divide_the_batch(start_ranks, shards, tmp_path):
    """Three ranks for a batch of 16: every rank says so and leaves."""
    command = ["-m", "hpcssl", "train", "digits_msf", "--run", str(tmp_path / "run"), f"data.train={shards.root}"]
    for said in start_ranks(3, command + TINY, expect=1):
        assert "3 processes: got a global batch of 16, which does not divide evenly over them" in said


def test_another_recipe_in_the_same_run_folder(refused, door, train, tmp_path):
    assert door(*train())[0] == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    found = refused(1, "optim.lr=0.2 (was 0.1)", *train("optim.lr=0.2"))
    assert "another --run" in found[5]
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    code, lines = door(*train())
    assert code == 0 and "is finished" in lines[-1], "the same command on a finished run says so"


def test_run_folder_that_is_a_file(refused, train, tmp_path):
    (tmp_path / "run").write_text("")
    refused(1, "run", *train())


def test_digest_of_nothing(refused, tmp_path):
    refused(1, "no such folder", "hpcssl", "digest", "nowhere")
    (tmp_path / "new").mkdir()
    refused(1, "no whole checkpoint", "hpcssl", "digest", "new")


def test_evaluation_of_unknown_name(refused, tmp_path):
    (tmp_path / "run").mkdir()
    assert "did you mean 'knn'" in refused(2, "'kn'", "hpcssl", "eval", "kn", "--run", "run")[5]


def test_evaluation_of_a_file_that_is_no_weights(refused, tmp_path, shards):
    (tmp_path / "w.safetensors").write_text("no")
    refused(1, "w.safetensors", "hpcssl", "eval", "knn", "--weights", "w.safetensors", "--train", shards.root, "--val",
            shards.root)


def test_evaluation_without_either(refused):
    refused(2, "--weights", "hpcssl", "eval", "knn")


def test_results_of_nothing(refused):
    refused(1, "nowhere", "hpcssl", "results", "nowhere")


def test_images_from_a_wrong_path(refused):
    refused(1, "nowhere", "hpcssl-shard", "images", "nowhere", "out")


def test_images_from_an_empty_folder(refused, tmp_path):
    (tmp_path / "src").mkdir()
    refused(1, "src", "hpcssl-shard", "images", "src", "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.tar"))


def test_image_that_is_empty(refused, tmp_path, encode, picture):
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (tmp_path / "src" / name).parent.mkdir(parents=True)
        (tmp_path / "src" / name).write_bytes(encode(picture(1)))
    (tmp_path / "src" / "dog" / "2.jpg").write_bytes(b"")
    refused(1, "dog/2.jpg", "hpcssl-shard", "images", "src", "out")


def test_typo_in_an_option_of_sbatch(refused, train):
    words = ("hpcssl-submit", *train()[2:], "--gpus-per-nod", "4")
    refused(2, "--gpus-per-nod", *words)


def test_time_that_sbatch_does_not_know(refused, train):
    refused(2, "--time", "hpcssl-submit", *train()[2:], "--local", "--time", "soon")


def test_option_that_is_ours(refused, train):
    refused(2, "--array", "hpcssl-submit", *train()[2:], "--array", "0-3")


def test_sbatch_where_there_is_no_slurm(refused, train, monkeypatch):
    monkeypatch.setenv("PATH", str(sys.executable).rsplit("/", 1)[0])
    refused(1, "sbatch", "hpcssl-submit", *train()[2:])


def test_missing_option_is_wrong_usage(door):
    code, lines = door("hpcssl", "train", "digits_msf")
    assert code == 2 and "--run" in lines[-1]
