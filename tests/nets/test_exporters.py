"""Export of encoders in the layouts of other projects, and `hpcssl export` and `hpcssl eval --weights`."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

import hpcssl
import hpcssl.cli
from hpcssl import files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.nets import importers, resnet, weights
from hpcssl.nets.exporters import LAYOUTS, crop_fraction, export
from hpcssl.nets.importers import WeightsSource
from hpcssl.nets.resnet import Arch
from tests.printed import printed_error
from tests.tolerances import rounding

META = {
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.1),
    "size": 16,
    "fingerprint": "f" * 64,
    "step": 7,
    "method": "msf",
}
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(backbone, file) of a random ResNet-18 in the layout of this project."""
    arch = Arch(arch="resnet18")
    backbone = resnet.build(arch)
    for buffer in backbone.buffers():
        if buffer.dtype.is_floating_point:  # running statistics that differ from a fresh network's
            buffer.add_(torch.linspace(0.1, 0.9, buffer.numel()))
    path = tmp_path_factory.mktemp("ours") / "w.safetensors"
    weights.save(path, backbone, arch, **META)
    return backbone.eval(), path


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    """The exported files of ``ours`` by (layout, file name)."""
    root, paths = tmp_path_factory.mktemp("exported"), {}
    for layout, name in (
        ("hpcssl", "o.safetensors"),
        ("torchvision", "o.pth"),
        ("torchvision", "o.safetensors"),
        ("timm", "folder"),
        ("detectron2", "o.pth"),
    ):
        path = paths[layout, name] = root / layout / name
        digest = export(ours[1], path, layout)
        assert digest == files.sha256_of_file(path / "model.safetensors" if path.is_dir() else path)
    return paths


def test_an_exported_file_is_imported_with_the_same_features(ours, exported):
    for (layout, name), path in exported.items():
        backbone, meta = importers.load(path / "model.safetensors" if name == "folder" else path)
        torch.testing.assert_close(backbone(X), ours[0](X), rtol=0, atol=0)
        assert meta["format"] == {"hpcssl": weights.FORMAT, "timm": "torchvision"}.get(layout, layout)
    assert exported["hpcssl", "o.safetensors"].read_bytes() == ours[1].read_bytes()


def test_torchvision_loads_the_layout_torchvision(ours, exported):
    theirs = torchvision.models.resnet18()
    theirs.fc = torch.nn.Identity()
    for name, read in (("o.safetensors", load_file), ("o.pth", lambda p: torch.load(p, weights_only=True))):
        state = read(exported["torchvision", name])
        assert theirs.load_state_dict(state, strict=False).unexpected_keys == []
        assert state.keys() == {key for key in theirs.state_dict() if "num_batches" not in key}
        torch.testing.assert_close(theirs.eval()(X), ours[0](X), rtol=0, atol=0)


def test_the_folder_for_timm_has_a_config_with_the_normalization(ours, exported):
    folder = exported["timm", "folder"]
    config = json.loads((folder / "config.json").read_text())
    pretrained = config["pretrained_cfg"]
    assert config["architecture"] == "resnet18" and config["num_features"] == 512
    assert (
        pretrained["mean"] == [0.5, 0.4, 0.3]
        and pretrained["input_size"] == [3, 16, 16]
        and pretrained["crop_pct"] == 1
    )
    with pytest.raises(EvalError) as caught:
        export(ours[1], folder, "timm")
    assert str(folder) in caught.value.what
    for size in range(65, 513):
        assert math.floor(size / crop_fraction(size)) == round(size * 256 / 224)  # as timm computes the resize


def test_the_file_for_detectron2_has_its_tensor_names_and_settings(ours, exported, tmp_path):
    tree = torch.load(exported["detectron2", "o.pth"], weights_only=True)
    assert tree["matching_heuristics"] is True and tree["__author__"] == "hpcssl"
    assert {
        "stem.conv1.weight",
        "stem.conv1.norm.running_var",
        "res2.0.conv1.weight",
        "res3.0.shortcut.weight",
        "res5.0.shortcut.norm.bias",
        "res5.1.conv2.norm.weight",
    } <= tree["model"].keys()
    assert len(tree["model"]) == len(weights.backbone_tensors(ours[0]))
    assert tree["config"]["MODEL.PIXEL_MEAN"] == pytest.approx([127.5, 102.0, 76.5])
    assert tree["config"]["INPUT.FORMAT"] == "RGB" and tree["config"]["MODEL.RESNETS.DEPTH"] == 18
    with pytest.raises(EvalError) as caught:
        export(ours[1], tmp_path / "d.pkl", "detectron2")
    assert ".pkl" in caught.value.got and ".pth" in caught.value.expected
    assert caught.value.fix == f"--to {tmp_path / 'd.pth'}"


