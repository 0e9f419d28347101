"""The two encoders that every method has: the trained one, and the one that is aimed at."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.nets import norm
from hpcssl.nets.heads import Prototypes
from hpcssl.world import World


class Branch(nn.Module):
    """Backbone, projector and (on the online side, where the method has one) predictor; and the same for the images'
    ``second`` modality, where the plan has views of one.

    Each view is a pass of the norms by itself; ``joint``: neighbouring views of one size pass the backbone together,
    and all views the projector, as in SwAV's code (resnet50.py, forward), so that their statistics are shared.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None,
                 second: Branch | None = None, joint: bool = False):
        super().__init__()
        self.backbone, self.projector, self.predictor, self.second = backbone, projector, predictor, second
        self.joint = joint

    def forward(self, views: list[Tensor], second: Sequence[bool] = ()) -> list[tuple[Tensor, Tensor | None]]:
        """Projection z and prediction u of each view, unit length, [b, D] each, or scores [b, C] for u. ``second``:
        which of the views are of the second modality."""
        if self.joint:
            return self._jointly(views)
        of = second or [False] * len(views)
        return [(self.second if other else self).embed(view) for view, other in zip(views, of, strict=True)]

    def embed(self, view: Tensor) -> tuple[Tensor, Tensor | None]:
        z = self.projector(self.backbone(view))
        return unit(z), self.predict(z)

    def _jointly(self, views: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        features: list[Tensor] = []
        for _, alike in itertools.groupby(views, key=lambda view: view.shape):
            features += _together(self.backbone, list(alike))
        found = _together(self.projector, features)
        return [(unit(z), self.predict(z)) for z in found]

    def predict(self, z: Tensor) -> Tensor | None:
        """The prediction from projections of any length."""
        if self.predictor is None:
            return None
        if isinstance(self.predictor, Prototypes):
            return self.predictor(unit(z))
        return unit(self.predictor(z))

    def without_predictor(self) -> Branch:
        """The same networks, not copied, as a moving average has them."""
        second = None if self.second is None else self.second.without_predictor()
        return Branch(self.backbone, self.projector, None, second, self.joint)


def _together(network: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """One pass of views [b, …] of one shape. A sample's rows stand side by side, so that a group of the norms holds
    whole samples on any number of ranks."""
    layers = norm.norms_of([network])
    rows = torch.stack(views, 1).flatten(0, 1)
    if rows.dim() == 4 and views[0].is_contiguous(memory_format=torch.channels_last):
        rows = rows.contiguous(memory_format=torch.channels_last)
    for layer in layers:
        layer.views = len(views)
    try:
        return list(network(rows).unflatten(0, (-1, len(views))).unbind(1))
    finally:
        for layer in layers:
            layer.views = 1


def unit(x: Tensor) -> Tensor:
    """Rows scaled to unit length, in float32 at least."""
    # lengths and cosines need more than half precision
    return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=1)


class Pair(nn.Module):
    """The online branch, and the target: its moving average (``ema``), or itself (``stop``, ``same``).

    ``precision``: None, or the dtype that forward passes are cast to. The online branch alone is wrapped for the
    world's gradients, and must be called once per backward pass with the list of all its views.
    """

    def __init__(self, online: Branch, mode: Literal["ema", "stop", "same"], world: World,
                 precision: torch.dtype | None = None):
        super().__init__()
        self.online, self.mode, self.world, self.precision = online, mode, world, precision
        self.target = None
        if mode == "ema":
            self.target = copy.deepcopy(online.without_predictor()).requires_grad_(False)
        self._parallel = [world.parallel(online)]  # in a list: not a second copy of the parameters in state_dict
        self.settle()

    def embed(self, views: list[Tensor], second: Sequence[bool] = ()) -> list[tuple[Tensor, Tensor | None]]:
        """(z, u) of each view from the online branch, with gradient."""
        with self._cast():
            return self._parallel[0](views, second)

    @torch.no_grad()
    def embed_now(self, view: Tensor) -> Tensor:
        """z of a view from the network that targets come from, as it is, without gradient."""
        network = self.online if self.target is None else self.target
        with self._cast():
            return torch.cat([network.embed(rows)[0] for rows in view.chunk(self.world.micro_batches)])

    @torch.no_grad()
    def predict(self, z: Tensor) -> Tensor | None:
        """The online prediction from given rows, without gradient."""
        return self.online.predict(z)

    @torch.no_grad()
    def embed_target(self, views: list[Tensor], orders: list[Tensor] | None = None,
                     second: Sequence[bool] = ()) -> list[Tensor]:
        """z of each view from the moving average, without gradient; it keeps its own batch statistics.

        The rows pass in micro-batches, like the online branch's: groups of the norms are runs of those.
        ``orders``: per view a permutation of the global batch, int64 [W·b], by which images are dealt out to groups
        of the norms and back again (shuffle-BN, He et al. 2020).
        """
        if orders is not None:
            views = [self.world.shuffle(view, order) for view, order in zip(views, orders, strict=True)]
        micros = zip(*(view.chunk(self.world.micro_batches) for view in views), strict=True)
        with self._cast():
            passed = [[z for z, _ in self.target(list(rows), second)] for rows in micros]
        found = [torch.cat(parts) for parts in zip(*passed, strict=True)]
        if orders is not None:
            found = [self.world.unshuffle(z, order) for z, order in zip(found, orders, strict=True)]
        return found

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """target ← momentum · target + (1 − momentum) · online, parameters only (norm statistics are its own)."""
        if self.target is None:
            return
        mine = [p for name, p in self.online.named_parameters() if "predictor" not in name.split(".")]
        torch._foreach_lerp_(list(self.target.parameters()), mine, 1 - momentum)

    def settle(self) -> None:
        """What has to hold after every update: prototypes of unit length."""
        if isinstance(self.online.predictor, Prototypes):
            self.online.predictor.settle()

    def no_sync(self):
        """Gradients of this backward pass stay on their rank (all micro-batches but the last)."""
        network = self._parallel[0]
        return network.no_sync() if network is not self.online else contextlib.nullcontext()

    def _cast(self):
        device = self.world.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision is not None)
