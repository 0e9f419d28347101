"""The ``evals`` section of a recipe, put together from the options of each evaluation. It changes no training."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcssl.evals.detect import DetectOptions
from hpcssl.evals.finetune import FinetuneOptions
from hpcssl.evals.knn import KnnOptions
from hpcssl.evals.linear import LinearOptions
from hpcssl.evals.lowshot import LowshotOptions
from hpcssl.evals.svm import SvmOptions
from hpcssl.evals.transfer import TransferOptions


@dataclass(frozen=True, kw_only=True)
class EvalsOptions:
    """``baseline``: evaluate the untrained weights of step 0 as well. ``every_epochs``: k-NN inside the training
    run, 0 for none.
    """

    knn: KnnOptions = field(default_factory=KnnOptions)
    linear: LinearOptions = field(default_factory=LinearOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    svm: SvmOptions = field(default_factory=SvmOptions)
    lowshot: LowshotOptions = field(default_factory=LowshotOptions)
    transfer: TransferOptions = field(default_factory=TransferOptions)
    detect: DetectOptions = field(default_factory=DetectOptions)
    baseline: bool = True
    every_epochs: int = 0
