"""Backbones by name: torchvision's ResNets, with its own stem or the small-image one, and a small one for digits.

Every backbone maps [B, 3, H, W] to the pooled features [B, F], and takes the class of its normalisation layers as an
argument.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hpcssl import rng
from hpcssl.errors import ConfigError, nearest

RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
NAMES = (*RESNETS, "resnet_tiny")
STEMS = ("imagenet", "small")
READ_STEMS = ("small_pad2", "small_linear", "imagenet_same")
"""Stems of others' encoders. They are read and evaluated, and not offered for training."""


@dataclass(frozen=True, kw_only=True)
class Arch:
    """What a backbone is. Stored in every exported weights file, so that nobody guesses it from key names.

    ``stem``: ``imagenet`` (7×7 stride 2, max-pool) or ``small`` (3×3 stride 1, no pool; CIFAR-sized images); of others'
    encoders also ``small_pad2`` (solo-learn's, which pads by 2), ``small_linear`` (lightly's, without a ReLU) and
    ``imagenet_same`` (Haiku's padding throughout).
    ``zero_init_residual``: the last norm of each residual branch starts at 0 (SimSiam; not MSF).
    """

    arch: str = "resnet50"
    stem: str = "imagenet"
    zero_init_residual: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Arch:
        return cls(**json.loads(text))


class TinyResNet(nn.Module):
    """Three stages of one basic block, widths 32, 64, 128, stride-1 stem without pooling: 0.3 M parameters."""

    def __init__(self, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = norm(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(32, 32, 1, norm)
        self.layer2 = _stage(32, 64, 2, norm)
        self.layer3 = _stage(64, 128, 2, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def _stage(before: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    skip = None
    if stride != 1 or before != width:
        skip = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), norm(width))
    return nn.Sequential(BasicBlock(before, width, stride, skip, norm_layer=norm))


def build(arch: Arch, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """The backbone of ``arch`` with layers ``norm(channels)``; its pooled width is ``width_of(module)``.

    Its weights are torch's defaults: ``initialise`` draws the ones a run starts from.
    """
    if arch.stem not in STEMS + READ_STEMS:
        raise ConfigError("model.stem", got=repr(arch.stem), expected=" or ".join(STEMS),
                          mend=nearest(arch.stem, STEMS))
    if arch.arch not in NAMES:
        raise ConfigError("model.arch", got=repr(arch.arch), expected="a known backbone",
                          mend=nearest(arch.arch, NAMES))
    if arch.arch == "resnet_tiny":
        network = TinyResNet(norm)
    else:
        block, layers = RESNETS[arch.arch]
        network = ResNet(block, list(layers), norm_layer=norm)
        network.fc = nn.Identity()
        if arch.stem.startswith("small"):
            network.conv1 = nn.Conv2d(3, 64, 3, padding=2 if arch.stem == "small_pad2" else 1, bias=False)
            network.maxpool = nn.Identity()
            if arch.stem == "small_linear":
                network.relu = nn.Identity()  # the stem's alone; each block has its own
        elif arch.stem == "imagenet_same":
            _pad_same(network)
    if arch.zero_init_residual:
        for part in network.modules():
            if isinstance(part, BasicBlock | Bottleneck):
                nn.init.zeros_((part.bn3 if isinstance(part, Bottleneck) else part.bn2).weight)
    return network


def _pad_same(network: nn.Module) -> None:
    """TensorFlow's and Haiku's SAME padding, in place: with stride 2 on an even side, the odd pixel goes to the right
    and below. Keys stay as they are."""
    for part in network.modules():
        # with stride 1 both paddings are the same
        if isinstance(part, nn.Conv2d | nn.MaxPool2d) and _side(part.stride) > 1:
            part.padding = (0, 0)
            part.register_forward_pre_hook(_same)


def _same(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    kernel, stride, sides = _side(layer.kernel_size), _side(layer.stride), []
    for length in reversed(inputs[0].shape[2:]):  # F.pad counts from the last side
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(inputs[0], sides)  # zeros are right for the max-pool too: it follows a ReLU


def _side(value: int | tuple[int, int]) -> int:
    return value if isinstance(value, int) else value[0]


def width_of(network: nn.Module) -> int:
    """F, the width of the pooled features, from the network itself."""
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return max(m.out_channels for m in convolutions)


@torch.no_grad()
def initialise(network: nn.Module, seed: int, place: str = "init") -> None:
    """Draw the weights a run starts from, each by the address (seed, place, parameter name).

    torchvision's rules for its ResNets (He et al. 2015, fan-out) and PyTorch's own for linear layers and the small
    network; norms as they were made. Two methods with other heads start from the same backbone.
    """
    fan_out = not isinstance(network, TinyResNet)

    def draw(name: str) -> torch.Generator:
        return rng.generator(rng.key(seed, place, name))

    for name, part in network.named_modules():
        if isinstance(part, nn.Conv2d) and fan_out:
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=draw(f"{name}.weight"))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d | nn.Linear):
            bound = part.weight[0].numel() ** -0.5
            nn.init.uniform_(part.weight, -bound, bound, generator=draw(f"{name}.weight"))
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound, generator=draw(f"{name}.bias"))
