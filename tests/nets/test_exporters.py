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
from hpcssl.nets.exporters import LAYOUTS, crop_of, export
from hpcssl.nets.importers import Source
from hpcssl.nets.resnet import Arch

META = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "size": 16, "fingerprint": "f" * 64, "step": 7,
        "method": "msf"}
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(backbone, file) of a random ResNet-18 in our own layout."""
    arch = Arch(arch="resnet18")
    backbone = resnet.build(arch)
    for buffer in backbone.buffers():
        if buffer.dtype.is_floating_point:  # running statistics that differ from a fresh network's
            buffer.add_(torch.linspace(0.1, 0.9, buffer.numel()))
    path = tmp_path_factory.mktemp("ours") / "w.safetensors"
    weights.save(path, backbone, arch, **META)
    return backbone.eval(), path


@pytest.fixture(scope="module")
def written(ours, tmp_path_factory):
    """Files of ``ours`` by (layout, name)."""
    root, made = tmp_path_factory.mktemp("written"), {}
    for layout, name in (("hpcssl", "o.safetensors"), ("torchvision", "o.pth"), ("torchvision", "o.safetensors"),
                         ("timm", "folder"), ("detectron2", "o.pth")):
        path = made[layout, name] = root / layout / name
        digest = export(ours[1], path, layout)
        assert digest == files.digest(path / "model.safetensors" if path.is_dir() else path)
    return made


def test_what_is_exported_is_imported(ours, written):
    for (layout, name), path in written.items():
        again, meta = importers.load(path / "model.safetensors" if name == "folder" else path)
        torch.testing.assert_close(again(X), ours[0](X), rtol=0, atol=0)
        assert meta["format"] == {"hpcssl": weights.FORMAT, "timm": "torchvision"}.get(layout, layout)
    assert written["hpcssl", "o.safetensors"].read_bytes() == ours[1].read_bytes()


def test_torchvision_loads_the_torchvision_layout(ours, written):
    theirs = torchvision.models.resnet18()
    theirs.fc = torch.nn.Identity()
    for name, read in (("o.safetensors", load_file), ("o.pth", lambda p: torch.load(p, weights_only=True))):
        state = read(written["torchvision", name])
        assert theirs.load_state_dict(state, strict=False).unexpected_keys == []
        assert state.keys() == {key for key in theirs.state_dict() if "num_batches" not in key}
        torch.testing.assert_close(theirs.eval()(X), ours[0](X), rtol=0, atol=0)


def test_the_folder_for_timm_tells_the_normalisation(ours, written):
    folder = written["timm", "folder"]
    config = json.loads((folder / "config.json").read_text())
    told = config["pretrained_cfg"]
    assert config["architecture"] == "resnet18" and config["num_features"] == 512
    assert told["mean"] == [0.5, 0.4, 0.3] and told["input_size"] == [3, 16, 16] and told["crop_pct"] == 1
    with pytest.raises(EvalError, match="that exists"):
        export(ours[1], folder, "timm")
    for size in range(65, 513):
        assert math.floor(size / crop_of(size)) == round(size * 256 / 224)  # as timm computes the resize


def test_the_file_for_detectron2_has_its_names_and_settings(ours, written, tmp_path):
    tree = torch.load(written["detectron2", "o.pth"], weights_only=True)
    assert tree["matching_heuristics"] is True and tree["__author__"] == "hpcssl"
    assert {"stem.conv1.weight", "stem.conv1.norm.running_var", "res2.0.conv1.weight", "res3.0.shortcut.weight",
            "res5.0.shortcut.norm.bias", "res5.1.conv2.norm.weight"} <= tree["model"].keys()
    assert len(tree["model"]) == len(weights.state_of(ours[0]))
    assert tree["config"]["MODEL.PIXEL_MEAN"] == pytest.approx([127.5, 102.0, 76.5])
    assert tree["config"]["INPUT.FORMAT"] == "RGB" and tree["config"]["MODEL.RESNETS.DEPTH"] == 18
    with pytest.raises(EvalError, match=r"the suffix \.pkl; expected \.pth.*--to .*d\.pth"):
        export(ours[1], tmp_path / "d.pkl", "detectron2")


@pytest.mark.parametrize("arch", [Arch(arch="resnet_tiny", stem="small"), Arch(arch="resnet18", stem="imagenet_same")])
def test_a_layout_that_cannot_hold_the_architecture_is_refused(tmp_path, arch):
    weights.save(tmp_path / "w", resnet.build(arch), arch, **META)
    for layout in LAYOUTS[1:]:
        with pytest.raises(EvalError, match=f"{arch.arch} with the {arch.stem} stem"):
            export(tmp_path / "w", tmp_path / "t.pth", layout)
    with pytest.raises(ConfigError, match="did you mean 'torchvision'"):
        export(tmp_path / "w", tmp_path / "t.pth", "torch_vision")
    assert not (tmp_path / "t.pth").exists()


def test_a_foreign_file_becomes_one_of_ours(ours, tmp_path):
    torch.save({"state_dict": {f"module.encoder_q.{key}": value for key, value in ours[0].state_dict().items()}},
               tmp_path / "moco.pth.tar")
    export(Source(tmp_path / "moco.pth.tar", std=(0.5, 0.5, 0.5)), tmp_path / "w.safetensors")
    backbone, meta = weights.load(tmp_path / "w.safetensors")
    torch.testing.assert_close(backbone(X), ours[0](X), rtol=0, atol=0)
    assert meta == {"format": weights.FORMAT, "arch": Arch(arch="resnet18"), "mean": [0.485, 0.456, 0.406],
                    "std": [0.5, 0.5, 0.5], "size": 224, "step": None, "fingerprint": "", "method": "moco"}


@pytest.mark.parametrize("size, resized", [(16, 16), (224, 256)])
def test_load_backbone_brings_the_evaluations_transform(ours, tmp_path, size, resized):
    torch.save(ours[0].state_dict(), tmp_path / "theirs.pth")
    for path, choices in ((ours[1], {"size": size}), (tmp_path / "theirs.pth", {
            "layout": "torchvision", "size": size, "mean": META["mean"], "std": META["std"]})):
        backbone, transform = hpcssl.load_backbone(path, **choices)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8))
        small = np.asarray(image.resize((resized, resized), Image.Resampling.BILINEAR))
        first = (resized - size) // 2
        x = torch.from_numpy(small[first:first + size, first:first + size].copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(META[k])[:, None, None] for k in ("mean", "std"))
        torch.testing.assert_close(transform(image), (x - mean) / std)
        assert backbone(transform(image)[None]).shape == (1, 512)
        assert transform(image.convert("L")).shape == (3, size, size)


@pytest.fixture
def door(capsys):
    """door(words…) -> (exit code, stdout, last line of stderr)."""
    def run(*words):
        with pytest.raises(SystemExit) as left:
            hpcssl.cli.main(list(map(str, words)))
        said = capsys.readouterr()
        return left.value.code, said.out, (said.err.strip().splitlines() or [""])[-1]
    return run


def test_one_command_evaluates_a_file_of_torchvision(ours, shards, tmp_path, door):
    torch.save(ours[0].state_dict() | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)},
               tmp_path / "resnet18-f37072fd.pth")
    words = ("eval", "knn", "--weights", tmp_path / "resnet18-f37072fd.pth", "--train", shards.root, "--val",
             shards.root, "--devices", "cpu")
    code, out, _ = door(*words, "--size", 32)
    assert code == 0 and out.startswith("knn\tresnet18-f37072fd.pth\t") and "knn1=" in out
    for more, left, told in ((("--layout", "moco"), 1, "read as moco: got missing keys [module.encoder_q.bn1.bias"),
                             (("--layout", "moko"), 2, "did you mean 'moco'"),
                             (("--mean", "a,b,c"), 2, "--mean: got 'a,b,c'"),
                             (("--encoder", "target"), 1, "no target encoder")):
        code, out, said = door(*words, *more)
        assert (code, out) == (left, "") and told in said, said


def test_export_takes_a_run_or_a_file(ours, written, tmp_path, door):
    code, out, _ = door("export", "--weights", written["detectron2", "o.pth"], "--from", "detectron2",
                        "--to", tmp_path / "w", "--mean", "0.5,0.5,0.5")
    assert code == 0 and out == f"{tmp_path / 'w'}\n" and weights.load(tmp_path / "w")[1]["mean"] == [0.5, 0.5, 0.5]
    for words, told in ((("--to", "x"), "both or neither of --run and --weights"),
                        (("--to", "x", "--run", tmp_path, "--size", "96"), "size without --weights"),
                        (("--to", "x", "--run", tmp_path, "--weights", ours[1]), "both or neither")):
        code, _, said = door("export", *words)
        assert code == 2 and told in said
    assert not (tmp_path / "x").exists()
