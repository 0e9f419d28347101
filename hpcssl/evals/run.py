"""Running evaluations: by name, on exported weights and shard sets, each identical evaluation once.

``hpcssl eval``, SLURM jobs and the k-NN inside a training run all call ``evaluate``. The score of an evaluation goes
into a result row (``rows.py``); an evaluation whose row exists is not computed again.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from hpcssl import config, files
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.set_content import verify_content
from hpcssl.evals.common.sync import StopCheck, never_stop
from hpcssl.evals.context import EvalContext
from hpcssl.evals.registry import get_evaluation
from hpcssl.evals.resolve import check_row_sets, load_options, resolve_evaluation, select_weights, split_by_row
from hpcssl.evals.rows import (
    Row,
    build_row,
    build_summary_row,
    compute_identity,
    find_row,
    read_rows,
    store_row,
    summary_identity,
)
from hpcssl.nets.importers import WeightsSource
from hpcssl.run_dir import RunDir

LOG = logging.getLogger("hpcssl")


def evaluate(
    name: str,
    *,
    run: RunDir | None,
    weights: WeightsSource | Path | str,
    train: ShardSet,
    val: ShardSet,
    world: World,
    test: ShardSet | None = None,
    options: dict[str, Any] | None = None,
    stop: StopCheck | None = None,
    threads: int | None = None,
    cache: bool = True,
) -> Row:
    """Return the result row of one evaluation: computed, or read from the run folder if it exists. A collective.

    Args:
        name: The evaluation, a key of ``registry.EVALS``.
        run: Folder that receives the row and keeps unfinished work; with None, a kill loses everything.
        weights: Weights file of this project or of another known one.
        train: Training images.
        val: Images that are scored.
        world: The processes that share the work.
        test: Third set of an evaluation with data sets of its own.
        options: Option values that differ from the defaults.
        stop: Whether this process was asked to stop.
        threads: CPU threads of this process; None for its share of the available cores.
        cache: Whether features are kept in the run folder.

    Raises:
        ConfigError: Unknown evaluation or options.
        EvalError: Weights, images or labels that cannot be used.
        Stopped: After a request to stop (exit code 75). Finished parts are kept in the run folder.
    """
    resolved = load_options(name, options or {})
    sets = {"train": train, "val": val} | ({"test": test} if test is not None else {})
    check_row_sets(name, sets)
    start = time.monotonic()
    encoder = FrozenEncoder.open(weights, world)
    identity = compute_identity(name, resolved, sets, encoder.sha256)
    row = find_row(run, name, identity, world)
    if row is not None:
        LOG.info("%s of %s: stored result read from %s", name, encoder.path.name, run and run.eval_rows(name))
        return row
    local = _fetch(sets, world)
    verify_content(local, world, threads or _available_threads())
    context = EvalContext(
        options=resolved,
        encoder=encoder,
        train=local["train"],
        val=local["val"],
        test=local.get("test"),
        world=world,
        stop=stop or never_stop,
        identity=identity,
        threads=threads or _available_threads(),
        feature_dir=run.features if run is not None and cache else None,
        state_file=run.eval_state(name, identity) if run is not None else None,
    )
    return _run_and_store(name, context, sets, run, start)


def _run_and_store(
    name: str, context: EvalContext[Any], sets: dict[str, ShardSet], run: RunDir | None, start: float
) -> Row:
    """Run an evaluation, store its row and remove its state file. ``start``: its ``time.monotonic()``."""
    with context.exit_stack:
        metrics = get_evaluation(name).run(context)
    row = build_row(name, context, sets, metrics, time.monotonic() - start)
    row = store_row(run, name, row, context.world)
    if context.world.is_main and context.state_file is not None:
        context.state_file.unlink(missing_ok=True)
    return row


def _fetch(sets: dict[str, ShardSet], world: World) -> dict[str, ShardSet]:
    """The same sets with their shards on this machine; those of a remote set may have to be downloaded."""
    world.set_phase("stage", patient=True)
    local = {role: data.to_local() for role, data in sets.items()}
    world.set_phase("evaluate")
    return local


def evaluate_run(
    name: str,
    run: RunDir,
    world: World,
    *,
    train: ShardSet | Path | str | None = None,
    val: ShardSet | Path | str | None = None,
    overrides: config.Overrides = (),
    step: int | str = "last",
    stage_dir: str = "",
    stop: StopCheck | None = None,
    threads: int | None = None,
) -> list[Row]:
    """Evaluate the weights of a step of a run, and those of step 0 if ``evals.baseline`` is set. A collective.

    Args:
        name: The evaluation.
        run: The run folder.
        world: The processes that share the work.
        train: Training shards instead of the recipe's: a folder, an address, or a set that is open already.
        val: Validation shards instead of the recipe's, likewise.
        overrides: Options as ``key=value`` or as a dict, on top of the recipe's section ``evals.NAME``.
        step: ``last`` (of a finished training, else the newest export), ``first``, or a number.
        stage_dir: Folder for the shards of an address, instead of the recipe's ``data.stage_dir``.
        stop: Whether this process was asked to stop.
        threads: CPU threads of this process.

    Raises:
        ConfigError: See ``resolve_evaluation``.
        DataError: See ``resolve_evaluation``.
        EvalError: See ``evaluate``, and if the run has no weights of this step.
        Stopped: After a request to stop (exit code 75). Finished rows and parts are kept.
    """
    recipe = config.read_yaml(run.config) if run.config.exists() else {}
    if stage_dir:
        recipe = config.merge(recipe, {"data": {"stage_dir": stage_dir}})
    options, sets = resolve_evaluation(name, recipe, train=train, val=val, overrides=overrides)
    return [
        row
        for path in select_weights(run, recipe, step)
        for row in evaluate_sets(
            name, run=run, weights=path, world=world, options=options, sets=sets, stop=stop, threads=threads
        )
    ]


def evaluate_sets(
    name: str,
    *,
    run: RunDir | None,
    weights: WeightsSource | Path | str,
    world: World,
    options: dict[str, Any],
    sets: dict[str, ShardSet],
    stop: StopCheck | None = None,
    threads: int | None = None,
) -> list[Row]:
    """Evaluate one encoder with the options and sets of ``resolve_evaluation``. A collective.

    Returns:
        One row; for an evaluation with data sets of its own, one per data set, and one more for the mean over them
        if all sets of a published mean are among them.
    """
    rows = [
        evaluate(
            name,
            run=run,
            weights=weights,
            train=parts["train"],
            val=parts["val"],
            test=parts.get("test"),
            world=world,
            options=values,
            stop=stop,
            threads=threads,
        )
        for values, parts in split_by_row(name, options, sets)
    ]
    summarize = get_evaluation(name).summarize
    metrics = summarize(rows) if summarize else None
    if metrics:
        stored = find_row(run, name, summary_identity(name, rows), world)
        rows.append(stored or store_row(run, name, build_summary_row(name, rows, metrics), world))
    return rows


def missing_weights(
    name: str,
    run: RunDir,
    *,
    train: ShardSet | Path | str | None = None,
    val: ShardSet | Path | str | None = None,
    overrides: config.Overrides = (),
    step: int | str = "last",
    resolved: tuple[dict[str, Any], dict[str, ShardSet]] | None = None,
) -> list[Path]:
    """Return the weights files for which ``evaluate_run`` with these arguments would not find all its rows.

    Args:
        name: The evaluation.
        run: The run folder.
        train: See ``evaluate_run``.
        val: See ``evaluate_run``.
        overrides: See ``evaluate_run``.
        step: See ``evaluate_run``.
        resolved: What ``resolve_evaluation`` returned for these arguments, if it was called already. The shard sets
            are then not opened again.
    """
    recipe = config.read_yaml(run.config)
    options, sets = resolved or resolve_evaluation(name, recipe, train=train, val=val, overrides=overrides)
    questions = [(load_options(name, values), parts) for values, parts in split_by_row(name, options, sets)]
    stored = {row.get("identity") for row in read_rows(run, name)}
    missing = []
    for path in select_weights(run, recipe, step):
        digest = files.sha256_of_file(path)
        if any(compute_identity(name, values, parts, digest) not in stored for values, parts in questions):
            missing.append(path)
    return missing


def _available_threads() -> int:
    """This process's share of the cores that the ranks of this node may use."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
