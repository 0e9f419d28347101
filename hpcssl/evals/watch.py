"""k-NN inside a training run: what the trainer calls every few epochs without knowing what it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hpcssl import config
from hpcssl.data.cache import opened
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError
from hpcssl.evals.options import EvalsOptions
from hpcssl.evals.run import check_labels, evaluate
from hpcssl.evals.together import Stop, Stopped
from hpcssl.files import RunDir
from hpcssl.world import World


@dataclass
class KnnWatch:
    """Scores of exported weights in percent, by name. Its rows are those of ``hpcssl eval knn``; features are not
    kept on disk."""

    run: RunDir
    world: World
    train: ShardSet
    val: ShardSet
    every_epochs: int
    stop: Stop
    options: dict = field(default_factory=dict)
    threads: int = 1

    def __call__(self, path: Path, step: int) -> dict[str, float] | None:
        """All ranks call it; None on all of them if a stop was asked for on one."""
        try:
            return evaluate("knn", run=self.run, weights=path, train=self.train, val=self.val, world=self.world,
                            options=self.options, stop=self.stop, threads=self.threads, cache=False)["metrics"]
        except Stopped:
            return None


def check(recipe) -> EvalsOptions:
    """The typed ``evals`` section. Raises ``ConfigError`` for what it cannot mean, before anything starts."""
    section = config.load(EvalsOptions, recipe.evals, where=f"recipe {recipe.name}, section evals")
    if section.every_epochs and not recipe.data.val:
        raise ConfigError("evals.every_epochs", got=f"{section.every_epochs} without data.val",
                          expected="validation shards", mend="add data.val=FOLDER, or evals.every_epochs=0")
    if section.every_epochs and recipe.data.stage_gb:
        raise ConfigError("evals.every_epochs", got=f"{section.every_epochs} with data.stage_gb="
                          f"{recipe.data.stage_gb:g}", expected="room for all training shards, which k-NN reads",
                          mend="set evals.every_epochs=0 or data.stage_gb=0")
    return section


def watch(recipe, run: RunDir, world: World, stop: Stop) -> KnnWatch | None:
    """The watch that ``evals.every_epochs`` of a recipe asks for, or None. Raises ``ConfigError`` and ``DataError``
    before the training starts, not at its first look."""
    section = check(recipe)
    if section.every_epochs == 0:
        return None
    data = recipe.data
    train, val = (opened(address, stage=data.stage, key=key, stall_s=data.stall_seconds, tries=data.tries)
                  for key, address in (("data.train, of which k-NN reads all,", data.train), ("data.val", data.val)))
    check_labels(train, val)
    return KnnWatch(run, world, train, val, section.every_epochs, stop, config.as_dict(section.knn),
                    recipe.machine.loader_threads)
