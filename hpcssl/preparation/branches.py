"""Resolve the recipe of a run, which may start from a checkpoint of another run: ``--from RUN[@STEP]``."""

from __future__ import annotations

import logging
from dataclasses import replace

from hpcssl import config
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.launch import count_processes
from hpcssl.errors import ConfigError
from hpcssl.preparation.checks import check_start
from hpcssl.run import compose, resolve_for_run
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe as recipes
from hpcssl.train.checks.data_set import count_steps
from hpcssl.train.data import open_train_shards
from hpcssl.train.recipe import Recipe, RecipeSource
from hpcssl.train.start import branch, initial_weights
from hpcssl.train.start.branch import RunBranch

LOG = logging.getLogger("hpcssl")


def compose_start(
    source: RecipeSource, overrides: config.Overrides, run: RunDir, *, parent: str | None
) -> tuple[Recipe, RunBranch | None]:
    """Compose the recipe of a run, and find the weights file or the checkpoint that it starts from.

    Args:
        source: Packaged recipe, YAML file or values (``train/recipe.py``); ignored with ``parent``.
        overrides: Values to change, as ``key=value`` or as nested dicts.
        run: The folder of the run; it need not exist.
        parent: The checkpoint of another run that it starts from, as ``RUN[@STEP]``; None for none.

    Returns:
        The recipe; and the branch that has to be written once it passed ``compare_branch``, or None.

    Raises:
        ConfigError: A value that cannot work.
        ResumeError: There is no such checkpoint, or the run exists and has not started from it.
    """
    if parent is not None:
        return _compose_branch(parent, overrides, run)
    branch.check_no_interrupted_start(run)
    recipe = compose(source, overrides, run_exists=run.config.exists())
    return initial_weights.resolve(recipe, run), None


def _compose_branch(parent: str, overrides: config.Overrides, run: RunDir) -> tuple[Recipe, RunBranch | None]:
    """The recipe of a branch. If its run exists, the run's own values are the base, and nothing is left to write.

    The weights file of the base stays as it is recorded: the checkpoint takes its place, and it may be gone.
    """
    started = run.config.exists()
    if started:
        branch.check_resumed(parent, run)
        source, saved = run, None
    else:
        source, saved = branch.find_checkpoint(parent, run)
    base = recipes.read(source.config)
    recipe = replace(compose(str(source.config), overrides, run_exists=started), name=base.name)
    if recipe.model.weights != base.model.weights:
        raise ConfigError(
            "option --from with model.weights",
            got=recipe.model.weights or "no file",
            expected="no change, since the checkpoint holds all weights",
            fix="leave out model.weights; or start a new run from that file, without --from",
        )
    return recipe, None if saved is None else RunBranch(source, saved, {})


def resolve(
    source: RecipeSource, overrides: config.Overrides, run: RunDir, *, parent: str | None, allow_pipe: bool = False
) -> tuple[Recipe, RunBranch | None]:
    """Compose a recipe with absolute paths, and check it against its data and against the run folder.

    Everything that the first step would refuse is refused here. Nothing is written: the attempt stores the recipe when
    it holds the run's lock.

    Args:
        source: See ``compose_start``.
        overrides: See ``compose_start``.
        run: The run folder; it need not exist.
        parent: See ``compose_start``.
        allow_pipe: Whether ``data.train`` may be a shell command.

    Returns:
        The recipe; and the branch that the attempt has to write, or None.

    Raises:
        ConfigError: For an invalid recipe.
        DataError: If the shards cannot be opened.
        ResumeError: If the run was started with another recipe; it names the keys that differ.
    """
    recipe, start = compose_start(source, overrides, run, parent=parent)
    shards = open_train_shards(recipe, allow_pipe=allow_pipe)
    check_start(recipe, shards, run, world_size=count_processes(), is_branch=parent is not None)
    return resolve_for_run(recipe, shards, run), compare_branch(start, recipe, shards)


def write_branch(start: RunBranch | None, run: RunDir) -> None:
    """Write a branch into the folder of its run, and log where it starts. A run that exists by now is left alone.

    Args:
        start: What ``resolve`` returned.
        run: The folder, whose lock is held.

    Raises:
        ResumeError: See ``RunBranch.write``; or the run was created meanwhile, and does not start from this parent.
    """
    if start is None:
        return
    if run.config.exists():  # another command was faster
        branch.check_parent(start.source, start.saved.step, run)
        return
    start.write(run)
    LOG.info("%s", start.describe())


def compare_branch(start: RunBranch | None, recipe: Recipe, shards: ShardSet) -> RunBranch | None:
    """Return a branch with what it changes. Raises ``ResumeError`` for a change that its state does not allow."""
    if start is None:
        return None
    science = recipe.science(shards.digest, 1)
    # the size of local norm groups follows from the number of processes, and may change with it
    if recipe.model.norm != "ghost":
        science["model"]["norm_group_size"] = start.saved.manifest["science"]["model"]["norm_group_size"]
    changed = branch.find_changes(start.saved, science, count_steps(recipe, len(shards)))
    scope, before = recipe.model.norm, recipes.read(start.source.config).model.norm
    if scope != before:  # the science has only the size of the groups that follows from it
        changed["model.norm"] = [scope, before]
    return replace(start, changed=changed)