@pytest.mark.parametrize("arch", [Arch(arch="resnet_tiny", stem="small"), Arch(arch="resnet18", stem="imagenet_same")])
def test_a_layout_that_cannot_hold_the_architecture_is_refused(tmp_path, arch):
    weights.save(tmp_path / "w", resnet.build(arch), arch, **META)
    for layout in LAYOUTS[1:]:
        with pytest.raises(EvalError) as caught:
            export(tmp_path / "w", tmp_path / "t.pth", layout)
        assert layout in caught.value.what and arch.arch in caught.value.got and arch.stem in caught.value.got
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "w", tmp_path / "t.pth", "torch_vision")
    assert (caught.value.what, caught.value.got) == ("--layout", "'torch_vision'")
    assert "'torchvision'" in caught.value.fix
    assert not (tmp_path / "t.pth").exists()


def test_another_projects_file_is_exported_in_the_layout_of_this_project(ours, tmp_path):
    torch.save(
        {"state_dict": {f"module.encoder_q.{key}": value for key, value in ours[0].state_dict().items()}},
        tmp_path / "moco.pth.tar",
    )
    export(WeightsSource(tmp_path / "moco.pth.tar", std=(0.5, 0.5, 0.5)), tmp_path / "w.safetensors")
    backbone, meta = weights.load(tmp_path / "w.safetensors")
    torch.testing.assert_close(backbone(X), ours[0](X), rtol=0, atol=0)
    assert meta == {
        "format": weights.FORMAT,
        "arch": Arch(arch="resnet18"),
        "mean": [0.485, 0.456, 0.406],
        "std": [0.5, 0.5, 0.5],
        "size": 224,
        "step": None,
        "fingerprint": "",
        "method": "moco",
    }


@pytest.mark.parametrize("size, resized", [(16, 16), (224, 256)])
def test_load_backbone_returns_the_transform_of_the_evaluations(ours, tmp_path, size, resized):
    torch.save(ours[0].state_dict(), tmp_path / "theirs.pth")
    for path, choices in (
        (ours[1], {"size": size}),
        (tmp_path / "theirs.pth", {"layout": "torchvision", "size": size, "mean": META["mean"], "std": META["std"]}),
    ):
        backbone, transform = hpcssl.load_backbone(path, **choices)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8))
        small = np.asarray(image.resize((resized, resized), Image.Resampling.BILINEAR))
        first = (resized - size) // 2
        x = torch.from_numpy(small[first : first + size, first : first + size].copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(META[k])[:, None, None] for k in ("mean", "std"))
        # two operations on each side, with two constants that are rounded, on numbers of up to 1 / 0.1
        tolerance = rounding(torch.float32, 5, scale=1 / min(META["std"]))
        torch.testing.assert_close(transform(image), (x - mean) / std, rtol=0, atol=tolerance)
        assert backbone(transform(image)[None]).shape == (1, 512)
        assert transform(image.convert("L")).shape == (3, size, size)


@pytest.fixture
def run_command(capsys):
    """run_command(arguments…) -> (exit code, stdout, the printed error or None)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            hpcssl.cli.main(list(map(str, arguments)))
        printed = capsys.readouterr()
        code = ended.value.code
        return code, printed.out, printed_error(printed.err) if code else None

    return run


def test_hpcssl_eval_reads_a_file_of_torchvision(ours, shards, tmp_path, run_command):
    torch.save(
        ours[0].state_dict() | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)},
        tmp_path / "resnet18-f37072fd.pth",
    )
    arguments = ("eval", "knn", "--weights", tmp_path / "resnet18-f37072fd.pth", "--devices", "cpu")
    arguments += ("--train", shards.root, "--val", shards.root)
    code, out, _ = run_command(*arguments, "--size", 32)
    assert code == 0 and out.startswith("knn\tresnet18-f37072fd.pth\t") and "knn1=" in out
    for more, expected_code, what, got, fix in (
        (("--layout", "moco"), 1, "read as moco", "missing keys [module.encoder_q.bn1.bias", "moco"),
        (("--layout", "moko"), 2, "layout of the weights", "'moko'", "'moco'"),
        (("--mean", "a,b,c"), 2, "--mean", "'a,b,c'", ""),
        (("--encoder", "target"), 1, "resnet18-f37072fd.pth", "target encoder", ""),
    ):
        code, out, error = run_command(*arguments, *more)
        assert (code, out) == (expected_code, "")
        assert what in error.what and got in error.got and fix in error.fix, error


def test_export_takes_a_run_or_a_weights_file(ours, exported, tmp_path, run_command):
    source = ("--weights", exported["detectron2", "o.pth"], "--from", "detectron2")
    code, out, _ = run_command("export", *source, "--to", tmp_path / "w", "--mean", "0.5,0.5,0.5")
    assert code == 0 and out == f"{tmp_path / 'w'}\n" and weights.load(tmp_path / "w")[1]["mean"] == [0.5, 0.5, 0.5]
    for options, what, got in (
        ((), "hpcssl export", ("--run", "--weights")),
        (("--run", tmp_path, "--size", "96"), "hpcssl", ("--size", "--weights")),
        (("--run", tmp_path, "--weights", ours[1]), "hpcssl export", ("--run", "--weights")),
    ):
        code, _, error = run_command("export", "--to", "x", *options)
        assert code == 2 and what in error.what and all(word in error.got for word in got), error
    assert not (tmp_path / "x").exists()
