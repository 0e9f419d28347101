"""One attempt at a run: from a run folder and the launcher's variables to an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from hpcssl import config
from hpcssl.checkpoint.manager import CheckpointManager
from hpcssl.data.address import is_remote
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.distributed.world import World
from hpcssl.journal import Journal, set_up_logging
from hpcssl.run_dir import RunDir
from hpcssl.signals import Requeue, StopFlag
from hpcssl.train import recipe as recipes
from hpcssl.train import replicas
from hpcssl.train.attempt.record import AttemptRecord, AttemptResult
from hpcssl.train.attempt.watchdog import watchdog
from hpcssl.train.checks.data_set import training_labels
from hpcssl.train.damage_log import DamageLog
from hpcssl.train.data import DataPipeline
from hpcssl.train.loop import Loop, LoopResult, OnlineEvaluation
from hpcssl.train.options import MachineOptions
from hpcssl.train.recipe import Recipe
from hpcssl.train.start import run_files
from hpcssl.train.start.state import load_state
from hpcssl.train.support_set import build_support_loader
from hpcssl.train.train_state import TrainState

LOG = logging.getLogger("hpcssl")

RequestRequeue = Callable[[list[str]], Requeue]
BuildOnlineEvaluation = Callable[[Recipe, RunDir, World, Callable[[], bool]], OnlineEvaluation | None]


def train(
    run: RunDir,
    recipe: Recipe | None = None,
    *,
    stop: StopFlag,
    requeue: RequestRequeue | None = None,
    attempt: dict[str, Any] | None = None,
    build_online_evaluation: BuildOnlineEvaluation | None = None,
    on_hang: Callable[[str], None] | None = None,
    failure: Callable[[], str] = lambda: "",
    allow_pipe: str = "",
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Train a run from its newest valid checkpoint to its end, or until a stop is requested. All ranks call it.

    Args:
        run: The run folder.
        recipe: The recipe; by default the one that the folder holds.
        stop: Set from outside to stop the training; the state is then saved.
        requeue: Called on rank 0 as ``requeue(signals)`` after a stop, once the state is durable, to request another
            attempt.
        attempt: Fields of ``attempts.jsonl`` that the caller knows: ``attempt`` and ``job``.
        build_online_evaluation: Called as ``build_online_evaluation(recipe, run, world, stop)`` on all ranks; returns
            the evaluation during training, or None.
        on_hang: Called with a sentence, from another thread, to end a process that makes no progress.
        failure: Why another rank has failed, or an empty string; polled until all ranks have joined.
        allow_pipe: The only shell command that ``data.train`` may be.
        prepare: Called on rank 0, which then holds the run's lock, before the newest checkpoint is looked for.

    Returns:
        0 if the run is finished, 75 if it was stopped and can be resumed.

    Raises:
        HpcsslError: The attempt failed. ``Stopped`` if a stop was requested before all ranks had joined, or before
            the run's lock was taken.
    """
    recipe = recipe or recipes.read(run.config)
    world = World.start(recipe.machine.devices, recipe.machine.timeout_minutes * 60, stop.is_set, failure)
    set_up_torch(recipe.machine, world.device)
    set_up_logging(world.rank)
    machine = recipe.machine
    record = AttemptRecord(
        run,
        world,
        attempt or {},
        hang_s=machine.hang_minutes * 60,
        hang_factor=machine.hang_factor,
        hang_floor_s=hang_floor_s(recipe),
    )
    with record:
        with watchdog(world, record.limits, record.fail, on_hang, record.phases):
            replicas.check_equal_on_all_ranks(world, "recipe", config.as_dict(recipe) | {"torch": torch.__version__})
            record.take_lock(patience_s=120.0 if requeue else 10.0, stop=stop)
            world.run_on_main(prepare)
            result = _run_attempt(recipe, run, world, record, stop, requeue, build_online_evaluation, allow_pipe)
        record.finish(result)
    world.barrier()  # rank 0 has written the end: when one process leaves, the launcher may kill the others
    world.close()  # not after an error: the other ranks may still be in a collective, which closing would wait for
    return result.exit_code


def hang_floor_s(recipe: Recipe) -> float:
    """Return the shortest learned limit of a phase: a server may fail for as long as downloads are tried again."""
    data, floor_s = recipe.data, recipe.machine.hang_floor_minutes * 60
    retries_s = data.stall_timeout_seconds * data.download_attempts if is_remote(data.train) else 0.0
    return max(floor_s, 2 * retries_s)


def set_up_torch(machine: MachineOptions, device: torch.device) -> None:
    """Set thread counts and determinism, before the first operation: thread counts change the order of sums.

    Args:
        machine: Options of the recipe.
        device: The device of this process.
    """
    on_cpu = device.type == "cpu"
    if machine.threads or on_cpu:
        torch.set_num_threads(machine.threads or 1)
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif not on_cpu:
        torch.backends.cudnn.benchmark = True


