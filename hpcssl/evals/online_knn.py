"""k-NN classification inside a training run, every few epochs.

The training loop calls ``OnlineKnn`` without knowing what it computes: the training code does not depend on the
evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcssl import config
from hpcssl.data.cache import open_shard_set
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, Stopped
from hpcssl.evals.checks import check_labels
from hpcssl.evals.common.sync import StopCheck
from hpcssl.evals.frozen.knn_options import check_number_of_neighbors
from hpcssl.evals.options import EvalsOptions, parse_evals_section
from hpcssl.evals.run import evaluate
from hpcssl.run_dir import RunDir

if TYPE_CHECKING:
    from typing import Protocol

    class DataSection(Protocol):
        """What is read of the recipe's section ``data``."""

        @property
        def train(self) -> str:
            """Training shards."""

        @property
        def val(self) -> str:
            """Validation shards."""

        @property
        def stage_dir(self) -> str:
            """Folder on the node's disk for shards; empty for none."""

        @property
        def stage_limit_gb(self) -> float:
            """Gigabytes of shards to keep there; 0 for all."""

        @property
        def stall_timeout_seconds(self) -> float:
            """Seconds without a byte after which a transfer is cut."""

        @property
        def download_attempts(self) -> int:
            """Attempts per file."""

    class MachineSection(Protocol):
        """What is read of the recipe's section ``machine``."""

        @property
        def loader_threads(self) -> int:
            """Threads of this process that load images."""

    class RecipeSections(Protocol):
        """What is read of a recipe. Its class belongs to the training code, which evaluations do not import."""

        @property
        def name(self) -> str:
            """Name of the recipe."""

        @property
        def evals(self) -> dict[str, Any]:
            """Options of the evaluations."""

        @property
        def data(self) -> DataSection:
            """The training and validation shards."""

        @property
        def machine(self) -> MachineSection:
            """Threads of this process."""


@dataclass
class OnlineKnn:
    """Scores exported weights by k-NN. The result rows are those of ``hpcssl eval knn``.

    Features are not kept in the run folder: each is used once.

    Attributes:
        run: The run folder.
        world: The processes of the training.
        train: Training images, the bank of neighbors.
        val: Images that are classified.
        every_epochs: Epochs between two evaluations.
        stop: Whether this process was asked to stop.
        options: Option values that differ from the defaults of ``KnnOptions``.
        threads: Loader threads of this process.
    """

    run: RunDir
    world: World
    train: ShardSet
    val: ShardSet
    every_epochs: int
    stop: StopCheck
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 1

    def __call__(self, path: Path, step: int) -> dict[str, float] | None:
        """Return the scores in percent of a weights file. A collective.

        Args:
            path: The weights file.
            step: The training step it was exported at.

        Returns:
            Scores by name; None on every rank if one rank was asked to stop.
        """
        try:
            row = evaluate(
                "knn",
                run=self.run,
                weights=path,
                train=self.train,
                val=self.val,
                world=self.world,
                options=self.options,
                stop=self.stop,
                threads=self.threads,
                cache=False,
            )
        except Stopped:
            return None
        metrics: dict[str, float] = row["metrics"]
        return metrics


def load_evals_section(recipe: RecipeSections) -> EvalsOptions:
    """Return the typed ``evals`` section of a recipe, checked against its other sections.

    Raises:
        ConfigError: See ``parse_evals_section``, and for an online k-NN without the data it needs.
    """
    section = parse_evals_section(recipe.evals, recipe.name)
    if section.knn_every_epochs and not recipe.data.val:
        raise ConfigError(
            "evals.knn_every_epochs",
            got=f"{section.knn_every_epochs} without data.val",
            expected="validation shards",
            fix="add data.val=FOLDER, or set evals.knn_every_epochs=0",
        )
    if section.knn_every_epochs and recipe.data.stage_limit_gb:
        raise ConfigError(
            "evals.knn_every_epochs",
            got=f"{section.knn_every_epochs} with data.stage_limit_gb={recipe.data.stage_limit_gb:g}",
            expected="space for all training shards, which k-NN reads",
            fix="set evals.knn_every_epochs=0 or data.stage_limit_gb=0",
        )
    return section


def check_online_knn(recipe: RecipeSections, train: ShardSet, val: ShardSet) -> None:
    """Check that the online k-NN of a recipe, if it asks for one, can score its shards.

    Args:
        recipe: The recipe.
        train: Its training shards.
        val: Its validation shards.

    Raises:
        ConfigError: See ``load_evals_section``, and for more neighbors than training images.
        EvalError: Shards without labels, or of different classes.
    """
    section = load_evals_section(recipe)
    if section.knn_every_epochs == 0:
        return
    check_labels(train, val)
    check_number_of_neighbors(section.knn, len(train))


def build_online_knn(recipe: RecipeSections, run: RunDir, world: World, stop: StopCheck) -> OnlineKnn | None:
    """Build the online k-NN that ``evals.knn_every_epochs`` of a recipe asks for, or return None.

    It opens and checks the shards now, so that a wrong path stops the training before its first step.

    Args:
        recipe: The recipe.
        run: The run folder that receives the result rows.
        world: The processes of the training.
        stop: Whether this process was asked to stop.

    Raises:
        ConfigError: See ``load_evals_section``.
        DataError: Shards that cannot be opened.
        EvalError: Shards without labels, or of different classes.
    """
    section = load_evals_section(recipe)
    if section.knn_every_epochs == 0:
        return None
    data = recipe.data
    train, val = (
        open_shard_set(
            address,
            stage=data.stage_dir,
            key=key,
            stall_s=data.stall_timeout_seconds,
            tries=data.download_attempts,
        )
        for key, address in (("data.train (k-NN reads all of it)", data.train), ("data.val", data.val))
    )
    check_online_knn(recipe, train, val)
    return OnlineKnn(
        run,
        world,
        train,
        val,
        section.knn_every_epochs,
        stop,
        config.as_dict(section.knn),
        recipe.machine.loader_threads,
    )
