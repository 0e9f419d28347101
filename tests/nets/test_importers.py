"""Import of other projects' checkpoints: the features of the original network, and errors for other files."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.nets import importers, recognize, resnet
from hpcssl.nets.importers import WeightsSource
from hpcssl.nets.layouts import BY_NAME, LAYOUTS
from hpcssl.nets.resnet import Arch
from tests.nets import foreign_checkpoints

CASES = [
    pytest.param(name, write, id=write.__name__)
    for name, writes in foreign_checkpoints.CASES.items()
    for write in writes
]
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def encoder(seed, arch="resnet18"):
    """A random torchvision ResNet without fc, in eval mode, and its state.

    The tensors are views of two small tables, so that the files stay small.
    """
    draw = torch.Generator().manual_seed(seed)
    signed, positive = torch.randn(2_400_000, generator=draw) * 0.05, torch.rand(4000, generator=draw) + 0.5
    network = getattr(torchvision.models, arch)()
    network.fc = nn.Identity()
    state = network.state_dict()
    for at, (name, value) in enumerate(state.items()):
        if value.dtype.is_floating_point:
            table = positive if name.endswith(("running_var", "1.weight", "2.weight")) and value.ndim == 1 else signed
            state[name] = table[at : at + value.numel()].view(value.shape)
    network.load_state_dict(state)
    return network.eval(), state


@pytest.fixture(scope="module")
def nets():
    """(query, its state, target, its state), both ResNet-18."""
    return *encoder(0), *encoder(1)


@pytest.fixture(scope="module")
def features(nets):
    """Of ``X`` by the query and by the target."""
    with torch.no_grad():
        return nets[0](X), nets[2](X)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def assert_same_features(backbone, expected, x=X):
    assert torch.equal(backbone(x), expected(x))


@pytest.mark.parametrize("name, write", CASES)
def test_every_layout_gives_the_features_of_the_original_network(nets, features, tmp_path, name, write):
    _, q, _, t = nets
    tree = write(q, t)
    torch.save(tree, tmp_path / "file")
    for module in [module for module in sys.modules if module.partition(".")[0] == "mmengine"]:
        del sys.modules[module]  # reading needs no other project
    backbone, meta = importers.load(tmp_path / "file")
    assert torch.equal(backbone(X), features[0])
    assert meta["arch"] == Arch(arch="resnet18") and meta["size"] == 224 and meta["step"] is None
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    if write is not foreign_checkpoints.openselfsup_extracted:  # it has the keys of torchvision
        assert meta["format"] == meta["method"] == name
    for alias in BY_NAME[name].names:
        named = recognize.find_match(tree, "file", alias, None).tensors
        assert len(named) == len(without_counters(q)) and all(value is q[key] for key, value in named.items()), alias
    keys = " ".join(key for state in encoder_states(tree) for key in state)
    if any(prefix in keys for prefix in BY_NAME[name].encoders.get("target", ())):
        backbone, _ = importers.load(WeightsSource(tmp_path / "file", encoder="target"))
        assert torch.equal(backbone(X), features[1])
    else:
        with pytest.raises(EvalError) as caught:
            importers.load(WeightsSource(tmp_path / "file", encoder="target"))
        assert str(tmp_path / "file") in caught.value.what and "target encoder" in caught.value.got


def encoder_states(tree):
    """The dictionaries of the tree that hold the encoder's tensors."""
    if any(isinstance(value, torch.Tensor) and value.ndim == 4 for value in tree.values()):
        yield tree
    for value in tree.values():
        if isinstance(value, dict):
            yield from encoder_states(value)


