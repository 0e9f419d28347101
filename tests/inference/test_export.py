"""``hpcssl export`` to ONNX and to a folder for timm and transformers; and each command leads on to the next one."""

import dataclasses
import importlib.util
import json
import multiprocessing
import shlex
from pathlib import Path

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from PIL import Image

import hpcssl
import hpcssl.cli
from hpcssl import config, files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.inference import embeddings, export, next_commands, onnx_file
from hpcssl.nets import importers
from hpcssl.nets.resnet import Arch
from hpcssl.run_dir import RunDir
from hpcssl.train.recipe import Recipe
from tests.tolerances import rounding
from tests.waiting import wait_for_exit

# options of a recipe that are empty by default and hold no path
TEXTS = ("title", "source", "weights_sha256", "second_query", "second_target")
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet_run(write_weights, tmp_path_factory):
    """A run with the weights of a ResNet-18 and a result row for them."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "r18")
    run.weights.mkdir(parents=True)
    path = write_weights(run.weights_at(5), Arch(arch="resnet18"), 32)
    recipe = put_paths_everywhere() | {"name": "mine", "optim": {"lr": 0.25}}
    files.atomic_write(run.config, config.to_yaml(recipe))
    texts = ("eval", "identity", "fingerprint", "method", "arch", "train", "val", "commit", "time")
    row = dict.fromkeys(texts, "knn") | {"weights_sha256": files.sha256_of_file(path), "step": 5, "options": {}}
    files.append_line(run.eval_rows("knn"), row | {"metrics": {"knn20": 61.25}, "val_name": "photos/val"})
    files.append_line(run.eval_rows("knn"), row | {"metrics": {"knn20": 11.5}, "weights_sha256": "another"})
    return run


def put_paths_everywhere():
    """Recipe values with a path in every option that is an empty text by default, if it is no other text."""
    recipe = {}
    for section in dataclasses.fields(Recipe):
        if section.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(section.default_factory):
            options = dataclasses.asdict(section.default_factory())
            empty = [name for name, value in options.items() if value == "" and name not in TEXTS]
            recipe[section.name] = dict.fromkeys(empty, "/home/someone/images")
    assert "train" in recipe["data"] and "weights" in recipe["model"]
    return recipe


@pytest.fixture(scope="module")
def folder(resnet_run, tmp_path_factory):
    """The folder for timm and transformers."""
    path = tmp_path_factory.mktemp("hf") / "mine"
    assert export.export(resnet_run.weights_at(5), path, "hf") == files.sha256_of_file(path / "model.safetensors")
    return path


def test_timm_loads_the_folder(resnet_run, folder):
    backbone, meta = importers.load(resnet_run.weights_at(5))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(model(X), backbone(X), rtol=0, atol=0)
    settings = timm.data.resolve_model_data_config(model)
    assert list(settings["input_size"]) == [3, 32, 32] and list(settings["mean"]) == meta["mean"]


def test_transformers_loads_the_folder_and_prepares_images_like_load_backbone(resnet_run, folder):
    backbone, transform = hpcssl.load_backbone(resnet_run.root)
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(model.eval()(X).pooler_output, backbone(X), rtol=0, atol=0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image)["pixel_values"][0]
    # both divide by 255, subtract the mean and divide by the deviation
    torch.testing.assert_close(pixels, transform(image), rtol=0, atol=rounding(torch.float32, 5, scale=1 / 0.2))


def test_the_card_has_scores_digests_and_the_recipe_without_paths(resnet_run, folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm" and "self-supervised-learning" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("knn20", 61.25, "photos/val")
    digests = [files.sha256_of_file(path) for path in (resnet_run.weights_at(5), folder / "model.safetensors")]
    for text in ("61.25", "lr: 0.25", "f" * 64, *digests):
        assert text in card.content, text
    everything = "".join((folder / name).read_text() for name in ("README.md", "config.json", "recipe.yaml"))
    assert "/home" not in everything and "11.5" not in everything
    assert json.loads((folder / "config.json").read_text())["architecture"] == "resnet18"


def test_what_a_layout_cannot_hold_is_refused(run, folder, tmp_path):
    for layout, target, kind in (
        ("hf", tmp_path / "tiny", EvalError),  # a stem that neither library has
        ("onnx", tmp_path / "tiny.pb", ConfigError),
        ("onxx", tmp_path / "tiny", ConfigError),
    ):
        with pytest.raises(kind) as caught:
            export.export(run.weights_at(5), target, layout)
        assert "onnx" in caught.value.fix
    with pytest.raises(EvalError):
        export.export(run.weights_at(5), folder, "hf")
    assert not list(tmp_path.iterdir())


def test_photographs_are_embedded_searched_and_exported_by_the_printed_commands(
    run, photos, tmp_path, run_command, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    code, _, err, _ = run_command("embed", "--run", run.root, photos, "--to", "e.parquet", "--skip-bad", 2)
    assert code == 0
    program, *words = next_words(err)
    code, _, err, _ = run_command(*words)
    assert (program, words[0], code) == ("hpcssl", "search", 0) and (tmp_path / "e-hits.png").exists(), err
    program, *words = next_words(err)
    # in a process of its own: after an export, no test of this process could fork and train
    process = multiprocessing.get_context("fork").Process(target=hpcssl.cli.main, args=(words,))
    process.start()
    code, err = wait_for_exit(process), capfd.readouterr().err
    assert (program, words[0], code) == ("hpcssl", "export", 0), err
    python, option, statements = next_words(err)
    exec(statements, {})
    assert (python, option, capfd.readouterr().out) == ("python", "-c", "(2, 128)\n")
    path = tmp_path / "tiny.onnx"
    backbone, transform = hpcssl.load_backbone(run.root)
    images = torch.rand(7, 3, 16, 16)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (computed,) = session.run(["features"], {"images": images.numpy()})
    expected = backbone(transform.transforms[-1](images)).numpy()  # the normalization is inside
    np.testing.assert_allclose(computed, expected, rtol=0, atol=onnx_file.TOLERANCE * np.abs(expected).max())
    notes = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert notes["weights_sha256"] == files.sha256_of_file(run.weights_at(5)) and notes["step"] == "5"
    other, meta = importers.load(run.weights_at(0))
    encoder = onnx_file.NormalizedEncoder(other, meta["mean"], meta["std"]).eval()
    assert onnx_file.measure_difference(path.read_bytes(), encoder, 16) > onnx_file.TOLERANCE
    monkeypatch.setattr(onnx_file, "_convert", lambda *_: path.read_bytes())  # an exporter that computes something else
    with pytest.raises(EvalError) as caught:
        export.export(run.weights_at(0), tmp_path / "wrong.onnx", "onnx")
    assert "wrong.onnx" in caught.value.what and not (tmp_path / "wrong.onnx").exists()


def test_a_file_is_not_named_for_another_layout(run, tmp_path):
    with pytest.raises(ConfigError) as caught:
        export.export(run.weights_at(0), tmp_path / "encoder.onnx")
    assert "--layout onnx" in caught.value.fix and not list(tmp_path.iterdir())


def test_printed_commands_need_only_what_is_installed(run, monkeypatch):
    def find(absent):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else object())

    metadata = {"weights": str(run.weights_at(5)), "step": 5, "weights_options": {}}
    monkeypatch.chdir(run.root)
    for absent, suffix in (("", ".parquet"), ("onnxscript", ".parquet"), ("pyarrow", ".npy")):
        find(absent)
        assert next_commands.embed_command(Path("."), Path("photos"))[-1] == f"tiny{suffix}"
        words = next_commands.export_commands(metadata)
        assert words[-1:] == ([] if absent == "onnxscript" else ["tiny.onnx"])
    with pytest.raises(ConfigError) as caught:
        embeddings.check_target(Path("e.csv"))
    assert caught.value.fix.endswith("e.npy")


def next_words(printed):
    (line,) = [line for line in printed.splitlines() if line.startswith("Next: ")]
    return shlex.split(line.removeprefix("Next: "))
