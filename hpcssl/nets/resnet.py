"""Backbones by name: torchvision's ResNets, with its own stem or one for small images, and a small network for digits.

Every backbone maps images [B, 3, H, W] to pooled features [B, F], and takes a factory of its normalization layers as an
argument.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hpcssl import rng
from hpcssl.errors import ConfigError, suggest
from hpcssl.nets.norm import BatchNorm

Norm = Callable[[int], nn.Module]
"""Makes a normalization layer for a number of channels."""

RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
"""Block type and number of blocks per stage of torchvision's ResNets."""
ARCH_NAMES = (*RESNETS, "resnet_tiny")
"""Values of the recipe key ``model.arch``."""
STEMS = ("imagenet", "small")
"""Values of the recipe key ``model.stem``."""
INITS = ("torch", "kaiming", "normal")
"""Rules of ``initialize``: values of the recipe keys ``model.backbone_init`` and ``init`` of a head."""
IMPORT_STEMS = ("small_pad2", "small_linear", "imagenet_same")
"""Stems of other projects' encoders. They can be read and evaluated, but not trained."""


@dataclass(frozen=True, kw_only=True)
class Arch:
    """The architecture of a backbone. Stored in every exported weights file, so that it need not be guessed from keys.

    Attributes:
        arch: One of ``ARCH_NAMES``.
        stem: ``imagenet`` (7×7 convolution with stride 2, max-pool) or ``small`` (3×3 with stride 1, no pool; for
            images of CIFAR's size). Imported encoders may also have ``small_pad2`` (solo-learn's, which pads by 2),
            ``small_linear`` (lightly's, without a ReLU) or ``imagenet_same`` (Haiku's SAME padding throughout).
        zero_init_residual: Whether the last normalization of each residual branch starts at 0, so that each block
            starts as the identity (SimSiam; not MSF).
    """

    arch: str = "resnet50"
    stem: str = "imagenet"
    zero_init_residual: bool = False

    def to_json(self) -> str:
        """The architecture as a JSON object with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """Read what ``to_json`` gave. Raises ``ValueError`` or ``TypeError`` for other text."""
        return cls(**json.loads(text))


class FusedBasicBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's block, whose norms get the residual and the ReLU behind them, which ``BatchNorm`` may fuse."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute what torchvision's block computes."""
        out = _norm_relu(self.bn1, self.conv1(x))
        return _norm_relu(self.bn2, self.conv2(out), x if self.downsample is None else self.downsample(x))


class FusedBottleneck(Bottleneck):  # type: ignore[misc]
    """The same for torchvision's bottleneck."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute what torchvision's block computes."""
        out = _norm_relu(self.bn2, self.conv2(_norm_relu(self.bn1, self.conv1(x))))
        return _norm_relu(self.bn3, self.conv3(out), x if self.downsample is None else self.downsample(x))


def _norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y: Tensor
    if isinstance(norm, BatchNorm):
        y = norm(x, residual, relu=True)
        return y
    y = norm(x)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


_FUSED = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


