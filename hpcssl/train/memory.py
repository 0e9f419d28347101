"""How much memory of a GPU a rank of a recipe takes, by arithmetic: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from hpcssl.methods.base import Remembering
from hpcssl.nets import heads, norm, resnet
from hpcssl.nets.heads import HeadOptions
from hpcssl.nets.resnet import Arch
from hpcssl.train.recipe import Recipe
from hpcssl.train.state import method_of, plan_of
from hpcssl.world import World

IMAGENET, SMALL = 1_281_167, 50_000
"""Images that a ledger is counted for: of ImageNet, and of CIFAR where the backbone has the small stem; a tenth of them
where only those with labels are kept."""


@dataclass(frozen=True)
class Memory:
    """Bytes per rank. ``activations`` are what the backward pass keeps of one micro-batch; ``views`` its images as
    numbers. Not counted: the CUDA context, cuDNN's workspaces, what a moving average's forward holds for a moment."""

    networks: int
    bank: int
    ledger: int
    activations: int
    views: int

    @property
    def total(self) -> int:
        return self.networks + self.bank + self.ledger + self.activations + self.views


def estimate(recipe: Recipe, ranks: int) -> Memory:
    """Of a rank among ``ranks``. A batch that does not divide counts as its larger part."""
    method = method_of(recipe)
    plan, model = plan_of(recipe, method), recipe.model
    half = recipe.optim.precision in ("bf16", "fp16")
    wide = 8 if recipe.optim.precision == "fp64" else 4
    rows = -(-recipe.optim.batch // ranks // recipe.machine.accumulate)
    places = {"none": None, "mlp": _key(model.predictor), "prototypes": method.heads.prototypes}
    queries = {*plan.queries, *(() if method.target == "ema" else plan.targets)}
    shown = [plan.views[v if v < len(plan.views) else plan.mixed[v - len(plan.views)]] for v in sorted(queries)]
    trained = kept = 0
    for second in {view.second for view in plan.views}:
        parts = recipe.arch.to_json(), _key(model.projector), places[method.heads.predictor]
        trained += _parameters(*parts)
        mlp = parts[2] if method.heads.predictor == "mlp" else None  # scores of prototypes are small
        kept += sum(_activations(*parts[:2], mlp, view.size) for view in shown if view.second == second)
    # weights, gradients, momentum; the copies of the weights that autocast keeps; the moving average
    networks = trained * (3 * wide + 2 * half) + trained * wide * (method.target == "ema")
    width, spec = model.projector.out, method.bank
    shards = ranks if recipe.bank.placement == "sharded" else 1
    bank = 0 if spec is None else -(-recipe.bank.size // shards) * (
        width * wide * (1 + len(spec.vectors)) + 8 * (2 + len(spec.numbers)))
    ledger = 0
    rule = getattr(recipe.method, "rule", "")
    if isinstance(method, Remembering) and rule in ("twin", "kmeans", "pseudo"):
        images = (SMALL if model.stem == "small" else IMAGENET) // (10 if rule == "pseudo" else 1)
        ledger = -(-images // shards) * (width * wide + 8)
    pixels = sum(3 * view.size**2 for view in plan.views) + sum(3 * plan.views[v].size**2 for v in plan.mixed)
    activations = rows * kept * (1 if half else 2) * (2 if wide == 8 else 1)
    return Memory(networks, bank, ledger, activations, recipe.optim.batch // ranks * pixels * wide)


def _key(options: HeadOptions) -> tuple:
    return tuple(options.hidden), options.out, options.bias, options.norm, options.last_bias, options.last_norm


def _networks(arch: str, projector: tuple, predictor: tuple | int | None) -> Iterator[nn.Module]:
    """Backbone, projector, predictor, without storage and in half precision."""
    def layer(channels: int, affine: bool = True) -> nn.Module:
        return norm.BatchNorm(channels, group=2, world=World.alone(), affine=affine)

    def head(width: int, key: tuple) -> nn.Module:
        hidden, out, bias, normed, last_bias, last_norm = key
        return heads.build(width, HeadOptions(hidden=list(hidden), out=out, bias=bias, norm=normed,
                                              last_bias=last_bias, last_norm=last_norm), layer)

    with torch.device("meta"):
        backbone = resnet.build(Arch.from_json(arch), layer)
        yield backbone.to(torch.bfloat16)
        yield head(resnet.width_of(backbone), projector).to(torch.bfloat16)
        if isinstance(predictor, int):
            yield heads.Prototypes(projector[1], predictor).to(torch.bfloat16)
        elif predictor is not None:
            yield head(projector[1], predictor).to(torch.bfloat16)


@cache
def _parameters(arch: str, projector: tuple, predictor: tuple | int | None) -> int:
    return sum(p.numel() for network in _networks(arch, projector, predictor) for p in network.parameters())


@cache
def _activations(arch: str, projector: tuple, predictor: tuple | None, size: int) -> int:
    """Bytes that the backward pass keeps of one image of ``size`` pixels, in half precision."""
    x = torch.zeros(2, 3, size, size, dtype=torch.bfloat16, device="meta")
    return saved_for_backward(list(_networks(arch, projector, predictor)), x) // 2


def saved_for_backward(networks: list[nn.Module], x: Tensor) -> int:
    """Bytes that autograd keeps of the networks one after the other, without their parameters."""
    own = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    storages: dict[int, int] = {}
    alive = []  # a storage that is freed would lend its address to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for network in networks:
            x = network(x)
    return sum(storages.values())