def without_counters(q):
    return {name: value for name, value in q.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name, write", CASES)
def test_wrong_prefixes_missing_and_unused_keys_are_errors_that_list_the_keys(nets, name, write):
    _, q, _, t = nets

    def assert_refused(change, layout, in_missing, in_unused):
        tree = write(without_counters(q), without_counters(t))
        for state in list(encoder_states(tree)):
            change(state)
        with pytest.raises(EvalError) as caught:
            recognize.find_match(tree, "weights", layout, None)
        lists = re.fullmatch(r"missing keys \[(.*)\].* and unused keys \[(.*)\].*", caught.value.got)
        assert lists and in_missing in lists[1] and in_unused in lists[2], caught.value.got

    def rename(state):
        for key in list(state):
            state[f"wrong.{key}"] = state.pop(key)

    def remove(state):
        for key in [key for key, value in state.items() if value is q["layer3.1.bn2.running_mean"]]:
            del state[key]

    def add(state):
        for key in [key for key, value in state.items() if value is q["layer4.1.conv2.weight"]]:
            state[key.replace("conv2", "conv9")] = torch.ones(1)

    for layout in (name, None):
        assert_refused(rename, layout, "", "wrong.")
        assert_refused(remove, layout, ".1.", "")
        assert_refused(add, layout, "", "conv9")


def test_the_small_stems_of_other_projects(tmp_path):
    """lightly has no ReLU, solo-learn pads by 2. Keys below a bare ``backbone.`` fit several layouts: an error."""
    query, q = encoder(2)
    query.conv1, query.maxpool, relu = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), query.relu
    query.relu = nn.Identity()
    query.conv1.weight.data = q["conv1.weight"] = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(3))
    x = X[:, :, :16, :16]
    torch.save(foreign_checkpoints.lightly_generated(q, q), tmp_path / "lightly")
    backbone, meta = importers.load(tmp_path / "lightly")
    assert_same_features(backbone, query, x)
    assert meta["format"] == "lightly" and meta["arch"].stem == "small_linear" and meta["size"] == 32
    query.relu = relu
    assert not torch.allclose(backbone(x), query(x), rtol=1e-2)

    torch.save(foreign_checkpoints.solo_learn(q, q), tmp_path / "solo")
    backbone, meta = importers.load(tmp_path / "solo")
    assert meta["arch"].stem == "small_pad2" and meta["mean"] == [0.4914, 0.4822, 0.4465] and meta["size"] == 32
    query.conv1.padding = (2, 2)
    assert_same_features(backbone, query, x)
    assert query.conv1(x).shape[-1] == 18  # two pixels more than with padding 1

    torch.save({"state_dict": foreign_checkpoints.with_prefix("backbone.", q)}, tmp_path / "bare")
    with pytest.raises(EvalError) as caught:
        importers.load(tmp_path / "bare")
    layouts = ("mmselfsup", "lightly", "solo-learn")
    assert all(layout in caught.value.got and f"--layout {layout}" in caught.value.fix for layout in layouts)
    backbone, _ = importers.load(WeightsSource(tmp_path / "bare", layout="solo-learn"))
    assert_same_features(backbone, query, x)