def _run_attempt(
    recipe: Recipe,
    run: RunDir,
    world: World,
    record: AttemptRecord,
    stop: StopFlag,
    requeue: RequestRequeue | None,
    build_online_evaluation: BuildOnlineEvaluation | None,
    allow_pipe: str,
) -> AttemptResult:
    # another command may have created the run since this one has looked
    world.run_on_main(lambda: run_files.check_same_recipe(run, recipe))
    if world.any(world.is_main and run.finished is not None):  # looked up by rank 0, which alone writes here
        LOG.info("%s is finished. Evaluate it, or start another run in another folder.", run.root)
        return AttemptResult()
    pipeline = DataPipeline(recipe, run, world, allowed_pipe=allow_pipe, stop=stop.is_set)
    replicas.check_equal_on_all_ranks(world, "shards", {"data.train": pipeline.shards.digest})
    world.run_on_main(lambda: run_files.write_run_files(run, recipe, pipeline.shards))

    def build_evaluation() -> OnlineEvaluation | None:
        if build_online_evaluation is None:
            return None
        return build_online_evaluation(recipe, run, world, lambda: evaluation_should_stop(world, stop))

    with contextlib.ExitStack() as stack:
        loop = _build_loop(recipe, run, world, record, pipeline, stop, build_evaluation, stack)
        result = loop.run()
    step = loop.training.step
    if result.finished:
        LOG.info("The run is finished after %d steps: %s", step, run.weights_at(step))
        return AttemptResult()
    return _end_stopped_attempt(world, record, stop, requeue, step, result)


def _build_loop(
    recipe: Recipe,
    run: RunDir,
    world: World,
    record: AttemptRecord,
    pipeline: DataPipeline,
    stop: StopFlag,
    build_evaluation: Callable[[], OnlineEvaluation | None],
    stack: contextlib.ExitStack,
) -> Loop:
    """Build everything that an attempt trains with, at the state of the newest checkpoint. ``stack`` closes it."""
    machine = recipe.machine
    training, loader, order = build_training(recipe, world, pipeline, fill_bank=False)
    keep, keep_every = machine.keep_checkpoints, machine.keep_every_steps
    checkpoints = CheckpointManager(run, world, keep=keep, keep_every=keep_every, guard=record.check_lock)
    load_state(training, checkpoints)
    evaluation = build_evaluation()
    record.start(lambda: training.step)
    first, last, batch = training.step, training.last_step, recipe.optim.batch
    journal = Journal(run, world, first_step=first, last_step=last, every=machine.log_steps, batch=batch)
    damage_log = DamageLog(run, world, pipeline.shards, recipe.data.max_damaged)
    support = training.support
    pipeline.start_prefetch(order, first, last, random_access=support is not None)
    for close in (journal.close, *([support.close] if support else []), loader.close, pipeline.close):
        stack.callback(close)  # closed in reverse order: reading stops first
    return Loop(training, loader.iterate, checkpoints, journal, run, stop, evaluation, damage_log)


def build_training(
    recipe: Recipe, world: World, pipeline: DataPipeline, *, fill_bank: bool = True
) -> tuple[TrainState, Loader, Order]:
    """Build the state that is trained, at step 0, the loader of its batches, and their order. A collective.

    Args:
        recipe: The recipe.
        world: The processes.
        pipeline: The training shards.
        fill_bank: Whether to draw the bank's random rows; ``load_state`` draws them only where there is no checkpoint.

    Raises:
        ConfigError: Keys of the recipe do not fit each other, the method or the data.
        DataError: The data set is smaller than a batch.
        WorldError: The recipe cannot run on this number of processes.
    """
    machine, shards, reader = recipe.machine, pipeline.shards, pipeline.reader
    order = Order(
        shards.samples_per_shard,
        seed=recipe.seed,
        global_batch=recipe.optim.batch,
        window=recipe.data.window_shards,
        micro_batches=machine.accumulation_steps,
    )
    threads, pin = machine.loader_threads, world.device.type == "cuda"
    support = build_support_loader(
        recipe, world, reader, steps_per_epoch=order.steps_per_epoch, threads=threads, pin=pin
    )
    training = TrainState(
        recipe,
        world,
        steps_per_epoch=order.steps_per_epoch,
        labels=training_labels(recipe, shards),
        data_digest=shards.digest,
        support=support,
        fill_bank=fill_bank,
    )
    loader = Loader(
        reader,
        order,
        training.view_specs,
        seed=recipe.seed,
        rank=world.rank,
        size=world.size,
        progress=pipeline.progress,
        threads=threads,
        pin=pin,
        decoder=machine.decoder,
    )
    return training, loader, order


def _end_stopped_attempt(
    world: World,
    record: AttemptRecord,
    stop: StopFlag,
    requeue: RequestRequeue | None,
    step: int,
    result: LoopResult,
) -> AttemptResult:
    """Request another attempt, on rank 0, and report the stop. A collective.

    Raises:
        ResumeError: The run's lock was lost. Whoever has it continues the run, and needs no other attempt.
    """
    world.run_on_main(record.check_lock)
    signals = sorted({*world.all_gather_text(stop.reason or "")} - {""})
    world.set_phase("requeue")
    answer = requeue(signals) if requeue and world.is_main else Requeue("stopped")
    refused = world.broadcast_text(answer.refused)
    if result.unsaved is None:
        saved = "The state is saved."
    else:
        saved = f"The state is NOT saved ({result.unsaved}); the previous checkpoint remains."
    if requeue is None:
        following = "Run the same command to resume."
    else:
        following = f"No further attempt: {refused}." if refused else "Another attempt was requested."
    LOG.info("Stopped at step %d. %s %s", step, saved, following)
    return AttemptResult(answer.cause, tuple(signals), result.unsaved or refused or None)


def evaluation_should_stop(world: World, stop: StopFlag) -> bool:
    """Return whether a stop was requested. An evaluation that asks reports progress by it.

    Args:
        world: The processes.
        stop: The flag of this process.
    """
    world.set_phase("evaluate")
    return stop.is_set()
