"""Mistakes of new users.

Each is answered by one line on stderr that names the subject, the value, what was expected and a fix. The exit code is
1 (the command failed) or 2 (wrong usage), and no file is changed.
"""

import shutil
import sys

import pytest

import data_prep.cli
import hpcssl.cli
import slurm.cli
from tests.printed import numbers_in, printed_error

TINY = ["machine.devices=cpu", "views.size=16", "optim.batch=16", "schedule.steps=2", "bank.size=32"]


@pytest.fixture
def run_command(capsys, monkeypatch, tmp_path):
    """run_command("hpcssl", "train", ...) -> (exit code, lines on stderr); runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    mains = {"hpcssl": hpcssl.cli.main, "hpcssl-submit": slurm.cli.main, "hpcssl-shard": data_prep.cli.main}

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            mains[words[0]](list(map(str, words[1:])))
        return caught.value.code, [line for line in capsys.readouterr().err.splitlines() if line.strip()]

    return run


@pytest.fixture
def refused(run_command):
    """refused(exit code, *words) -> the parts of the error line, which is the last line that the command prints."""

    def check(exit_code, *words):
        code, lines = run_command(*words)
        text = "\n".join(lines)
        error = printed_error(text)
        assert code == exit_code, text
        assert error.program == words[0]
        assert lines[-1].startswith(f"{error.program}: {error.what}: "), text
        assert "Traceback" not in text
        assert all(len(part.strip()) > 1 for part in (error.what, error.expected, error.fix)), error
        return error

    return check


@pytest.fixture
def train(shards):
    """train(*overrides) -> the words of a small training."""
    return lambda *more: ("hpcssl", "train", "digits_msf", "--run", "run", f"data.train={shards.root}", *TINY, *more)


def test_misspelled_recipe_name(refused):
    error = refused(2, "hpcssl", "train", "digit_msf", "--run", "r")
    assert "'digit_msf'" in error.what and "'digits_msf'" in error.fix


def test_misspelled_key(refused, train):
    error = refused(2, *train("optim.lrr=0.1"))
    assert error.what.endswith("optim.lrr") and "'lrr'" in error.got
    assert "'optim'" in error.expected and "'lr'" in error.fix


def test_value_of_another_type(refused, train):
    error = refused(2, *train("optim.lr=fast"))
    assert error.what.endswith("optim.lr") and "'fast'" in error.got and "Float" in error.got


def test_override_without_an_equals_sign(refused, train):
    error = refused(2, *train("optim.lr"))
    assert "'optim.lr'" in error.what and "optim.lr=" in error.fix


def test_unknown_method(refused, train):
    error = refused(2, *train("method.name=msff"))
    assert error.what.endswith("method.name") and error.got == "'msff'" and "'msf'" in error.fix


def test_unknown_augmentation(refused, train):
    error = refused(2, *train("views.query=strang"))
    assert error.what == "views.query" and error.got == "'strang'" and "strong" in error.fix


def test_interpolation_of_an_environment_variable(refused, train):
    error = refused(2, *train("about.title=${oc.env:HOME}"))
    assert error.what.endswith("about.title") and "${oc.env:HOME}" in error.got


def test_question_marks_which_omegaconf_replaces_by_the_default(refused, train):
    error = refused(2, *train("optim.lr=???"))
    assert error.what.endswith("optim.lr") and "???" in error.got and "leave out the key" in error.fix


def test_missing_recipe_file(refused):
    error = refused(2, "hpcssl", "train", "mine.yaml", "--run", "r")
    assert error.what.endswith("mine.yaml") and "no such file" in error.got and "hpcssl recipes" in error.fix


def test_recipe_file_with_invalid_yaml(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.1\nmethod:")
    error = refused(2, "hpcssl", "train", "mine.yaml", "--run", "r")
    assert error.what.endswith("mine.yaml") and "line 2, column 7" in error.got and "YAML" in error.expected


def test_missing_training_data(refused):
    error = refused(2, "hpcssl", "train", "digits_msf", "--run", "r")
    assert error.what == "data.train" and "data.train=" in error.fix and "hpcssl-shard" in error.expected


def test_wrong_data_path(refused, tmp_path):
    error = refused(1, "hpcssl", "train", "digits_msf", "--run", "r", "data.train=nowhere")
    assert str(tmp_path / "nowhere") in error.what and "no such folder" in error.got
    assert "data.train" in error.fix


def test_empty_data_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(1, "hpcssl", "train", "digits_msf", "--run", "r", "data.train=empty")
    assert str(tmp_path / "empty") in error.what
    assert "index.json" in error.got and "nothing" in error.got


def test_folder_above_the_shards(refused, tmp_path, shards):
    shutil.copytree(shards.root, tmp_path / "out" / "train")
    error = refused(1, "hpcssl", "train", "digits_msf", "--run", "r", "data.train=out")
    assert str(tmp_path / "out") in error.what
    assert "index.json" in error.got and "train" in error.got and "OUT/train" in error.fix


def test_truncated_shard(refused, tmp_path, shards):
    shutil.copytree(shards.root, tmp_path / "copy")
    path = tmp_path / "copy" / "shard-000002.tar"
    body = path.read_bytes()
    path.write_bytes(body[:5000])
    error = refused(1, "hpcssl", "train", "digits_msf", "--run", "r", "data.train=copy")
    assert str(path) in error.what
    assert numbers_in(error.got) == [5000] and numbers_in(error.expected) == [len(body)]


def test_missing_shard(refused, tmp_path, shards):
    shutil.copytree(shards.root, tmp_path / "copy")
    path = tmp_path / "copy" / "shard-000001.tar"
    path.unlink()
    error = refused(1, "hpcssl", "train", "digits_msf", "--run", "r", "data.train=copy")
    assert str(path) in error.what and "no such file" in error.got


def test_batch_larger_than_the_data(refused, train):
    error = refused(1, *train("optim.batch=64"))
    assert "global batch" in error.what and "optim.batch" in error.fix
    assert numbers_in(error.got) == [64, 40] and numbers_in(error.expected) == [40]


def test_norm_groups_that_do_not_divide_the_batch(refused, train):
    error = refused(1, *train("model.norm=ghost", "model.norm_group_size=5"))
    assert numbers_in(error.what) == [1] and numbers_in(error.got)[:2] == [5, 16]
    assert "norm groups" in error.got and "model.norm_group_size" in error.fix
    assert numbers_in(error.fix) == [2, 4, 8, 16]


def test_gpu_on_a_machine_without_one(refused, train, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = refused(1, *train("machine.devices=gpu"))
    assert error.what == "machine.devices=gpu" and "CUDA" in error.got and "machine.devices=cpu" in error.fix


def test_incomplete_variables_of_a_launcher(refused, train, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    error = refused(1, *train())
    assert "LOCAL_RANK, WORLD_SIZE" in error.got and "torchrun" in error.fix


def test_world_size_that_does_not_divide_the_batch(start_ranks, shards, tmp_path):
    """Three ranks for a batch of 16: every rank prints the error and exits."""
    command = ["-m", "hpcssl", "train", "digits_msf", "--run", str(tmp_path / "run"), f"data.train={shards.root}"]
    for output in start_ranks(3, command + TINY, exit_code=1):
        error = printed_error(output)
        assert error.what == "3 processes" and numbers_in(error.got) == [16]
        assert numbers_in(error.expected) == [1, 2, 4, 8] and "optim.batch" in error.fix


def test_another_recipe_in_the_same_run_folder(refused, run_command, train, tmp_path):
    assert run_command(*train())[0] == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    error = refused(1, *train("optim.lr=0.2"))
    assert str(tmp_path / "run") in error.what
    assert "optim.lr=0.2 (before: 0.1)" in error.got and "--run" in error.fix
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    code, lines = run_command(*train())
    assert code == 0 and "is finished" in " ".join(lines), (
        "the same command on a finished run reports that it is finished"
    )


def test_run_folder_that_is_a_file(refused, train, tmp_path):
    (tmp_path / "run").write_text("")
    error = refused(1, *train())
    assert error.what == str(tmp_path / "run") and "move it away" in error.fix


def test_run_folder_that_holds_shards(refused, tmp_path, shards):
    data = shutil.copytree(shards.root, tmp_path / "data")
    before = sorted(data.iterdir())
    error = refused(2, "hpcssl", "train", "digits_msf", "--run", data, f"data.train={data}", *TINY)
    assert str(data) in error.what and "shard folder" in error.got and "runs/data" in error.fix
    assert sorted(data.iterdir()) == before


def test_digest_without_a_checkpoint(refused, tmp_path):
    error = refused(1, "hpcssl", "digest", "--run", "nowhere")
    assert "nowhere" in error.what and "no such folder" in error.got
    (tmp_path / "new").mkdir()
    error = refused(1, "hpcssl", "digest", "--run", "new")
    assert "new" in error.what and "a run" in error.got
    (tmp_path / "new" / "config.yaml").write_text("name: new\n")
    error = refused(1, "hpcssl", "digest", "--run", "new")
    assert "new" in error.what and "checkpoint" in error.got


def test_unknown_evaluation(refused, tmp_path):
    (tmp_path / "run" / "weights").mkdir(parents=True)
    error = refused(2, "hpcssl", "eval", "kn", "--run", "run")
    assert error.got == "'kn'" and "'knn'" in error.fix


def test_evaluation_of_a_file_without_weights(refused, tmp_path, shards):
    (tmp_path / "w.safetensors").write_text("no")
    words = ("--weights", "w.safetensors", "--train", shards.root, "--val", shards.root)
    assert "w.safetensors" in refused(1, "hpcssl", "eval", "knn", *words).what


def test_evaluation_without_run_and_weights(refused):
    error = refused(2, "hpcssl", "eval", "knn")
    assert error.what == "hpcssl eval" and "--run" in error.got and "--weights" in error.got


def test_results_of_a_missing_run(refused, tmp_path):
    assert str(tmp_path / "nowhere") in refused(1, "hpcssl", "results", "nowhere").what


def test_images_from_a_wrong_path(refused):
    assert "nowhere" in refused(1, "hpcssl-shard", "images", "nowhere", "out").what


def test_images_from_an_empty_folder(refused, tmp_path):
    (tmp_path / "src").mkdir()
    assert str(tmp_path / "src") in refused(1, "hpcssl-shard", "images", "src", "out").what
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.tar"))


def test_empty_image(refused, tmp_path, encode, picture):
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (tmp_path / "src" / name).parent.mkdir(parents=True)
        (tmp_path / "src" / name).write_bytes(encode(picture(1)))
    (tmp_path / "src" / "dog" / "2.jpg").write_bytes(b"")
    error = refused(1, "hpcssl-shard", "images", "src", "out")
    assert "dog/2.jpg" in error.got and "--skip-bad 1" in error.fix


def test_misspelled_option_of_sbatch(refused, train):
    error = refused(2, "hpcssl-submit", *train()[2:], "--gpus-per-nod", "4")
    assert error.what.endswith("--gpus-per-nod") and "--gpus-per-node" in error.fix


def test_invalid_time_limit(refused, train):
    error = refused(2, "hpcssl-submit", *train()[2:], "--local", "--time", "soon")
    assert error.what.endswith("--time") and error.got == "'soon'"


def test_option_of_sbatch_that_is_not_allowed(refused, train):
    error = refused(2, "hpcssl-submit", *train()[2:], "--array", "0-3")
    assert error.what.endswith("--array") and "0-3" in error.got


def test_submission_without_slurm(refused, train, monkeypatch):
    monkeypatch.setenv("PATH", str(sys.executable).rsplit("/", 1)[0])
    error = refused(1, "hpcssl-submit", *train()[2:])
    assert "sbatch" in error.got and "--local" in error.fix


def test_missing_option_is_wrong_usage(run_command):
    code, lines = run_command("hpcssl", "train", "digits_msf")
    assert code == 2 and "--run" in lines[-1]
