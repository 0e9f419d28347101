import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from hpcssl import files
from hpcssl.errors import ConfigError, EvalError
from hpcssl.nets import importers, recognise, resnet
from hpcssl.nets.importers import Source
from hpcssl.nets.layouts import BY_NAME, LAYOUTS
from hpcssl.nets.resnet import Arch

_spec = importlib.util.spec_from_file_location("others", Path(__file__).with_name("others.py"))
others = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(others)

CASES = [pytest.param(name, write, id=write.__name__) for name, writes in others.CASES.items() for write in writes]
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def encoder(seed, arch="resnet18"):
    """A random torchvision ResNet without fc, in eval mode, and its state: views of two small tables, so that files
    of it stay small."""
    draw = torch.Generator().manual_seed(seed)
    signed, positive = torch.randn(2_400_000, generator=draw) * 0.05, torch.rand(4000, generator=draw) + 0.5
    network = getattr(torchvision.models, arch)()
    network.fc = nn.Identity()
    state = network.state_dict()
    for at, (name, value) in enumerate(state.items()):
        if value.dtype.is_floating_point:
            table = positive if name.endswith(("running_var", "1.weight", "2.weight")) and value.ndim == 1 else signed
            state[name] = table[at:at + value.numel()].view(value.shape)
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
def same(found, expected, x=X):
    torch.testing.assert_close(found(x), expected(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, write", CASES)
def test_each_projects_file_gives_its_features(nets, features, tmp_path, name, write):
    _, q, _, t = nets
    tree = write(q, t)
    torch.save(tree, tmp_path / "file")
    for module in [module for module in sys.modules if module.partition(".")[0] == "mmengine"]:
        del sys.modules[module]  # reading needs no other project
    backbone, meta = importers.load(tmp_path / "file")
    torch.testing.assert_close(backbone(X), features[0], rtol=1e-6, atol=1e-6)
    assert meta["arch"] == Arch(arch="resnet18") and meta["size"] == 224 and meta["step"] is None
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    if write is not others.openselfsup_extracted:  # its names are torchvision's
        assert meta["format"] == meta["method"] == name
    for alias in BY_NAME[name].names:
        named = recognise.find(tree, "file", alias, None).tensors
        assert len(named) == len(_kept(q)) and all(value is q[key] for key, value in named.items()), alias
    keys = " ".join(key for state in _states(tree) for key in state)
    if any(prefix in keys for prefix in BY_NAME[name].encoders.get("target", ())):
        backbone, _ = importers.load(Source(tmp_path / "file", encoder="target"))
        torch.testing.assert_close(backbone(X), features[1], rtol=1e-6, atol=1e-6)
    else:
        with pytest.raises(EvalError, match="no target encoder"):
            importers.load(Source(tmp_path / "file", encoder="target"))


def _states(tree):
    """The dictionaries of the tree that hold the encoder's tensors."""
    if any(isinstance(value, torch.Tensor) and value.ndim == 4 for value in tree.values()):
        yield tree
    for value in tree.values():
        if isinstance(value, dict):
            yield from _states(value)


def _kept(q):
    return {name: value for name, value in q.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name, write", CASES)
def test_wrong_prefix_missing_and_surplus_keys_are_errors_that_show_both_lists(nets, name, write):
    _, q, _, t = nets

    def refused(change, told, layout):
        tree = write(_kept(q), _kept(t))
        for state in list(_states(tree)):
            change(state)
        with pytest.raises(EvalError) as error:
            recognise.find(tree, "weights", layout, None)
        said = str(error.value)
        assert "missing keys [" in said and "unused keys [" in said
        assert all(word in said for word in told), said

    def rename(state):
        for key in list(state):
            state[f"wrong.{key}"] = state.pop(key)

    def lose(state):
        for key in [key for key, value in state.items() if value is q["layer3.1.bn2.running_mean"]]:
            del state[key]

    def add(state):
        for key in [key for key, value in state.items() if value is q["layer4.1.conv2.weight"]]:
            state[key.replace("conv2", "conv9")] = torch.ones(1)

    for layout in (name, None):
        refused(rename, ["wrong."], layout)
        refused(lose, ["missing keys [", ".1."], layout)
        refused(add, ["conv9"], layout)


def test_small_stems_of_three_projects(tmp_path):
    """lightly's has no ReLU, solo-learn's pads by 2; a bare backbone. could be any, and is not guessed."""
    query, q = encoder(2)
    query.conv1, query.maxpool, relu = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), query.relu
    query.relu = nn.Identity()
    query.conv1.weight.data = q["conv1.weight"] = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(3))
    x = X[:, :, :16, :16]
    torch.save(others.lightly_generated(q, q), tmp_path / "lightly")
    backbone, meta = importers.load(tmp_path / "lightly")
    same(backbone, query, x)
    assert meta["format"] == "lightly" and meta["arch"].stem == "small_linear" and meta["size"] == 32
    query.relu = relu
    assert not torch.allclose(backbone(x), query(x), rtol=1e-2)

    torch.save(others.solo_learn(q, q), tmp_path / "solo")
    backbone, meta = importers.load(tmp_path / "solo")
    assert meta["arch"].stem == "small_pad2" and meta["mean"] == [0.4914, 0.4822, 0.4465] and meta["size"] == 32
    query.conv1.padding = (2, 2)
    same(backbone, query, x)
    assert query.conv1(x).shape[-1] == 18  # two pixels more than with padding 1

    torch.save({"state_dict": others.put("backbone.", q)}, tmp_path / "bare")
    with pytest.raises(EvalError, match=r"mmselfsup and lightly and solo-learn.*--layout mmselfsup or --layout li"):
        importers.load(tmp_path / "bare")
    backbone, _ = importers.load(Source(tmp_path / "bare", layout="solo-learn"))
    same(backbone, query, x)


def test_byol_of_deepmind_keeps_haikus_padding(tmp_path):
    query, q = encoder(4)
    torch.save({key: value for key, value in q.items() if "tracked" not in key}, tmp_path / "file")
    backbone, meta = importers.load(Source(tmp_path / "file", layout="byol-jax"))
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
        same(backbone, query, X[:, :, :size, :size])
    plain, meta = importers.load(tmp_path / "file")  # the keys are torchvision's, and so is what they are read as
    assert meta["format"] == "torchvision"
    assert not torch.allclose(plain(X), query(X), rtol=1e-2)


def test_the_released_byol_of_yaox12_goes_by_order(tmp_path):
    query, q = encoder(5, "resnet50")
    odd = {f"n{at}.{key.rpartition('.')[2]}": value for at, (key, value) in enumerate(q.items())}
    assert len(odd) == 318
    torch.save({"online_backbone": odd, "predictor": {}}, tmp_path / "file")
    backbone, meta = importers.load(tmp_path / "file")
    same(backbone, query)
    assert meta["format"] == "byol-yaox12-release" and meta["arch"].arch == "resnet50"
    swapped = dict(sorted(odd.items()))
    with pytest.raises(EvalError, match="no part of a ResNet"):
        recognise.find({"online_backbone": swapped}, "weights", "byol-yaox12-release", None)


@pytest.mark.parametrize("arch, told", [
    ("resnet152", "bottleneck blocks 3-8-36-3"), ("wide_resnet50_2", r"layer1.0.bn1.bias \[128\] instead of \[64\]"),
    ("vgg11", r"no part of a ResNet among the keys \[classifier.0.bias"),
])
def test_another_architecture_is_refused(arch, told):
    with torch.device("meta"):
        state = getattr(torchvision.models, arch)().state_dict()
    with pytest.raises(EvalError, match=told):
        recognise.find(state, "weights", None, None)


def test_safetensors_and_half_precision_are_read(nets, tmp_path):
    q = nets[1]
    save_file({f"module.{key}": value.half().clone() if value.is_floating_point() else value
               for key, value in q.items()}, tmp_path / "file.safetensors")
    backbone, _ = importers.load(tmp_path / "file.safetensors")
    assert all(p.dtype is torch.float32 for p in backbone.parameters())
    expected = {key: value.half().float() for key, value in q.items() if value.is_floating_point()}
    found = backbone.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_keys_that_a_named_layout_does_not_know_are_left_out_unless_they_are_a_resnets(nets):
    _, q, _, t = nets
    tree = others.lightly_byol(q, t)
    tree["state_dict"]["my_head.weight"] = torch.ones(2)
    assert recognise.find(tree, "weights", "lightly", None).strange == ["my_head.weight"]
    with pytest.raises(EvalError, match=r"unused keys \[my_head.weight\]"):
        recognise.find(tree, "weights", None, None)
    tree["state_dict"]["my_net.layer1.0.conv1.weight"] = torch.ones(2)
    with pytest.raises(EvalError, match=r"unused keys \[my_net.layer1.0.conv1.weight, my_head.weight\]"):
        recognise.find(tree, "weights", "lightly", None)


def test_two_keys_for_one_tensor_are_not_a_choice(nets):
    q = nets[1]
    tree = others.detectron2(q, q)
    tree["model"]["conv1.weight"] = torch.ones(64, 3, 7, 7)
    with pytest.raises(EvalError, match=r"unused keys \[stem.conv1.weight\]"):
        recognise.find(tree, "weights", "detectron2", None)


def test_a_caffe_style_backbone_is_refused(nets, tmp_path):
    _, q, _, t = nets
    tree = others.openselfsup_moco(q, t)
    tree["meta"]["config"] = "backbone=dict(type='ResNet', style='caffe')"
    torch.save(tree, tmp_path / "file")
    with pytest.raises(EvalError, match="style caffe, whose blocks stride elsewhere"):
        importers.load(tmp_path / "file")


class Opener:
    """What an attacker would put into a file."""

    def __reduce__(self):
        return open, ("made", "w")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_files_that_cannot_be_read_are_told_in_one_sentence(nets, tmp_path, monkeypatch):
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
    for name, told in {"folder": "a folder", "absent": "no such file", "text": "no checkpoint of torch",
                       "empty": "an empty file", "short": "torch cannot read", "list": "got a list",
                       "evil": r"an object of (io|_io).open", "old": r"an object of (io|_io).open",
                       "module": "an object of torchvision.models.resnet.ResNet",
                       "scripted": "torch cannot read"}.items():
        with pytest.raises(EvalError, match=told):
            importers.load(tmp_path / name)
    assert not Path("made").exists()


@pytest.mark.parametrize("choice, told", [
    ({"layout": "moko"}, "did you mean 'moco'"), ({"encoder": "teacher"}, "online or target"),
    ({"mean": (123.7, 116.3, 103.5)}, "divide values on the scale 0-255"), ({"std": (0.2, 0.2)}, "three numbers"),
    ({"std": (0.0, 0.2, 0.2)}, "three numbers"), ({"size": 0}, "a side in pixels"),
])
def test_choices_that_cannot_be_meant(tmp_path, choice, told):
    with pytest.raises(ConfigError, match=told):
        Source(tmp_path / "file", **choice)


def test_choices_replace_the_layouts_and_enter_the_digest(nets, tmp_path):
    _, q, _, _ = nets
    torch.save(q, tmp_path / "file")
    chosen = Source(tmp_path / "file", mean=(0.5, 0.4, 0.3), size=96)
    _, meta = importers.load(chosen)
    assert meta["mean"] == [0.5, 0.4, 0.3] and meta["size"] == 96 and meta["std"] == [0.229, 0.224, 0.225]
    digests = {Source(tmp_path / "file").sha256, chosen.sha256, Source(tmp_path / "file", encoder="online").sha256}
    assert len(digests) == 3 and Source(tmp_path / "file").sha256 == files.digest(tmp_path / "file")


def test_every_row_says_where_it_was_read_and_is_tried_here():
    assert all(row.read and row.encoders for row in LAYOUTS)
    tried = set(others.CASES) | {"byol-jax", "byol-yaox12-release"}
    assert {row.name for row in LAYOUTS} == tried
    assert len(BY_NAME) == sum(len(row.names) for row in LAYOUTS)  # no name twice
