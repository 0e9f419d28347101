import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcssl import files
from hpcssl.errors import EvalError
from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch

TINY = Arch(arch="resnet_tiny", stem="small")
META = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "size": 16, "fingerprint": "f" * 64, "step": 7,
        "method": "msf"}


def made(arch=TINY, seed=0):
    backbone = resnet.build(arch)
    resnet.initialise(backbone, seed)
    for buffer in backbone.buffers():  # running statistics that differ from a fresh network's
        if buffer.dtype.is_floating_point:
            buffer.add_(torch.linspace(0.1, 0.9, buffer.numel()))
    return backbone.eval()


def test_round_trip_gives_the_same_features_and_header(tmp_path):
    backbone = made().to(memory_format=torch.channels_last)
    digest = weights.save(tmp_path / "w.safetensors", backbone, TINY, **META)
    again, meta = weights.load(tmp_path / "w.safetensors")
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), made()(x), rtol=0, atol=0)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert meta == {"format": weights.FORMAT, "arch": TINY, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1],
                    "size": 16, "fingerprint": "f" * 64, "step": 7, "method": "msf"}
    assert digest == files.digest(tmp_path / "w.safetensors")


def test_same_weights_same_bytes_and_other_weights_other_bytes(tmp_path):
    digests = [weights.save(tmp_path / str(i), made(), TINY, **META) for i in range(8)]
    assert len(set(digests)) == 1  # the library's own header order changes from call to call
    assert weights.save(tmp_path / "other", made(seed=1), TINY, **META) != digests[0]


@pytest.mark.parametrize("change, told", [
    (lambda t: t.pop("backbone.conv1.weight"), "missing keys [backbone.conv1.weight]"),
    (lambda t: t.update({"backbone.fc.bias": torch.zeros(3)}), "unused keys [backbone.fc.bias]"),
    (lambda t: t.update({"backbone.bn1.weight": torch.ones(31)}), "backbone.bn1.weight [31] instead of [32]"),
])
def test_wrong_keys_or_shapes_are_an_error_that_names_them(tmp_path, change, told):
    weights.save(tmp_path / "w", made(), TINY, **META)
    tensors = load_file(tmp_path / "w")
    change(tensors)
    (tmp_path / "wrong").write_bytes(weights.pack(tensors, header(tmp_path / "w")))
    with pytest.raises(EvalError) as error:
        weights.load(tmp_path / "wrong")
    assert told in str(error.value)


def test_a_wrong_prefix_shows_both_lists(tmp_path):
    weights.save(tmp_path / "w", made(), TINY, **META)
    tensors = {k.replace("backbone.", "module."): v for k, v in load_file(tmp_path / "w").items()}
    (tmp_path / "wrong").write_bytes(weights.pack(tensors, header(tmp_path / "w")))
    both = r"missing keys \[backbone\.bn1\.bias.*unused keys \[module\.bn1\.bias"
    with pytest.raises(EvalError, match=both):
        weights.load(tmp_path / "wrong")


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "pickle.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    weights.save(tmp_path / "w", made(), TINY, **META)
    (tmp_path / "short").write_bytes((tmp_path / "w").read_bytes()[:-100])
    for name, got in (("absent", "no such file"), ("pickle.pth", "cannot read"), ("short", "cannot read"),
                      ("foreign.safetensors", "the header")):
        with pytest.raises(EvalError, match=got):
            weights.load(tmp_path / name)


def header(path):
    body = path.read_bytes()
    size = int.from_bytes(body[:8], "little")
    return json.loads(body[8:8 + size])["__metadata__"]
