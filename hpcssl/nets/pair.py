"""The two encoders that every method has: the trained one, and the one that is aimed at."""

from __future__ import annotations

import contextlib
import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.world import World


class Branch(nn.Module):
    """Backbone, projector and (on the online side, where the method has one) predictor."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None):
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor

    def forward(self, views: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Projection z and prediction u of each view, unit length, [b, D] each; one norm pass per view."""
        return [self._embed(view) for view in views]

    def _embed(self, view: Tensor) -> tuple[Tensor, Tensor | None]:
        z = self.projector(self.backbone(view))
        u = self.predictor(z) if self.predictor is not None else None
        return _unit(z), None if u is None else _unit(u)


def _unit(x: Tensor) -> Tensor:
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
            self.target = copy.deepcopy(Branch(online.backbone, online.projector, None)).requires_grad_(False)
        self._parallel = [world.parallel(online)]  # in a list: not a second copy of the parameters in state_dict

    def embed(self, views: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """(z, u) of each view from the online branch, with gradient."""
        with self._cast():
            return self._parallel[0](views)

    @torch.no_grad()
    def embed_target(self, views: list[Tensor], orders: list[Tensor] | None = None) -> list[Tensor]:
        """z of each view from the moving average, without gradient; it keeps its own batch statistics.

        ``orders``: per view a permutation of the global batch, int64 [W·b], by which images are dealt out to groups
        of the norms and back again (shuffle-BN, He et al. 2020).
        """
        if orders is not None:
            views = [self.world.shuffle(view, order) for view, order in zip(views, orders, strict=True)]
        with self._cast():
            found = [z for z, _ in self.target(views)]
        if orders is not None:
            found = [self.world.unshuffle(z, order) for z, order in zip(found, orders, strict=True)]
        return found

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """target ← momentum · target + (1 − momentum) · online, parameters only (norm statistics are its own)."""
        if self.target is None:
            return
        mine = [p for name, p in self.online.named_parameters() if not name.startswith("predictor.")]
        torch._foreach_lerp_(list(self.target.parameters()), mine, 1 - momentum)

    def no_sync(self):
        """Gradients of this backward pass stay on their rank (all micro-batches but the last)."""
        network = self._parallel[0]
        return network.no_sync() if network is not self.online else contextlib.nullcontext()

    def _cast(self):
        device = self.world.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision is not None)
