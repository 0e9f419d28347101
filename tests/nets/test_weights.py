"""The weights files of this project: a round trip, equal bytes for equal weights, and strict loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcssl import files
from hpcssl.errors import EvalError
from hpcssl.nets import resnet, tensor_file, weights
from hpcssl.nets.resnet import Arch

TINY = Arch(arch="resnet_tiny", stem="small")
META = {
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.1),
    "size": 16,
    "fingerprint": "f" * 64,
    "step": 7,
    "method": "msf",
}


def build_backbone(arch=TINY, seed=0):
    backbone = resnet.build(arch)
    resnet.initialize(backbone, seed)
    for buffer in backbone.buffers():  # running statistics that differ from a fresh network's
        if buffer.dtype.is_floating_point:
            buffer.add_(torch.linspace(0.1, 0.9, buffer.numel()))
    return backbone.eval()


def test_round_trip_gives_the_same_features_and_header(tmp_path):
    backbone = build_backbone().to(memory_format=torch.channels_last)
    digest = weights.save(tmp_path / "w.safetensors", backbone, TINY, **META)
    loaded, meta = weights.load(tmp_path / "w.safetensors")
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), build_backbone()(x), rtol=0, atol=0)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert meta == {
        "format": weights.FORMAT,
        "arch": TINY,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "size": 16,
        "fingerprint": "f" * 64,
        "step": 7,
        "method": "msf",
    }
    assert digest == files.sha256_of_file(tmp_path / "w.safetensors")


def test_equal_weights_give_equal_bytes_and_other_weights_other_bytes(tmp_path):
    digests = [weights.save(tmp_path / str(i), build_backbone(), TINY, **META) for i in range(8)]
    assert len(set(digests)) == 1  # the library's own header order changes from call to call
    assert weights.save(tmp_path / "other", build_backbone(seed=1), TINY, **META) != digests[0]


@pytest.mark.parametrize(
    "change, in_got",
    [
        (lambda t: t.pop("backbone.conv1.weight"), "missing keys [backbone.conv1.weight]"),
        (lambda t: t.update({"backbone.fc.bias": torch.zeros(3)}), "unused keys [backbone.fc.bias]"),
        (lambda t: t.update({"backbone.bn1.weight": torch.ones(31)}), "backbone.bn1.weight [31] instead of [32]"),
    ],
)
def test_wrong_keys_or_shapes_are_an_error_that_names_them(tmp_path, change, in_got):
    weights.save(tmp_path / "w", build_backbone(), TINY, **META)
    tensors = load_file(tmp_path / "w")
    change(tensors)
    (tmp_path / "wrong").write_bytes(tensor_file.pack(tensors, header(tmp_path / "w")))
    with pytest.raises(EvalError) as caught:
        weights.load(tmp_path / "wrong")
    assert caught.value.what == f"weights {tmp_path / 'wrong'}" and in_got in caught.value.got


def test_a_wrong_prefix_lists_the_missing_and_the_unused_keys(tmp_path):
    weights.save(tmp_path / "w", build_backbone(), TINY, **META)
    tensors = {k.replace("backbone.", "module."): v for k, v in load_file(tmp_path / "w").items()}
    (tmp_path / "wrong").write_bytes(tensor_file.pack(tensors, header(tmp_path / "w")))
    with pytest.raises(EvalError) as caught:
        weights.load(tmp_path / "wrong")
    assert "missing keys [backbone.bn1.bias" in caught.value.got
    assert "unused keys [module.bn1.bias" in caught.value.got


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "pickle.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    weights.save(tmp_path / "w", build_backbone(), TINY, **META)
    (tmp_path / "short").write_bytes((tmp_path / "w").read_bytes()[:-100])
    for name, got in (
        ("absent", "no such file"),
        ("pickle.pth", "cannot read"),
        ("short", "cannot read"),
        ("foreign.safetensors", "the header"),
    ):
        with pytest.raises(EvalError) as caught:
            weights.load(tmp_path / name)
        assert caught.value.what == f"weights {tmp_path / name}" and got in caught.value.got


def header(path):
    body = path.read_bytes()
    size = int.from_bytes(body[:8], "little")
    return json.loads(body[8 : 8 + size])["__metadata__"]