def test_byol_of_deepmind_keeps_the_padding_of_haiku(tmp_path):
    query, q = encoder(4)
    torch.save({key: value for key, value in q.items() if "tracked" not in key}, tmp_path / "file")
    backbone, meta = importers.load(WeightsSource(tmp_path / "file", layout="byol-jax"))
    assert meta["arch"] == Arch(arch="resnet18", stem="imagenet_same")

    def padded(layer, inputs):  # per side: windows start every `stride` pixels, and the last one may reach over the end
        k, s = layer.kernel_size if isinstance(layer.kernel_size, int) else layer.kernel_size[0], 2
        n = inputs[0].shape[-1]
        over = max(s * ((n + s - 1) // s - 1) + k - n, 0)
        return F.pad(inputs[0], (over // 2, over - over // 2) * 2)

    for layer in (query.conv1, query.maxpool, query.layer2[0].conv1, query.layer3[0].conv1, query.layer4[0].conv1):
        layer.padding = 0 if layer is query.maxpool else (0, 0)
        layer.register_forward_pre_hook(padded)
    for size in (32, 29):
        assert_same_features(backbone, query, X[:, :, :size, :size])
    plain, meta = importers.load(tmp_path / "file")  # its keys are those of torchvision: without --layout it is read so
    assert meta["format"] == "torchvision"
    assert not torch.allclose(plain(X), query(X), rtol=1e-2)


def test_the_released_byol_of_yaox12_is_read_by_the_order_of_its_tensors(tmp_path):
    query, q = encoder(5, "resnet50")
    renamed = {f"n{at}.{key.rpartition('.')[2]}": value for at, (key, value) in enumerate(q.items())}
    assert len(renamed) == 318
    torch.save({"online_backbone": renamed, "predictor": {}}, tmp_path / "file")
    backbone, meta = importers.load(tmp_path / "file")
    assert_same_features(backbone, query)
    assert meta["format"] == "byol-yaox12-release" and meta["arch"].arch == "resnet50"
    swapped = dict(sorted(renamed.items()))
    with pytest.raises(EvalError) as caught:
        recognize.find_match({"online_backbone": swapped}, "weights", "byol-yaox12-release", None)
    assert "[n0.weight" in caught.value.got and "resnet50" in caught.value.expected


@pytest.mark.parametrize(
    "arch, in_got",
    [
        ("resnet152", "3-8-36-3"),
        ("wide_resnet50_2", "layer1.0.bn1.bias [128] instead of [64]"),
        ("vgg11", "[classifier.0.bias"),
    ],
)
def test_another_architecture_is_refused(arch, in_got):
    with torch.device("meta"):
        state = getattr(torchvision.models, arch)().state_dict()
    with pytest.raises(EvalError) as caught:
        recognize.find_match(state, "weights", None, None)
    assert caught.value.what.startswith("weights") and in_got in caught.value.got


def test_safetensors_files_and_half_precision_are_read(nets, tmp_path):
    q = nets[1]
    save_file(
        {f"module.{key}": value.half().clone() if value.is_floating_point() else value for key, value in q.items()},
        tmp_path / "file.safetensors",
    )
    backbone, _ = importers.load(tmp_path / "file.safetensors")
    assert all(p.dtype is torch.float32 for p in backbone.parameters())
    expected = {key: value.half().float() for key, value in q.items() if value.is_floating_point()}
    state = backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_unknown_keys_are_ignored_with_a_named_layout_unless_they_look_like_a_resnet(nets):
    _, q, _, t = nets
    tree = foreign_checkpoints.lightly_byol(q, t)
    tree["state_dict"]["my_head.weight"] = torch.ones(2)
    assert recognize.find_match(tree, "weights", "lightly", None).unknown == ["my_head.weight"]
    with pytest.raises(EvalError) as caught:
        recognize.find_match(tree, "weights", None, None)
    assert "unused keys [my_head.weight]" in caught.value.got
    tree["state_dict"]["my_net.layer1.0.conv1.weight"] = torch.ones(2)
    with pytest.raises(EvalError) as caught:
        recognize.find_match(tree, "weights", "lightly", None)
    assert "unused keys [my_net.layer1.0.conv1.weight, my_head.weight]" in caught.value.got


def test_two_keys_for_one_tensor_are_refused(nets):
    q = nets[1]
    tree = foreign_checkpoints.detectron2(q, q)
    tree["model"]["conv1.weight"] = torch.ones(64, 3, 7, 7)
    with pytest.raises(EvalError) as caught:
        recognize.find_match(tree, "weights", "detectron2", None)
    assert "unused keys [stem.conv1.weight]" in caught.value.got


def test_a_caffe_style_backbone_is_refused(nets, tmp_path):
    _, q, _, t = nets
    tree = foreign_checkpoints.openselfsup_moco(q, t)
    tree["meta"]["config"] = "backbone=dict(type='ResNet', style='caffe')"
    torch.save(tree, tmp_path / "file")
    with pytest.raises(EvalError) as caught:
        importers.load(tmp_path / "file")
    assert caught.value.what == f"weights {tmp_path / 'file'}"
    assert "style caffe" in caught.value.got and "style pytorch" in caught.value.expected


class Opener:
    """An object that opens a file when it is unpickled, as an attacker could put it into a checkpoint."""

    def __reduce__(self):
        return open, ("written", "w")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_unreadable_and_unsafe_files_are_refused_with_the_reason(nets, tmp_path, monkeypatch):
    _, q, _, _ = nets
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("<html>not found</html>")
    (tmp_path / "empty").touch()
    torch.save(q, tmp_path / "whole")
    (tmp_path / "short").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list")
    torch.save({"state_dict": q, "hook": Opener()}, tmp_path / "evil")
    torch.save(resnet.build(Arch(arch="resnet18")), tmp_path / "module")
    torch.save(Opener(), tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "scripted")
    cannot_read = "torch cannot read"
    for name, reason in {
        "folder": "a folder",
        "absent": "no such file",
        "text": "not a checkpoint of torch",
        "empty": "an empty file",
        "short": cannot_read,
        "list": "a list",
        "evil": r"\b(io|_io)\.open\b",
        "old": r"\b(io|_io)\.open\b",
        "module": r"\btorchvision\.models\.resnet\.ResNet\b",
        "scripted": cannot_read,
    }.items():
        with pytest.raises(EvalError) as caught:
            importers.load(tmp_path / name)
        assert caught.value.what == f"weights {tmp_path / name}" and re.search(reason, caught.value.got), name
    assert not Path("written").exists()


@pytest.mark.parametrize(
    "choice, in_fix",
    [
        ({"layout": "moko"}, "'moco'"),
        ({"encoder": "teacher"}, "online, target"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean"),
        ({"std": (0.2, 0.2)}, "std"),
        ({"std": (0.0, 0.2, 0.2)}, "std"),
        ({"size": 0}, "size to 224"),
    ],
)
def test_wrong_choices_are_refused(tmp_path, choice, in_fix):
    with pytest.raises(ConfigError) as caught:
        WeightsSource(tmp_path / "file", **choice)
    ((name, value),) = choice.items()
    assert caught.value.what == f"{name} of the weights" and in_fix in caught.value.fix
    assert caught.value.got == (repr(value) if isinstance(value, str) else str(np.array(value).tolist()))


def test_choices_replace_the_values_of_the_layout_and_enter_the_digest(nets, tmp_path):
    _, q, _, _ = nets
    torch.save(q, tmp_path / "file")
    chosen = WeightsSource(tmp_path / "file", mean=(0.5, 0.4, 0.3), size=96)
    _, meta = importers.load(chosen)
    assert meta["mean"] == [0.5, 0.4, 0.3] and meta["size"] == 96 and meta["std"] == [0.229, 0.224, 0.225]
    digests = {
        WeightsSource(tmp_path / "file").sha256,
        chosen.sha256,
        WeightsSource(tmp_path / "file", encoder="online").sha256,
    }
    assert len(digests) == 3 and WeightsSource(tmp_path / "file").sha256 == files.sha256_of_file(tmp_path / "file")


def test_every_layout_names_its_source_and_is_tested_here():
    assert all(layout.source and layout.encoders for layout in LAYOUTS)
    tested = set(foreign_checkpoints.CASES) | {"byol-jax", "byol-yaox12-release"}
    assert {layout.name for layout in LAYOUTS} == tested
    assert len(BY_NAME) == sum(len(layout.names) for layout in LAYOUTS)  # no name occurs twice
