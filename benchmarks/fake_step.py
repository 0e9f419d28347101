"""The step of a packaged recipe on a fake GPU, and the same encoders with torch's own norms and SGD to compare with."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fake_gpu import DEVICE, Recorder, Trace, fake_gpu
from hpcssl import rng
from hpcssl.data.batch import Batch
from hpcssl.distributed.launch import LaunchInfo
from hpcssl.distributed.world import World
from hpcssl.nets import norm
from hpcssl.train import recipe as recipes
from hpcssl.train.recipe import Recipe
from hpcssl.train.step import train_step
from hpcssl.train.train_state import TrainState
from hpcssl.views.augment import draw_params

IMAGES, CLASSES = 1_281_167, 1000  # of ImageNet
SOURCE = 400, 500  # height and width of the images that crops are drawn from


@dataclass
class Measured:
    """The step of a recipe and its plain encoders, on one of ``ranks`` GPUs."""

    step: Trace
    plain: Trace
    ranks: int
    rows: int


class Support:
    """The random images of a bank that is refilled at every step."""

    def __init__(self, recipe: Recipe, state: TrainState, ranks: int):
        self.state, self.ranks = state, ranks
        self.count = recipe.bank.size // recipe.optim.batch

    def batches(self, step: int) -> list[Batch]:
        assert self.state.method.bank is not None
        views = [self.state.plan.views[v] for v in self.state.method.bank.views]
        return [make_batch(self.state.recipe, views, self.ranks) for _ in range(self.count)]


@functools.cache
def _params(augmentation: Any, count: int) -> np.ndarray:
    return np.stack([draw_params(augmentation, rng.key(0, "params", i), *SOURCE) for i in range(count)])


def make_batch(recipe: Recipe, views: Any, ranks: int) -> Batch:
    """Rank 0's rows of a batch, as the loader would hand them out."""
    rows = recipe.optim.batch // ranks
    images = [torch.empty(rows, view.size, view.size, 3, dtype=torch.uint8) for view in views]
    params = [_params(view.augmentation, rows) for view in views]
    index = np.arange(rows)
    return Batch(0, 0, index, index % CLASSES, images, params)


def make_state(recipe: Recipe, ranks: int) -> TrainState:
    """The training of a recipe on rank 0 of ``ranks``, within ``fake_gpu(ranks)``."""
    info = LaunchInfo(rank=0, local_rank=0, size=ranks, address="", port=0, token="") if ranks > 1 else None
    world = World(0, ranks, 0, DEVICE, info)
    labels = np.arange(IMAGES) % CLASSES
    steps = IMAGES // recipe.optim.batch
    state = TrainState(recipe, world, steps_per_epoch=steps, labels=labels, data_digest="fake")
    state.support = Support(recipe, state, ranks)  # type: ignore[assignment]
    return state


def measure(name: str, ranks: int = 1, *overrides: str, plain: bool = True) -> Measured:
    """Take one step of a packaged recipe at its real size as one of ``ranks`` GPUs.

    The step is one in the middle of a run: the bank is full, and it is not the first of an epoch.

    Args:
        name: The recipe.
        ranks: Number of GPUs.
        overrides: Keys to change.
        plain: Whether to measure the plain encoders as well.
    """
    recipe = recipes.compose(name, list(overrides))
    with fake_gpu(ranks) as recorder:
        state = make_state(recipe, ranks)
        batch = make_batch(recipe, state.plan.views, ranks)
        state.step = batch.step = state.last_step // 2 // state.steps_per_epoch * state.steps_per_epoch + 1
        if state.bank is not None:
            state.bank.filled = state.bank.size
        recorder.trace = step = Trace()
        report = train_step(state, batch)
        recorder.trace = Trace()
        if not report.taken:
            raise RuntimeError(f"{name}: the step was not taken: {report.reason}")
        bare = plain_step(state, batch, recorder) if plain else Trace()
    return Measured(step, bare, ranks, len(batch.index))


def plain_step(state: TrainState, batch: Batch, recorder: Recorder) -> Trace:
    """What the step cannot do without: target views forward, query views forward and backward, and SGD.

    Norms are ``nn.BatchNorm2d`` over the rank's rows, or ``nn.SyncBatchNorm`` where groups span ranks. Images are there
    already; the loss is the sum of the outputs.
    """
    pair, plan = state.pair, state.plan
    spans = any(layer.group > len(batch.index) // layer.micro_batches for layer in state.norms)
    online = replace_norms(copy.deepcopy(pair.online), spans)
    target = None if pair.target is None else replace_norms(copy.deepcopy(pair.target), spans)
    parameters = [p for p in online.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    for p in parameters:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
    sizes = [plan.views[source].size for source in plan.sources]
    images = [torch.empty(len(batch.index), 3, s, s, device=DEVICE, dtype=state.dtype) for s in sizes]
    if state.recipe.machine.channels_last:
        images = [x.to(memory_format=torch.channels_last) for x in images]
    queries = plan.online_views(has_target_encoder=target is not None)
    recorder.trace = trace = Trace()
    if target is not None:
        with torch.no_grad(), pair._autocast():
            for micro in zip(*(images[v].chunk(state.layout.micro_batches) for v in plan.targets), strict=True):
                target(list(micro), state.second_modality(plan.targets))
    for micro in zip(*(images[v].chunk(state.layout.micro_batches) for v in queries), strict=True):
        with pair._autocast():
            outputs = online(list(micro), state.second_modality(queries))
        total = sum((u if u is not None else z).sum() for z, u in outputs)
        assert isinstance(total, Tensor)
        total.backward()
    optimizer.step()
    optimizer.zero_grad()
    return trace


def replace_norms(network: nn.Module, spans: bool) -> nn.Module:
    """Put torch's own norms in the place of ours."""
    for name, child in list(network.named_children()):
        if isinstance(child, norm.BatchNorm):
            kind = nn.SyncBatchNorm if spans else _PlainNorm
            plain = kind(child.channels, affine=child.weight is not None).to(DEVICE)
            plain.requires_grad_(any(p.requires_grad for p in child.parameters()))
            setattr(network, name, plain)
        else:
            replace_norms(child, spans)
    return network


class _PlainNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that also takes the rows [b, C] of the heads, as ``nn.BatchNorm1d`` does."""

    def _check_input_dim(self, input: Tensor) -> None: ...
