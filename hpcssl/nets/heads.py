"""Projection and prediction heads: multi-layer perceptrons, and SwAV's prototypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.errors import ConfigError, require_choice
from hpcssl.nets.resnet import INITS


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """A multi-layer perceptron: Linear - BatchNorm - ReLU for each hidden width, then a last Linear.

    Attributes:
        hidden: Widths of the hidden layers; empty for a single linear layer.
        out: Width of the output.
        bias: Whether the hidden linear layers have a bias.
        norm: Whether a batch normalization follows each hidden linear layer.
        last_bias: Whether the last linear layer has a bias.
        last_norm: Whether a batch normalization, without a ReLU, follows the last linear layer.
        last_affine: Whether that last normalization has a trained scale and shift (SimSiam: false). False requires
            ``last_norm``.
        init: Initial weights of the linear layers: ``torch`` (uniform, torch's own), ``kaiming`` (normal with variance
            2 / fan-in) or ``normal`` (standard deviation 0.01). The last two set biases to 0; OpenSelfSup uses them.

    Raises:
        ConfigError: If ``last_affine`` is false without ``last_norm``, or ``init`` is unknown.
    """

    hidden: list[int] = field(default_factory=lambda: [4096])
    out: int = 512
    bias: bool = True
    norm: bool = True
    last_bias: bool = True
    last_norm: bool = False
    last_affine: bool = True
    init: str = "torch"

    def __post_init__(self) -> None:
        require_choice("init of a head", self.init, INITS)
        if not (self.last_affine or self.last_norm):
            raise ConfigError(
                "last_affine of a head",
                got="false without last_norm",
                expected="false only with last_norm",
                fix="set last_norm=true, or leave last_affine=true",
            )


def build(width: int, options: HeadOptions, norm: Callable[..., nn.Module]) -> nn.Sequential:
    """Build a head.

    Args:
        width: Width of the inputs [b, width].
        options: The head's layers.
        norm: Called as ``norm(channels)`` or ``norm(channels, affine=...)`` to make a normalization layer.

    Returns:
        A module that maps [b, width] to [b, options.out], with torch's default weights.
    """
    layers: list[nn.Module] = []
    for hidden in options.hidden:
        layers.append(nn.Linear(width, hidden, bias=options.bias))
        if options.norm:
            layers.append(norm(hidden))
        layers.append(nn.ReLU(inplace=True))
        width = hidden
    layers.append(nn.Linear(width, options.out, bias=options.last_bias))
    if options.last_norm:
        layers.append(norm(options.out, affine=options.last_affine))
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Trainable unit vectors, the prototypes of SwAV (Caron et al. 2020).

    Args:
        width: D, the width of the projections.
        count: C, the number of prototypes.

    Attributes:
        vectors: A linear layer without bias, whose weight [C, D] holds the prototypes in its rows.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.vectors = nn.Linear(width, count, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Compute the inner products [b, C] of projections z [b, D], of unit length, with each prototype."""
        with torch.autocast(z.device.type, enabled=False):  # codes are exp(score / 0.05): half precision is too coarse
            scores: Tensor = self.vectors(z)
        return scores

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Scale the prototypes to unit length, after every update and without gradient (main_swav.py:277-281)."""
        self.vectors.weight.copy_(F.normalize(self.vectors.weight, dim=1))