class TinyResNet(nn.Module):
    """A ResNet of 0.3 M parameters for images of about 16 pixels.

    Three stages of one basic block with 32, 64 and 128 channels; a stem of stride 1 without pooling.

    Args:
        norm: Makes the normalization layers.
    """

    def __init__(self, norm: Norm):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = norm(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _make_stage(32, 32, 1, norm)
        self.layer2 = _make_stage(32, 64, 2, norm)
        self.layer3 = _make_stage(64, 128, 2, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Compute pooled features [B, 128] of images [B, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features.mean((2, 3))


def _make_stage(channels_in: int, channels: int, stride: int, norm: Norm) -> nn.Module:
    skip = None
    if stride != 1 or channels_in != channels:
        skip = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), norm(channels))
    return nn.Sequential(FusedBasicBlock(channels_in, channels, stride, skip, norm_layer=norm))


def build(arch: Arch, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """Build a backbone with torch's default weights; ``initialize`` draws those that a run starts from.

    Args:
        arch: The architecture.
        norm: Makes the normalization layers.

    Returns:
        A module that maps [B, 3, H, W] to features [B, F], where F is ``feature_width`` of the module.

    Raises:
        ConfigError: If the architecture or the stem is unknown.
    """
    if arch.stem not in STEMS + IMPORT_STEMS:
        raise ConfigError("model.stem", got=repr(arch.stem), expected=" or ".join(STEMS), fix=suggest(arch.stem, STEMS))
    if arch.arch not in ARCH_NAMES:
        raise ConfigError(
            "model.arch", got=repr(arch.arch), expected="a known backbone", fix=suggest(arch.arch, ARCH_NAMES)
        )
    network: nn.Module = TinyResNet(norm) if arch.arch == "resnet_tiny" else _build_resnet(arch, norm)
    if arch.zero_init_residual:
        for part in network.modules():
            if isinstance(part, BasicBlock | Bottleneck):
                last_norm = part.bn3 if isinstance(part, Bottleneck) else part.bn2
                assert isinstance(last_norm.weight, Tensor)
                nn.init.zeros_(last_norm.weight)
    return network


def _build_resnet(arch: Arch, norm: Norm) -> ResNet:
    block, layers = RESNETS[arch.arch]
    network = ResNet(_FUSED[block], list(layers), norm_layer=norm)
    network.fc = nn.Identity()
    if arch.stem.startswith("small"):
        padding = 2 if arch.stem == "small_pad2" else 1
        network.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
        network.maxpool = nn.Identity()
        if arch.stem == "small_linear":
            network.relu = nn.Identity()  # only the stem's ReLU; each block has its own
    elif arch.stem == "imagenet_same":
        _use_same_padding(network)
    return network


def _use_same_padding(network: nn.Module) -> None:
    """Give the network the SAME padding of TensorFlow and Haiku, in place. Keys of the state dict do not change.

    With stride 2 and an even side, the odd pixel of padding goes to the right and below. With stride 1 both paddings
    are equal.
    """
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.MaxPool2d) and _first(part.stride) > 1:
            part.padding = (0, 0)
            part.register_forward_pre_hook(_pad_same)


def _pad_same(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    assert isinstance(layer, nn.Conv2d | nn.MaxPool2d)
    kernel, stride, sides = _first(layer.kernel_size), _first(layer.stride), []
    for length in reversed(inputs[0].shape[2:]):  # F.pad counts from the last axis
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(inputs[0], sides)  # zeros are right for the max-pool too, because it follows a ReLU


def _first(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def feature_width(network: nn.Module) -> int:
    """F, the width of a backbone's pooled features: the most channels that any of its convolutions gives."""
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return max(m.out_channels for m in convolutions)


def total_stride(arch: Arch) -> int:
    """Pixels of the image per pixel of the last feature map, in each direction."""
    if arch.arch == "resnet_tiny":
        return 4
    return 8 if arch.stem.startswith("small") else 32


@torch.no_grad()
def initialize(network: nn.Module, seed: int, place: str = "init", rule: str = "torch") -> None:
    """Draw the weights that a run starts from, in place.

    Each tensor is drawn with the key (seed, place, parameter name), so that two methods with different heads start from
    the same backbone. Normalization layers stay as they were built.

    Args:
        network: The network.
        seed: The run's seed.
        place: Name of the network within the model, such as ``backbone``.
        rule: ``torch``: torchvision's ResNets get torchvision's rules (He et al. 2015, fan-out); linear layers and the
            small network get PyTorch's own. ``kaiming``: normal with variance 2 / fan-in, biases 0. ``normal``: normal
            with standard deviation 0.01, biases 0. The last two are those of OpenSelfSup.
    """
    fan_out = not isinstance(network, TinyResNet)

    def make_generator(name: str) -> torch.Generator:
        return rng.generator(rng.key(seed, place, name))

    for name, part in network.named_modules():
        if not isinstance(part, nn.Conv2d | nn.Linear):
            continue
        generator = make_generator(f"{name}.weight")
        is_uniform = rule == "torch" and not (fan_out and isinstance(part, nn.Conv2d))
        bound = part.weight[0].numel() ** -0.5
        if is_uniform:
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
        elif rule == "normal":
            nn.init.normal_(part.weight, std=0.01, generator=generator)
        else:
            mode: Literal["fan_in", "fan_out"] = "fan_in" if rule == "kaiming" else "fan_out"
            nn.init.kaiming_normal_(part.weight, mode=mode, nonlinearity="relu", generator=generator)
        if part.bias is not None and is_uniform:
            nn.init.uniform_(part.bias, -bound, bound, generator=make_generator(f"{name}.bias"))
        elif part.bias is not None:
            nn.init.zeros_(part.bias)
