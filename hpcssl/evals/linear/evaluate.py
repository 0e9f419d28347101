"""Linear classification on a frozen backbone, by the protocols of ``linear/protocols.py``.

    logits = x W^T + b        loss = cross-entropy        x = f, the avgpool feature of a new crop

With ``standardize`` (MSF and CMSF, eval_linear.py:200-215), x is the feature scaled to unit length and then by the
fixed mean and variance of the training features (``training.build_standardizer``).

The heads are scored on center crops after every epoch. The score is that of the best epoch or of the last one, as the
protocol reports it; the result row has both.

A protocol with a sweep (BYOL, appendix C.1) holds out a part of the training set, trains one head per rate on the
rest, all on the same pass, takes the rate with the best score on the held-out part, and trains that one on everything.
The validation set chooses no rate.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hpcssl.errors import EvalError
from hpcssl.evals.common import selection, state
from hpcssl.evals.common.features import LabeledImages
from hpcssl.evals.common.images import Indices
from hpcssl.evals.context import EvalContext
from hpcssl.evals.linear.options import LinearOptions
from hpcssl.evals.linear.protocols import LinearProtocol
from hpcssl.evals.linear.training import HeadTask, HeadTrainer


def run(context: EvalContext[LinearOptions]) -> dict[str, float]:
    """Linear classification: accuracy in percent on the validation set. A collective.

    Returns:
        ``top1`` and ``top5`` of the epoch that the protocol reports; ``top1_best``, ``top5_best`` of the best epoch (by
        top-1, the earliest), ``top1_last``, ``top5_last`` of the last one. The row's details hold the learning rate
        and the held-out scores of a sweep.
    """
    return evaluate_linear(context, context.train, context.val)


def evaluate_linear(context: EvalContext[LinearOptions], train: LabeledImages, val: LabeledImages) -> dict[str, float]:
    """``run`` on explicit sets, for an evaluation that trains the head on several sets together. A collective.

    Args:
        context: Encoder, options and processes; its sets are not used.
        train: Training images. Several sets together only for a protocol that trains on stored features.
        val: Images that are scored.
    """
    options = context.options
    protocol = options.resolve()
    if options.interpolation == "auto":
        options = replace(options, interpolation=protocol.interpolation)
        context = context.with_options(options)
    samples = len(train)
    held = np.empty(0, np.int64)
    if protocol.lr_sweep:
        held = selection.draw_held_out(samples, len(train.classes), options.seed, options.held_out)
    _check_batch(samples - len(held), protocol)
    needs_features = protocol.standardize or protocol.augment == "center" or len(held) > 0
    features = context.extract_features(train) if needs_features else None
    val_features = context.extract_features(val)
    trainer = HeadTrainer(context, protocol, train, features)
    sweep_scores = _sweep(trainer, samples, held)
    lr = protocol.lr if sweep_scores is None else protocol.lr_sweep[int(np.argmax(sweep_scores))]
    everything = torch.arange(len(val_features))
    task = HeadTask(
        "final",
        (lr,),
        np.arange(samples),
        lambda: trainer.inputs(val_features, everything),
        {"swept": sweep_scores},
    )
    scores = trainer.train(task)
    context.details["lr"] = lr
    if sweep_scores is not None:
        context.details["held_out"] = {
            "images": len(held),
            "top1": dict(zip(map(str, protocol.lr_sweep), sweep_scores, strict=True)),
        }
    return selection.summarize_epochs([score for (score,) in scores], protocol.report)


def _check_batch(samples: int, protocol: LinearProtocol) -> None:
    if samples < protocol.batch:
        raise EvalError(
            "linear evaluation",
            got=f"{samples} training images and batches of {protocol.batch}",
            expected="at least one whole batch",
            fix=f"set train_batch={samples} or less",
        )


def _sweep(trainer: HeadTrainer, samples: int, held: Indices) -> list[float] | None:
    """Held-out top-1 accuracy in percent of each rate of the sweep, or None without a sweep. A collective."""
    context, protocol, world = trainer.context, trainer.protocol, trainer.world
    saved = state.read(context.state_file, context.identity) if world.is_main else None
    note: dict[str, Any] = json.loads(world.broadcast_text(json.dumps(saved[1] if saved else {})))
    sweep_scores: list[float] | None = note.get("swept")
    features = trainer.features
    if len(held) and sweep_scores is None and features is not None:
        kept = np.setdiff1d(np.arange(samples), held)
        task = HeadTask("sweep", protocol.lr_sweep, kept, lambda: trainer.inputs(features, torch.from_numpy(held)))
        scores = trainer.train(task)
        sweep_scores = [selection.select_epoch(one, protocol.report)["top1"] for one in zip(*scores, strict=True)]
    return sweep_scores
