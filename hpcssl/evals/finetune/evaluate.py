"""Fine-tuning of the whole network on labeled images, by the protocols of ``finetune/protocols.py``.

    logits = W f(x) + b        loss = cross-entropy        trained: W, b and every weight of f

on random resized crops (area 0.08 to 1) with flips, with one batch norm over the whole batch, and with separate
learning rates of backbone and head. ``--train`` names the labeled shards, such as 1 % or 10 % of ImageNet that
``hpcssl-shard subset --list`` wrote; the center crops of ``--val`` give the score.

A protocol is one trial or a grid of trials, run one after another. ``judge = val`` (OpenSelfSup, BSIM) reports the
trial that is best on the validation set, as the original does. ``judge = held_out`` (BYOL, appendix C.1) compares the
trials on labeled images held out of the training, and trains once more on all of them with the best values.

Every rank trains on its part of each batch. A run that is killed and started again ends with the same bits on one
rank, and on a CPU on any number of ranks. More ranks change the order of sums: in float64, 1, 2 and 4 ranks agree to
1e-8; in float32 each step rounds and training amplifies it, so that scores may differ in their last digits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpcssl.errors import EvalError
from hpcssl.evals.common import selection
from hpcssl.evals.context import EvalContext
from hpcssl.evals.finetune.options import FinetuneOptions
from hpcssl.evals.finetune.protocols import FinetuneProtocol
from hpcssl.evals.finetune.trials import Trial, TrialRunner


def run(context: EvalContext[FinetuneOptions]) -> dict[str, float]:
    """Fine-tuning: accuracy in percent on the validation set. A collective.

    Returns:
        ``top1`` and ``top5`` of the epoch that the protocol reports; where it scores every epoch, also ``top1_best``,
        ``top5_best``, ``top1_last`` and ``top5_last``. The row's details hold the chosen values and the score of each
        trial.
    """
    protocol = context.options.resolve(context.train)
    runner = TrialRunner(context, protocol)
    everything, held = np.arange(len(context.train)), np.empty(0, np.int64)
    grid = [(lr, head_lr, epochs) for epochs in protocol.epochs for lr, head_lr in protocol.rates]
    if protocol.judge == "held_out" and len(grid) > 1:
        held = selection.draw_held_out(
            len(everything), len(context.train.classes), context.options.seed, context.options.held_out
        )
    _check_batch(len(everything) - len(held), protocol.batch, context.world.size)
    runner.resume()
    val_images = (context.val, np.arange(len(context.val)))
    train_index, judge = (
        (np.setdiff1d(everything, held), (context.train, held)) if len(held) else (everything, val_images)
    )
    trials = [
        Trial(f"lr{lr:g}_head{head_lr:g}_ep{epochs}", lr, head_lr, epochs, train_index, judge)
        for lr, head_lr, epochs in grid
    ]
    scores = {trial.name: runner.run_trial(trial) for trial in trials}
    best = _choose(context, protocol, trials, scores)
    final = scores[best.name]
    if len(held):
        context.details["held_out"] = len(held)
        final = runner.run_trial(replace(best, name="final", train_index=everything, judge=val_images))
        if not final:
            raise _diverged("with the chosen learning rates")
    return dict(final[-1]) if protocol.report == "last" else selection.summarize_epochs(final, protocol.report)


def _choose(
    context: EvalContext[FinetuneOptions],
    protocol: FinetuneProtocol,
    trials: list[Trial],
    scores: dict[str, list[dict[str, float]]],
) -> Trial:
    """The trial with the best top-1 accuracy, the first of equal ones; its values go into the row's details."""
    top1 = {name: selection.select_epoch(one, protocol.report)["top1"] for name, one in scores.items() if one}
    if not top1:
        raise _diverged("in every trial")
    best_name = max(top1, key=lambda name: top1[name])
    best = next(trial for trial in trials if trial.name == best_name)
    context.details.update(lr=best.lr, head_lr=best.head_lr, epochs=best.epochs, weight_decay=protocol.weight_decay)
    if len(trials) > 1:  # None for a trial that has diverged
        context.details["trials"] = {name: top1.get(name) for name in scores}
    return best


def _check_batch(samples: int, batch: int, size: int) -> None:
    if samples < batch:
        largest = samples - samples % size
        raise EvalError(
            "fine-tuning",
            got=f"{samples} labeled images and batches of {batch}",
            expected="at least one whole batch",
            fix=f"set train_batch={largest} or less" if largest >= 2 else "name a set of more images",
        )
    if batch % size:
        raise EvalError(
            "fine-tuning",
            got=f"a batch of {batch} on {size} ranks",
            expected="equal parts",
            fix=f"set train_batch={max(1, batch // size) * size}, or start another number of ranks",
        )


def _diverged(where: str) -> EvalError:
    return EvalError(
        "fine-tuning",
        got=f"a loss that is not finite {where}",
        expected="finite numbers",
        fix="lower evals.finetune.lr and head_lr; if that does not help, the weights themselves have diverged: "
        "evaluate an earlier step",
    )
