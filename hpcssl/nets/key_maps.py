"""How keys of other projects' ResNets become torchvision's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

import torch

from hpcssl.nets import resnet

NAME = re.compile(
    r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
"""A key of a torchvision ResNet, without ``fc``."""

KeyMap = Callable[[Sequence[str]], dict[str, str]]
"""Maps the keys below a prefix, in the file's order, to torchvision's names. Unknown keys are left out."""


def to_detectron2(name: str) -> str:
    """Detectron2's key for a torchvision ResNet's (tools/convert-torchvision-to-d2.py:43-52 at 02b5c4e2)."""
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _from_detectron2(key: str) -> str:
    key = key.removeprefix("stem.").replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    key = re.sub(r"\bconv(\d)\.norm", r"bn\1", key)
    return re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", key)


def _rename_each(rename: Callable[[str], str]) -> KeyMap:
    """A key map that renames each key independently and keeps those that become torchvision's names."""
    return lambda keys: {key: name for key in keys if NAME.fullmatch(name := rename(key))}


def _rename_children(**modules: str) -> KeyMap:
    """A key map for an ``nn.Sequential`` of a ResNet's children, whose numbers become the children's names."""
    names = {number.removeprefix("_"): name for number, name in modules.items()}

    def rename(key: str) -> str:
        number, dot, rest = key.partition(".")
        return names.get(number, number) + dot + rest.replace("shortcut.", "downsample.")

    return _rename_each(rename)


def rename_by_position(keys: Sequence[str]) -> dict[str, str]:
    """Give the keys of a file with unknown names ResNet-50's names by their position.

    Returns:
        The names; none unless the number of keys and the last word of each key agree with ResNet-50's.
    """
    names = _resnet50_names()
    if len(keys) != len(names):
        return {}
    pairs = dict(zip(keys, names, strict=True))
    return pairs if all(key.rpartition(".")[2] == name.rpartition(".")[2] for key, name in pairs.items()) else {}


@cache
def _resnet50_names() -> list[str]:
    with torch.device("meta"):
        return list(resnet.build(resnet.Arch()).state_dict())


keep_names: KeyMap = _rename_each(lambda key: key)
"""For files with torchvision's own names."""
rename_sequential: KeyMap = _rename_children(_0="conv1", _1="bn1", _4="layer1", _5="layer2", _6="layer3", _7="layer4")
"""For an ``nn.Sequential`` of all children of torchvision's ResNet but ``fc``."""
rename_generator: KeyMap = _rename_children(_0="conv1", _1="bn1", _2="layer1", _3="layer2", _4="layer3", _5="layer4")
"""For lightly's ResNetGenerator. Its ReLU is not a child, so that a Sequential of its children has none in the stem."""
rename_detectron2: KeyMap = _rename_each(_from_detectron2)
"""For Detectron2's backbones."""
