"""Projection and prediction heads: multi-layer perceptrons as the papers draw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Linear - BN - ReLU for each hidden width, then Linear to ``out``.

    ``bias``, ``norm`` are those of the hidden layers; ``last_bias``, ``last_norm`` (without ReLU) of the last one.
    ``last_affine=False``: the last norm has no scale and shift (SimSiam).
    """

    hidden: list[int] = field(default_factory=lambda: [4096])
    out: int = 512
    bias: bool = True
    norm: bool = True
    last_bias: bool = True
    last_norm: bool = False
    last_affine: bool = True

    def __post_init__(self):
        if not (self.last_affine or self.last_norm):
            raise ConfigError("a head's last_affine", got="false without last_norm", expected="a last norm to act on",
                              mend="set last_norm=true, or leave last_affine=true")


def build(width: int, options: HeadOptions, norm: Callable[..., nn.Module]) -> nn.Sequential:
    """The head for inputs [b, width]; it gives [b, options.out]. ``norm(channels, affine=True)`` makes a layer."""
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
    """``count`` trainable unit vectors; of rows z [b, width] of unit length the inner products with each, [b, count].

    After every update ``settle`` scales the vectors back to unit length, without gradient (SwAV, main_swav.py:277-281).
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.vectors = nn.Linear(width, count, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):  # codes are exp(score / 0.05): half precision is too coarse
            return self.vectors(z)

    @torch.no_grad()
    def settle(self) -> None:
        self.vectors.weight.copy_(F.normalize(self.vectors.weight, dim=1))
