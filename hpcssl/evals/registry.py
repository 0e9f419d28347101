"""The evaluations by name.

To add an evaluation, add one entry to ``EVALS`` and one field to ``options.EvalsOptions``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, suggest
from hpcssl.evals.checks import check_labels, check_multi_labels
from hpcssl.evals.context import EvalContext
from hpcssl.evals.detection import evaluate as detection
from hpcssl.evals.detection.options import DetectOptions
from hpcssl.evals.finetune import evaluate as finetune
from hpcssl.evals.finetune.options import FinetuneOptions
from hpcssl.evals.frozen import knn, lowshot, svm, transfer
from hpcssl.evals.frozen.knn_options import KnnOptions
from hpcssl.evals.linear import evaluate as linear
from hpcssl.evals.linear.options import LinearOptions


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        options: Dataclass of its options.
        run: Computes the scores in percent, by name. A collective.
        check: Raises ``EvalError`` if the training set and the set to be scored cannot be used together.
        open_sets: For an evaluation with data sets of its own: options -> name of each data set -> its shard sets
            ``train``, ``val`` and ``test``. Each data set gets a result row. None if the recipe names the shards.
        summarize: The result rows of all data sets -> scores over all of them, or None if some are missing.
    """

    options: type[Any]
    run: Callable[[EvalContext[Any]], dict[str, float]]
    check: Callable[[ShardSet, ShardSet], None] = check_labels
    open_sets: Callable[[Any], dict[str, dict[str, ShardSet]]] | None = None
    summarize: Callable[[Sequence[dict[str, Any]]], dict[str, float] | None] | None = None


EVALS: dict[str, Evaluation] = {
    "knn": Evaluation(KnnOptions, knn.run),
    "linear": Evaluation(LinearOptions, linear.run),
    "finetune": Evaluation(FinetuneOptions, finetune.run),
    "svm": Evaluation(svm.SvmOptions, svm.run, check_multi_labels),
    "lowshot": Evaluation(lowshot.LowshotOptions, lowshot.run, check_multi_labels),
    "transfer": Evaluation(
        transfer.TransferOptions,
        transfer.run,
        check_multi_labels,
        transfer.open_data_sets,
        transfer.average_over_sets,
    ),
    "detect": Evaluation(DetectOptions, detection.run, detection.check_sets),
}


def get_evaluation(name: str) -> Evaluation:
    """Return an evaluation by name.

    Raises:
        ConfigError: There is no evaluation of this name.
    """
    if name not in EVALS:
        raise ConfigError("evaluation", got=repr(name), expected="the name of an evaluation", fix=suggest(name, EVALS))
    return EVALS[name]
