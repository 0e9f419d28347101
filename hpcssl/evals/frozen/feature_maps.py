"""Features before the global pooling: the feature map of a stage, averaged over a coarse grid of windows, flattened.

At 224 pixels, with the windows of VISSL (configs/config/benchmark/linear_image_classification/voc07:
``LINEAR_EVAL_FEAT_POOL_OPS_MAP``) and OpenSelfSup (models/utils/multi_pooling.py ``POOL_PARAMS``):

    res2  256 × 56 × 56   windows of 16, stride 8   256 × 6 × 6  = 9216
    res3  512 × 28 × 28              13         5   512 × 4 × 4  = 8192
    res4  1024 × 14 × 14              8         3   1024 × 3 × 3 = 9216
    res5  2048 × 7 × 7                6         1   2048 × 2 × 2 = 8192

for a ResNet-50. A map of another side is averaged adaptively to the same grid (multi_pooling.py ``POOL_SIZES``), or
kept as it is if it is smaller. ``res5`` is the last stage, also of a network with fewer stages.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.errors import EvalError
from hpcssl.evals.common.encoder import FrozenEncoder

_WINDOWS = {"res2": (56, 16, 8, 6), "res3": (28, 13, 5, 4), "res4": (14, 8, 3, 3), "res5": (7, 6, 1, 2)}
"""Stage -> side of its map at 224 pixels, side and stride of the windows, side of the grid."""
NAMES = (*_WINDOWS, "pooled")


class StageFeatures(nn.Module):
    """The flattened feature map of a stage: [B, 3, H, W] to [B, D]. Shares the layers of the backbone.

    Args:
        backbone: The network.
        name: Stage, ``res2`` to ``res5``.
        size: Image size in pixels, which decides ``width``, D.

    Raises:
        EvalError: The network has no such stage.
    """

    def __init__(self, backbone: nn.Module, name: str, size: int) -> None:
        super().__init__()
        layers = OrderedDict(backbone.named_children())
        stages = [layer for layer in layers if layer.startswith("layer")]
        selected = stages[-1:] if name == "res5" else [s for s in stages[:-1] if s == f"layer{int(name[-1]) - 1}"]
        if not selected:
            raise EvalError(
                f"feature={name}",
                got=f"a network with {len(stages)} stages",
                expected=" or ".join(f"res{i + 2}" for i in range(len(stages) - 1)) + ", res5 or pooled",
                fix="set feature=res5 for the last stage",
            )
        names = list(layers)
        self.body = nn.Sequential(OrderedDict((n, layers[n]) for n in names[: names.index(selected[0]) + 1]))
        self.side, self.window, self.stride, self.grid = _WINDOWS[name]
        with torch.no_grad():
            self.width = self(torch.zeros(1, 3, size, size, device=next(self.parameters()).device)).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W]."""
        x = self.body(x)
        if x.shape[2:] == (self.side, self.side):
            x = F.avg_pool2d(x, self.window, self.stride)
        else:
            x = F.adaptive_avg_pool2d(x, (min(x.shape[2], self.grid), min(x.shape[3], self.grid)))
        return x.flatten(1)


def select_feature(encoder: FrozenEncoder, name: str) -> FrozenEncoder:
    """Return an encoder whose features are the map of a stage.

    Args:
        encoder: The encoder.
        name: One of ``NAMES``; ``pooled`` returns the encoder itself.

    Returns:
        An encoder with a digest of its own, under which its features are stored.
    """
    if name == "pooled":
        return encoder
    features = StageFeatures(encoder.backbone, name, encoder.meta["size"]).eval()
    digest = hashlib.sha256(f"{encoder.sha256} {name}".encode()).hexdigest()
    return replace(encoder, backbone=features, sha256=digest)
