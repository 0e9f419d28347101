"""Estimates of the GPU memory that a rank needs for a recipe, by arithmetic. No memory is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpcssl.distributed.world import World
from hpcssl.nets import heads, norm, resnet
from hpcssl.nets.heads import HeadOptions
from hpcssl.nets.resnet import Arch
from hpcssl.recipes.table import GpuMemory, MemorySizes
from hpcssl.train.builders import build_method, build_view_plan
from hpcssl.train.recipe import Recipe

IMAGENET_IMAGES, CIFAR_IMAGES = 1_281_167, 50_000
"""Images for which an embedding table is counted: those of ImageNet, and of CIFAR for backbones with the small stem."""
LABELED_SHARE = 10
"""Where a table holds labeled images only, it is counted for every tenth image."""


class _HeadKey(NamedTuple):
    """The options of a head as a value that a cache accepts."""

    hidden: tuple[int, ...]
    out: int
    bias: bool
    norm: bool
    last_bias: bool
    last_norm: bool

    @classmethod
    def of(cls, options: HeadOptions) -> _HeadKey:
        hidden = tuple(options.hidden)
        return cls(hidden, options.out, options.bias, options.norm, options.last_bias, options.last_norm)


def estimate(recipe: Recipe, ranks: int) -> GpuMemory:
    """Estimate the memory of one rank.

    Args:
        recipe: The recipe.
        ranks: Number of processes. Where it does not divide the batch, the larger part is counted.
    """
    return measure(recipe).of_rank(ranks)


def measure(recipe: Recipe) -> MemorySizes:
    """Measure what the memory of a rank is computed from, for any number of ranks."""
    method = build_method(recipe)
    is_half = recipe.optim.precision in ("bf16", "fp16")
    float_bytes = 8 if recipe.optim.precision == "fp64" else 4
    parameters, kept_per_image = _count_networks(recipe)
    # Weights, gradients and momentum; the half-precision copies that autocast keeps; the moving average.
    networks = parameters * (3 * float_bytes + 2 * is_half)
    if method.target_encoder == "ema":
        networks += parameters * float_bytes
    width, spec = recipe.model.projector.out, method.bank
    plan = build_view_plan(recipe, method)
    sizes = [plan.views[source].size for source in plan.sources]
    return MemorySizes(
        networks=networks,
        bank_rows=recipe.bank.size if spec is not None else 0,
        bank_row_bytes=width * float_bytes * (1 + len(spec.vectors)) + 8 * (2 + len(spec.numbers)) if spec else 0,
        table_rows=_table_rows(recipe, CIFAR_IMAGES if recipe.model.stem == "small" else IMAGENET_IMAGES),
        table_row_bytes=width * float_bytes + 8,
        is_sharded=recipe.bank.placement == "sharded",
        batch=recipe.optim.batch,
        micro_batches=recipe.machine.accumulation_steps,
        view_bytes=sum(3 * size**2 for size in sizes) * float_bytes,
        activation_bytes=kept_per_image * (1 if is_half else 2) * (2 if float_bytes == 8 else 1),
    )


def estimate_saved_bytes(recipe: Recipe, images: int) -> tuple[int, int]:
    """Estimate what a checkpoint and an exported weights file take on the disk.

    Args:
        recipe: The recipe.
        images: Number of training images.

    Returns:
        Bytes of one checkpoint over all ranks, and of one weights file with heads.
    """
    sizes, (parameters, _) = measure(recipe), _count_networks(recipe)
    float_bytes = 8 if recipe.optim.precision == "fp64" else 4
    copies = 3 if build_method(recipe).target_encoder == "ema" else 2  # weights and momentum; the moving average
    rows = sizes.bank_rows * sizes.bank_row_bytes + _table_rows(recipe, images) * sizes.table_row_bytes
    return parameters * float_bytes * copies + rows, parameters * float_bytes


def _count_networks(recipe: Recipe) -> tuple[int, int]:
    """Return the number of trained parameters, and the bytes that backward keeps per image in half precision."""
    method = build_method(recipe)
    plan = build_view_plan(recipe, method)
    arch, projector = recipe.arch.to_json(), _HeadKey.of(recipe.model.projector)
    mlp = _HeadKey.of(recipe.model.predictor) if method.heads.predictor == "mlp" else None
    predictor = method.heads.prototypes if method.heads.predictor == "prototypes" else mlp
    embedded = plan.online_views(has_target_encoder=method.target_encoder == "ema")
    views = [plan.views[plan.sources[v]] for v in embedded]
    parameters = kept = 0
    for second in {view.second for view in plan.views}:
        parameters += _count_parameters(arch, projector, predictor)
        # The scores of prototypes are small, and are left out.
        kept += sum(_activation_bytes(arch, projector, mlp, view.size) for view in views if view.second == second)
    return parameters, kept


def _table_rows(recipe: Recipe, images: int) -> int:
    """Return for how many of a number of images an embedding is kept; 0 for methods that keep none."""
    rule = getattr(recipe.method, "rule", "")
    return {"two_queues": images, "kmeans": images, "semi_supervised": images // LABELED_SHARE}.get(rule, 0)


def _networks(arch: str, projector: _HeadKey, predictor: _HeadKey | int | None) -> Iterator[nn.Module]:
    """Yield backbone, projector and predictor in half precision, on the meta device, which stores nothing."""

    def norm_layer(channels: int, affine: bool = True) -> nn.Module:
        return norm.BatchNorm(channels, group=2, world=World.single_process(), affine=affine)

    def head(width: int, key: _HeadKey) -> nn.Module:
        options = HeadOptions(
            hidden=list(key.hidden),
            out=key.out,
            bias=key.bias,
            norm=key.norm,
            last_bias=key.last_bias,
            last_norm=key.last_norm,
        )
        return heads.build(width, options, norm_layer)

    with torch.device("meta"):
        backbone = resnet.build(Arch.from_json(arch), norm_layer)
        yield backbone.to(torch.bfloat16)
        yield head(resnet.feature_width(backbone), projector).to(torch.bfloat16)
        if isinstance(predictor, int):
            yield heads.Prototypes(projector.out, predictor).to(torch.bfloat16)
        elif predictor is not None:
            yield head(projector.out, predictor).to(torch.bfloat16)


@cache
def _count_parameters(arch: str, projector: _HeadKey, predictor: _HeadKey | int | None) -> int:
    return sum(p.numel() for network in _networks(arch, projector, predictor) for p in network.parameters())


@cache
def _activation_bytes(arch: str, projector: _HeadKey, predictor: _HeadKey | None, size: int) -> int:
    """Bytes that the backward pass keeps of one image of ``size`` pixels a side, in half precision."""
    x = torch.zeros(2, 3, size, size, dtype=torch.bfloat16, device="meta")
    return saved_for_backward(list(_networks(arch, projector, predictor)), x) // 2


def saved_for_backward(networks: list[nn.Module], x: Tensor) -> int:
    """Return the bytes that autograd keeps when ``x`` passes the networks one after the other.

    Parameters are not counted.
    """
    parameters = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    storage_bytes: dict[int, int] = {}
    alive = []  # keeps the storages: the address of one that is freed would be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage._cdata not in parameters:
            storage_bytes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for network in networks:
            x = network(x)
    return sum(storage_bytes.values())
