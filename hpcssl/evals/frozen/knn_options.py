"""Published protocols of k-NN classification, and the options of the evaluation. [mem] marks what is from memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hpcssl.errors import ConfigError, EvalError, require_choice
from hpcssl.evals.common.options import FeatureOptions

ONE_LABEL = "1-NN where only one training image per class has a label, mean of random draws"
"""What the score ``one_label`` is, for wherever it is printed."""


@dataclass(frozen=True, kw_only=True)
class KnnProtocol:
    """One published protocol.

    Attributes:
        k: Numbers of neighbors of the majority votes.
        weighted_k: Numbers of neighbors of the weighted votes.
        temperature: Temperature of the weighted votes.
    """

    k: tuple[int, ...] = ()
    weighted_k: tuple[int, ...] = ()
    temperature: float = 0.07


PROTOCOLS = {
    "msf": KnnProtocol(k=(1, 20), weighted_k=(20,)),  # MSF eval_knn.py:459; the weighted vote is our addition
    "cmsf_semi": KnnProtocol(k=(1, 5, 10, 20)),  # CMSF semi_supervised/eval_knn.py:221
    "instdisc": KnnProtocol(weighted_k=(200,)),  # Wu et al. 2018 [mem]
    "dino": KnnProtocol(weighted_k=(10, 20, 100, 200)),  # dinov2 eval/knn.py, defaults of nb_knn and temperature
    "lightly": KnnProtocol(weighted_k=(200,), temperature=0.1),  # its three small benchmarks (BenchmarkModule)
    "moco_cifar": KnnProtocol(weighted_k=(200,), temperature=0.1),  # MoCo's CIFAR-10 demo
    "solo": KnnProtocol(weighted_k=(20,)),  # solo/utils/knn.py:30-31, cosine
}


def check_number_of_neighbors(options: KnnOptions, images: int) -> int:
    """Return the largest number of neighbors that is looked up; 0 for none.

    Args:
        options: The options.
        images: Number of training images.

    Raises:
        EvalError: There are fewer images than that.
    """
    protocol = options.resolve()
    largest = max((*protocol.k, *protocol.weighted_k), default=0)
    if largest > images:
        possible = [
            f"{name}=[{','.join(map(str, [k for k in values if k <= images] or [images]))}]"
            for name, values in (("k", protocol.k), ("weighted_k", protocol.weighted_k))
            if max(values, default=0) > images
        ]
        raise EvalError(
            "k-NN",
            got=f"k = {largest} with {images} training images",
            expected="at least k training images",
            fix=f"set {' and '.join(possible)}",
        )
    return largest


@dataclass(frozen=True, kw_only=True)
class KnnOptions(FeatureOptions):
    """Options of k-NN classification.

    ``k``, ``weighted_k`` and ``temperature`` replace the protocol's values where set.

    Attributes:
        view: Crop of the images, see ``EvalViewOptions``.
        interpolation: Filter of the resize, see ``EvalViewOptions``.
        forward_batch: Images per forward pass, see ``EvalViewOptions``.
        precision: Precision of the forward pass, see ``FeatureOptions``.
        feature_dtype: Precision of stored features, see ``FeatureOptions``.
        protocol: Name of a published protocol, a key of ``PROTOCOLS``.
        k: Numbers of neighbors of the majority votes, each at least 1 and given once; an empty list for no majority
            vote.
        weighted_k: Numbers of neighbors of the weighted votes, likewise; an empty list for no weighted vote.
        temperature: Temperature of the weighted votes, above 0.
        one_label_draws: Number of random draws of one labeled training image per class. The 1-NN accuracies of the
            draws are averaged (metric ``one_label``); 0 for none.
        seed: Seed of these draws.
    """

    protocol: str = "msf"
    k: list[int] | None = None
    weighted_k: list[int] | None = None
    temperature: float | None = None
    one_label_draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a value that is not allowed."""
        super().__post_init__()
        require_choice("evals.knn.protocol", self.protocol, PROTOCOLS)
        for name, values in (("k", self.k or []), ("weighted_k", self.weighted_k or [])):
            if any(k < 1 for k in values):
                raise ConfigError(
                    f"evals.knn.{name}",
                    got=list(values),
                    expected="numbers of neighbors, each at least 1",
                    fix=f"set {name}=[1,20]",
                )
            if len(set(values)) < len(values):
                raise ConfigError(
                    f"evals.knn.{name}",
                    got=list(values),
                    expected="each number of neighbors once",
                    fix=f"set {name}=[{','.join(map(str, dict.fromkeys(values)))}]",
                )
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(
                "evals.knn.temperature", got=self.temperature, expected="a number above 0", fix="set temperature=0.07"
            )
        if self.one_label_draws < 0:
            raise ConfigError(
                "evals.knn.one_label_draws",
                got=self.one_label_draws,
                expected="0 or more",
                fix="set one_label_draws=0 for none",
            )
        protocol = self.resolve()
        if self.temperature is not None and not protocol.weighted_k:
            raise ConfigError(
                "evals.knn.temperature",
                got=f"{self.temperature:g} without a weighted vote",
                expected="a weighted vote, which alone has a temperature",
                fix="set weighted_k=[20] as well, or remove temperature",
            )
        if not (protocol.k or protocol.weighted_k or self.one_label_draws):
            raise ConfigError(
                "evals.knn",
                got="no vote and no draw, so that there is no score",
                expected="one or more numbers of neighbors in k or weighted_k, or one_label_draws",
                fix="set k=[20], or remove k, weighted_k and one_label_draws to use the protocol's values",
            )

    def resolve(self) -> KnnProtocol:
        """Return the protocol with the options that are set in place of its values."""
        values: dict[str, Any] = {"k": self.k, "weighted_k": self.weighted_k, "temperature": self.temperature}
        return replace(PROTOCOLS[self.protocol], **{name: v for name, v in values.items() if v is not None})
