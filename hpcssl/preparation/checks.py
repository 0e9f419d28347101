"""The checks of a recipe that is about to start, of training and evaluations together."""

from __future__ import annotations

import logging

from hpcssl.data.address import is_remote
from hpcssl.data.shards import INDEX, ROWS, ShardSet
from hpcssl.distributed.launch import is_main_process
from hpcssl.errors import ConfigError
from hpcssl.evals.online_knn import check_online_knn, load_evals_section
from hpcssl.run_dir import RunDir
from hpcssl.train import world_sizes
from hpcssl.train.builders import build_method
from hpcssl.train.checks.data_set import check_data_set, describe_large_bank
from hpcssl.train.data import open_val_shards
from hpcssl.train.recipe import Recipe
from hpcssl.train.start import initial_weights

LOG = logging.getLogger("hpcssl")


def check_start(
    recipe: Recipe,
    shards: ShardSet,
    run: RunDir,
    *,
    world_size: int | None,
    val: ShardSet | None = None,
    is_branch: bool = False,
) -> ShardSet | None:
    """Check a recipe against its data, weights file and number of processes, before anything is written.

    A run that exists is held only to what its next attempt needs: the checks may be newer than the run.
    ``hpcssl.run.resolve_for_run`` compares its recipe with the recorded one.

    Every process checks, so that all of them end alike; only the main one warns.

    Args:
        recipe: The recipe, from ``compose`` and ``initial_weights.resolve``.
        shards: Its training shards.
        run: The run folder; it need not exist.
        world_size: Number of processes; None if it is not known yet.
        val: Its validation shards, if they are open already.
        is_branch: Whether the run starts from a checkpoint of another one, so that no weights file is read.

    Returns:
        The validation shards; None if they are not needed.

    Raises:
        HpcsslError: What the first step would refuse.
    """
    if run.config.exists():
        if run.finished:
            return val
        if world_size is not None:
            world_sizes.check(recipe, world_size, needs_whole_batch=build_method(recipe).needs_whole_batch)
        needs_val = load_evals_section(recipe).knn_every_epochs > 0
    else:
        _check_new_folder(run)
        check_data_set(recipe, shards, world_size)
        if not is_branch:
            initial_weights.check(recipe)
        if is_main_process() and (warning := describe_large_bank(recipe, len(shards))):
            LOG.warning("%s", warning)
        needs_val = bool(recipe.data.val)
    if needs_val:
        is_train = recipe.data.val == recipe.data.train and not is_remote(recipe.data.val)
        val = val or (shards if is_train else open_val_shards(recipe))
        check_online_knn(recipe, shards, val)
    return val


def _check_new_folder(run: RunDir) -> None:
    """Refuse to mix the files of a run with shards, which a mistaken ``--run`` would do."""
    if (run.root / INDEX).is_file() and (run.root / ROWS).is_file():
        raise ConfigError(
            f"run folder {run.root}",
            got="a shard folder",
            expected="a folder for this run alone, which need not exist",
            fix=f"name another one, such as runs/{run.root.name}",
        )
