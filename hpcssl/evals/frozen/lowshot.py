"""Low-shot SVMs: trained on k images of a class and k per other class without it, five draws of each k.

As in VISSL and OpenSelfSup (svm_low_shot_trainer.py ``aggregate_stats``, aggregate_low_shot_svm_stats.py): each draw is
tested at each cost; the cost with the best mean over the draws gives the score, with the standard deviation over the
draws at that cost (of the population: divided by their number). The cost is thus chosen on the test images, as
published.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals.context import EvalContext
from hpcssl.evals.frozen import linear_svc
from hpcssl.evals.frozen.svm import SvmOptions, check_examples, class_targets, extract_svm_features


@dataclass(frozen=True, kw_only=True)
class LowshotOptions(SvmOptions):
    """Options of the low-shot SVM evaluation.

    Attributes:
        view: Crop of the images; ``auto`` for the protocol's.
        interpolation: Filter of the resize, see ``EvalViewOptions``.
        forward_batch: Images per forward pass, see ``EvalViewOptions``.
        precision: Precision of the forward pass, see ``FeatureOptions``.
        feature_dtype: Precision of stored features, see ``FeatureOptions``.
        protocol: Name of a published protocol, a key of ``svm.PROTOCOLS``.
        costs: Costs C to choose among, each above 0.
        feature: Feature, see ``SvmOptions``.
        ap: Definition of average precision, see ``SvmOptions``.
        seed: Seed of liblinear's order, and of the samples.
        shots: Numbers of training images per class, k, each at least 1.
        draws: Independent samples of each k, at least 1.
    """

    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 96])
    draws: int = 5

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        super().__post_init__()
        for name, values in (("shots", self.shots), ("draws", [self.draws])):
            if not values or min(values) < 1:
                raise ConfigError(
                    f"evals.lowshot.{name}",
                    got=getattr(self, name),
                    expected="numbers of at least 1",
                    fix="remove shots and draws to use the protocol's [1,2,4,8,16,32,64,96] and 5",
                )


def run(context: EvalContext[LowshotOptions]) -> dict[str, float]:
    """Low-shot SVM classification: mean average precision in percent on the validation set. A collective.

    Returns:
        ``lowshot_k{k}``, the mean over classes and draws, and ``lowshot_k{k}_std``, the standard deviation over draws.
        The row's details hold the cost of each k.
    """
    options, protocol = context.options, context.options.resolve()
    targets, test_targets = class_targets(context.train), class_targets(context.val)
    classes, shots = targets.shape[1], list(options.shots)
    if classes < 2:
        raise EvalError(
            f"shard folder {context.train.root}",
            got="one class",
            expected="two or more, since k images per other class are the negatives",
            fix="name shards of more classes, or use svm",
        )
    check_examples(context, positives=max(shots), negatives=(classes - 1) * max(shots))
    x, test_x = extract_svm_features(context, protocol.feature, protocol.view_lowshot)
    table = context.parallel_fits("low-shot SVM").table(
        "test",
        len(shots) * options.draws * classes,
        len(protocol.costs),
        linear_svc.fit_low_shot,
        x,
        targets,
        test_x,
        test_targets,
        protocol.costs,
        options.seed,
        protocol.ap,
        shots,
        options.draws,
        workers=context.threads,
    )
    by_draw = table.view(len(shots), options.draws, classes, -1).mean(2)  # [k, draw, cost]
    metrics, chosen = {}, {}
    for k, scores in zip(shots, by_draw, strict=True):
        best = int(scores.mean(0).argmax())
        metrics[f"lowshot_k{k}"] = 100 * float(scores[:, best].mean())
        metrics[f"lowshot_k{k}_std"] = 100 * float(scores[:, best].std(correction=0))
        chosen[f"k{k}"] = protocol.costs[best]
    context.details["cost"] = chosen
    return metrics
