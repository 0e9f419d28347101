"""What the runner hands to an evaluation: options, encoder, data, processes, and where to keep unfinished work."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.features import ConcatenatedSets, Features, LabeledImages
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.common.parallel_fits import ParallelFits
from hpcssl.evals.common.sync import StopCheck

OptionsT_co = TypeVar("OptionsT_co", covariant=True)
OtherOptionsT = TypeVar("OtherOptionsT")


@dataclass(frozen=True, kw_only=True)
class EvalContext(Generic[OptionsT_co]):
    """The inputs of one evaluation.

    Attributes:
        options: Options of the evaluation.
        encoder: The encoder to evaluate.
        train: Training images.
        val: Images that are scored.
        world: The processes that share the work.
        stop: Whether this process was asked to stop.
        identity: sha256 of everything that decides the scores.
        test: Images that are scored once at the end, for evaluations with data sets of their own; else None.
        feature_dir: Folder that keeps finished features, or None.
        state_file: File that keeps the state of the unfinished evaluation for its next attempt, or None.
        threads: CPU threads of this process, for loaders and fits.
        exit_stack: Closed when the evaluation ends, for whatever reason.
        details: Plain values that rank 0 stores in the result row beside the scores. Filled by the evaluation.
    """

    options: OptionsT_co
    encoder: FrozenEncoder
    train: ShardSet
    val: ShardSet
    world: World
    stop: StopCheck
    identity: str
    test: ShardSet | None = None
    feature_dir: Path | None = None
    state_file: Path | None = None
    threads: int = 1
    exit_stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    details: dict[str, Any] = field(default_factory=dict)

    def with_options(self, options: OtherOptionsT) -> EvalContext[OtherOptionsT]:
        """The same context with other options. ``details`` and ``exit_stack`` are shared."""
        return cast("EvalContext[OtherOptionsT]", replace(self, options=cast(Any, options)))

    def extract_features(self: EvalContext[FeatureOptions], data: LabeledImages) -> Features:
        """Compute or read the features of a set with the options of this context. A collective.

        Raises:
            EvalError: See ``extract.extract_features``.
            Stopped: After a request to stop.
        """
        if isinstance(data, ConcatenatedSets):
            features = [self.extract_features(part) for part in data.sets]
            return Features([part for one in features for part in one.parts], data.labels, data.classes)
        return extract_features(
            self.encoder,
            data,
            self.options,
            self.world,
            root=self.feature_dir,
            threads=self.threads,
            stop=self.stop,
        )

    def parallel_fits(self, what: str) -> ParallelFits:
        """Result tables of independent fits, kept in the state file. ``what`` names the evaluation in messages."""
        return ParallelFits(what, world=self.world, stop=self.stop, state_file=self.state_file, identity=self.identity)
