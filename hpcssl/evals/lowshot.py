"""Low-shot SVMs: trained on k images of a class and k per other class without it, five draws of each k.

As in VISSL and OpenSelfSup (svm_low_shot_trainer.py ``aggregate_stats``, aggregate_low_shot_svm_stats.py): each draw is
tested at each cost; the cost with the best mean over the draws is the score, with the deviation over the draws at
that cost (of the population: divided by their number). The cost is thus chosen on the test images, as published.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcssl.errors import ConfigError
from hpcssl.evals import linear_svc
from hpcssl.evals.jobs import Jobs
from hpcssl.evals.svm import SvmOptions, check, features, targets_of


@dataclass(frozen=True, kw_only=True)
class LowshotOptions(SvmOptions):
    """``k``: numbers of images of a class; ``draws``: independent samples of each."""

    k: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 96])
    draws: int = 5

    def __post_init__(self):
        super().__post_init__()
        for name, values in (("k", self.k), ("draws", [self.draws])):
            if not values or min(values) < 1:
                raise ConfigError(f"evals.lowshot.{name}", got=getattr(self, name), expected="numbers from 1",
                                  mend="k=[1,2,4,8,16,32,64,96] and draws=5 are the protocol")


def run(context) -> dict[str, float]:
    """Mean average precision in percent, ``lowshot_k{k}`` and its deviation ``lowshot_k{k}_std``."""
    options, protocol = context.options, context.options.resolve()
    targets, test_targets = targets_of(context.train), targets_of(context.val)
    classes, shots = targets.shape[1], list(options.k)
    check(context, positives=max(shots), negatives=(classes - 1) * max(shots))
    x, test_x = features(context, protocol.feature, protocol.view_lowshot)
    table = Jobs(context, "low-shot SVM").table(
        "test", len(shots) * options.draws * classes, len(protocol.costs), linear_svc.low_shot, x, targets, test_x,
        test_targets, protocol.costs, options.seed, protocol.ap, shots, options.draws, workers=context.threads)
    by_draw = table.view(len(shots), options.draws, classes, -1).mean(2)  # [k, draw, cost]
    metrics, chosen = {}, {}
    for k, scores in zip(shots, by_draw, strict=True):
        best = int(scores.mean(0).argmax())
        metrics |= {f"lowshot_k{k}": 100 * float(scores[:, best].mean()),
                    f"lowshot_k{k}_std": 100 * float(scores[:, best].std(correction=0))}
        chosen[f"k{k}"] = protocol.costs[best]
    context.details["cost"] = chosen
    return metrics
