"""The ``evals`` section of a recipe: the options of each evaluation. It changes no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcssl import config
from hpcssl.errors import ConfigError
from hpcssl.evals.detection.options import DetectOptions
from hpcssl.evals.finetune.options import FinetuneOptions
from hpcssl.evals.frozen.knn_options import KnnOptions
from hpcssl.evals.frozen.lowshot import LowshotOptions
from hpcssl.evals.frozen.svm import SvmOptions
from hpcssl.evals.frozen.transfer import TransferOptions
from hpcssl.evals.linear.options import LinearOptions
from hpcssl.evals.renames import SECTION_RENAMES


@dataclass(frozen=True, kw_only=True)
class EvalsOptions:
    """Options of the evaluations, and of the k-NN evaluation inside a training run.

    Attributes:
        knn: k-nearest-neighbor classification, also inside the training run.
        linear: Linear classification on frozen features.
        finetune: Fine-tuning on labeled images.
        svm: Support vector machines on frozen features.
        lowshot: Support vector machines on few images per class.
        transfer: Linear classification of other data sets.
        detect: Object detection.
        baseline: Whether an evaluation of the last step also scores the weights of step 0.
        knn_every_epochs: Epochs between two k-NN evaluations inside the training run; 0 for none.
    """

    knn: KnnOptions = field(default_factory=KnnOptions)
    linear: LinearOptions = field(default_factory=LinearOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    svm: SvmOptions = field(default_factory=SvmOptions)
    lowshot: LowshotOptions = field(default_factory=LowshotOptions)
    transfer: TransferOptions = field(default_factory=TransferOptions)
    detect: DetectOptions = field(default_factory=DetectOptions)
    baseline: bool = True
    knn_every_epochs: int = 0

    def __post_init__(self) -> None:
        if self.knn_every_epochs < 0:
            raise ConfigError(
                "evals.knn_every_epochs",
                got=self.knn_every_epochs,
                expected="0 or more",
                fix="set evals.knn_every_epochs=0 for none",
            )


def parse_evals_section(values: Mapping[str, Any], recipe: str) -> EvalsOptions:
    """Return the typed ``evals`` section of a recipe.

    Args:
        values: The section as nested plain values.
        recipe: Name of the recipe, for messages.

    Raises:
        ConfigError: A former or unknown key, or a value that is not allowed.
    """
    where = f"recipe {recipe}, section evals"
    section: EvalsOptions = config.load(EvalsOptions, values, where=where, renames=SECTION_RENAMES)
    return section
