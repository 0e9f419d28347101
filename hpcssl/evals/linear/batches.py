"""Batches of features for training linear heads: from stored features, or encoded again by all ranks.

Shapes: B batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet
from hpcssl.errors import HpcsslError
from hpcssl.evals.common.extract import FeatureStream
from hpcssl.evals.common.features import Features
from hpcssl.evals.common.images import IndexBatches, Indices
from hpcssl.evals.common.sync import as_eval_error, raise_on_any_rank
from hpcssl.evals.context import EvalContext
from hpcssl.evals.linear.options import LinearOptions
from hpcssl.views.augment import Augmentation, ViewSpec

_STORED_STEPS_PER_CALL = 64  # steps between two checks for a request to stop

FeatureBatch = tuple[Tensor, Tensor]
"""Raw features, fp32 [B, D], and labels, int64 [B], on the device."""


@dataclass(frozen=True)
class BatchSource:
    """Where the batches of consecutive steps come from.

    Attributes:
        read: Range of at most ``steps_per_call`` consecutive steps -> their batches. Encoding is a collective.
        steps_per_call: Steps per call.
    """

    read: Callable[[range], Iterator[FeatureBatch]]
    steps_per_call: int


def stored_batches(
    features: Features, labels: Tensor, index: Indices, order: Order, device: torch.device
) -> BatchSource:
    """Batches of stored features.

    Args:
        features: Features of the training set.
        labels: Label of each training image, int64 [N].
        index: The training images that ``order`` draws from.
        order: Order over ``index``.
        device: Device of the batches.
    """

    def read(steps: range) -> Iterator[FeatureBatch]:
        for step in steps:
            rows = torch.from_numpy(index[order.batch(step)])
            yield features.rows(rows).to(device), labels[rows].to(device)

    return BatchSource(read, _STORED_STEPS_PER_CALL)


def encoded_batches(
    context: EvalContext[LinearOptions],
    train: ShardSet,
    labels: Tensor,
    index: Indices,
    order: Order,
    first: int,
    total: int,
) -> BatchSource:
    """Batches of new random crops: rank r encodes steps r, r + W, … of the rounds of W steps, W the number of ranks.

    A step's batch passes the network in chunks of ``forward_batch`` images, which are the same on any number of ranks.

    Args:
        context: Encoder, options and processes.
        train: The training images.
        labels: Their labels, int64 [N].
        index: The training images that ``order`` draws from.
        order: Order over ``index``.
        first: First step to read.
        total: Step after the last one.
    """
    world, options, batch = context.world, context.options, order.global_batch
    at_once = options.forward_batch
    mine, chunks = range(first + world.rank, total, world.size), -(-batch // at_once)
    view = ViewSpec(
        name="rrc_flip",
        size=context.encoder.meta["size"],
        augment=Augmentation(scale=(0.08, 1.0), flip=0.5, interpolation=options.interpolation),
    )
    passes = IndexBatches(
        range(len(mine) * chunks),
        lambda i: index[order.batch(mine[i // chunks])[i % chunks * at_once :][:at_once]],
        lambda i: order.epoch_of(mine[i // chunks]),
        min(batch, at_once),
    )
    stream = FeatureStream(
        context.encoder, train, view, passes, options.precision, seed=options.seed, threads=context.threads
    )
    context.exit_stack.enter_context(stream)

    def read(steps: range) -> Iterator[FeatureBatch]:
        x, error = torch.zeros(batch, context.encoder.width, device=world.device), None
        if world.rank < len(steps):
            try:
                x = torch.cat([next(stream)[0] for _ in range(chunks)])
            except (HpcsslError, OSError) as caught:
                error = as_eval_error(caught)
        raise_on_any_rank(world, "linear evaluation", error=error)
        gathered = torch.split(world.all_gather(x), batch)
        return (
            (gathered[i], labels[torch.from_numpy(index[order.batch(step)])].to(world.device))
            for i, step in enumerate(steps)
        )

    return BatchSource(read, world.size)
