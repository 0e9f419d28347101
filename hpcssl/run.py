"""What commands and jobs do with a run folder: resolve its recipe, train, evaluate.

Training and evaluations do not import each other; they are combined here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcssl import config
from hpcssl.data.address import is_remote
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, Stopped
from hpcssl.evals import run as evals
from hpcssl.evals.online_knn import build_online_knn, load_evals_section
from hpcssl.evals.resolve import resolve_evaluation
from hpcssl.evals.rows import Row
from hpcssl.journal import set_up_logging
from hpcssl.nets.importers import WeightsSource
from hpcssl.run_dir import RunDir
from hpcssl.signals import Requeue, StopFlag
from hpcssl.train import main as training
from hpcssl.train import recipe as recipes
from hpcssl.train.checks.data_set import check_method
from hpcssl.train.options import MachineOptions
from hpcssl.train.recipe import Recipe, RecipeSource
from hpcssl.train.start.run_files import check_same_recipe


def compose(source: RecipeSource, overrides: config.Overrides, *, run_exists: bool = False) -> Recipe:
    """Compose a recipe, and check the sections that other packages read too.

    Args:
        source: See ``hpcssl.train.recipe.compose``.
        overrides: See there.
        run_exists: See there.

    Raises:
        ConfigError: For an unknown recipe or key, or a value that cannot work.
    """
    recipe = recipes.compose(source, overrides, run_exists=run_exists)
    if not run_exists:
        check_method(recipe)
    load_evals_section(recipe)
    return recipe


def resolve_for_run(recipe: Recipe, shards: ShardSet, run: RunDir) -> Recipe:
    """Return a recipe with absolute paths, after checking that the run folder can continue with it.

    A run can be continued with other machinery (devices, threads, checkpoint period, evaluations, paths), but never
    with another recipe.

    Args:
        recipe: The recipe, from ``compose``.
        shards: Its training shards.
        run: The run folder; it need not exist.

    Raises:
        ResumeError: If the run was started with another recipe; it names the keys that differ.
    """
    paths = {kind: getattr(recipe.data, kind) for kind in ("train", "val", "stage_dir")}
    absolute: dict[str, Any] = {kind: str(Path(p).absolute()) for kind, p in paths.items() if p and not is_remote(p)}
    check_same_recipe(run, recipe, shards.digest)
    return replace(recipe, data=replace(recipe.data, **absolute))


def train(
    run: RunDir,
    recipe: Recipe | None = None,
    *,
    stop: StopFlag,
    requeue: Callable[[list[str]], Requeue] | None = None,
    attempt: dict[str, Any] | None = None,
    on_hang: Callable[[str], None] | None = None,
    failure: Callable[[], str] = lambda: "",
    allow_pipe: str = "",
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Train a run folder, with k-NN evaluations during training if ``evals.knn_every_epochs`` asks for them.

    See ``hpcssl.train.main.train`` for the arguments.

    Returns:
        The exit code.
    """
    return training.train(
        run,
        recipe,
        stop=stop,
        requeue=requeue,
        attempt=attempt,
        build_online_evaluation=build_online_knn,
        on_hang=on_hang,
        failure=failure,
        allow_pipe=allow_pipe,
        prepare=prepare,
    )


def evaluate(
    name: str,
    overrides: config.Overrides,
    *,
    run: RunDir | None,
    weights: WeightsSource | Path | str | None,
    train: str | None,
    val: str | None,
    stage_dir: str,
    devices: str,
    step: int | str,
    stop: StopFlag,
) -> list[Row]:
    """Evaluate a run's encoder, or a weights file between two shard folders. All ranks call it.

    Args:
        name: Name of the evaluation.
        overrides: Options of the evaluation, as ``key=value`` or as a dict.
        run: Run folder; None with ``weights``.
        weights: Weights file; None with ``run``.
        train: Folder or address of the shards to learn from; by default those of the run.
        val: Folder or address of the shards to score on; by default those of the run.
        stage_dir: Folder for the shards of an address; empty for the one of the run.
        devices: ``cpu``, ``gpu`` or ``auto``.
        step: Which weights of the run: ``last``, ``first`` or a number of steps.
        stop: Set from outside to stop the evaluation.

    Returns:
        The result rows, computed or stored.

    Raises:
        ConfigError: Not exactly one of ``run`` and ``weights``, a step of ``weights``, or see
            ``hpcssl.evals.run.evaluate_run``.
        HpcsslError: See ``hpcssl.evals.run.evaluate_run``. ``Stopped`` after a request to stop.
    """
    _check_choice(run, weights, step)
    world = World.start(devices, stop=stop.is_set)
    training.set_up_torch(MachineOptions(devices=devices), world.device)
    set_up_logging(world.rank)
    given: dict[str, Any] = {"train": train, "val": val, "overrides": overrides}
    try:
        if run is not None:
            rows = evals.evaluate_run(name, run, world, step=step, stage_dir=stage_dir, stop=stop.is_set, **given)
        else:
            assert weights is not None
            options, sets = resolve_evaluation(name, {"data": {"stage_dir": stage_dir}}, **given)
            rows = evals.evaluate_sets(
                name, run=None, weights=weights, world=world, options=options, sets=sets, stop=stop.is_set
            )
    except Stopped:  # raised on all ranks; after another error they may still be in a collective
        world.close()
        raise
    world.close()
    return rows


def _check_choice(run: RunDir | None, weights: WeightsSource | Path | str | None, step: int | str) -> None:
    if (run is None) == (weights is None):
        raise ConfigError(
            "hpcssl eval",
            got="both or neither of --run and --weights",
            expected="one of them",
            fix="--run DIR evaluates a run's encoder, --weights FILE any exported one",
        )
    if weights is not None and step != "last":
        raise ConfigError(
            "hpcssl eval",
            got=f"--step {step} with --weights",
            expected="a step only with --run, which has the weights of several steps",
            fix="leave --step out, or name the run with --run",
        )
