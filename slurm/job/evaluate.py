"""The program of an evaluation's job, as ``hpcssl.run.train`` is that of the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, Stopped
from hpcssl.run_dir import RunDir
from hpcssl.signals import Requeue, StopFlag
from slurm.log import attempts
from slurm.manage import evaluations

if TYPE_CHECKING:
    from hpcssl.distributed.world import World


def evaluate(
    run: RunDir,
    what: str,
    *,
    stop: StopFlag,
    requeue: Callable[[list[str]], Requeue],
    attempt: dict[str, Any],
    record_failure: Callable[[str, str], None],
    leave: Callable[[str], None],
    failure: Callable[[], str] = lambda: "",
) -> int:
    """Evaluate weights of the run, and record the attempt. All ranks call it.

    Rows and parts that are finished are kept, so a stop loses little, and an evaluation whose rows exist ends at once.

    Args:
        run: The run folder.
        what: The text of an ``evaluations.EvalRequest``.
        stop: The flag that the stopping signals set.
        requeue: Asks for the next attempt, given the names of the signals (``requeue.handle_stop``).
        attempt: The attempt, from ``task.describe_attempt``.
        record_failure: Called as ``record_failure(cause, sentence)``, from another thread, before the process ends
            because of a hang.
        leave: Called with the sentence afterwards, to end the process.
        failure: See ``World.start``.

    Returns:
        The exit code: 0 if all rows exist, 75 after a stop.

    Raises:
        HpcsslError: The evaluation failed; the caller records it.
    """
    from hpcssl.distributed.liveness.limits import PhaseLimits
    from hpcssl.distributed.world import World
    from hpcssl.journal import set_up_logging
    from hpcssl.train import recipe
    from hpcssl.train.attempt.watchdog import watchdog
    from hpcssl.train.main import set_up_torch

    machine = recipe.read(run.config).machine
    world = World.start(machine.devices, machine.timeout_minutes * 60, stop.is_set, failure)
    set_up_torch(machine, world.device)
    set_up_logging(world.rank)
    if world.is_main:
        attempts.record_start(run, what, attempt)
    # no limit is learned: one evaluation says little about another one
    limits = PhaseLimits(machine.hang_minutes * 60)
    try:
        with watchdog(world, limits, lambda cause, why, _: record_failure(cause, why), leave):
            _evaluate_all(run, what, world, stop)
        cause, why, code = "done", "", EXIT_DONE
    except Stopped:  # raised on all ranks
        signals = sorted({*world.all_gather_text(stop.reason or "")} - {""})
        answer = requeue(signals) if world.is_main else Requeue("stopped")
        cause, why, code = answer.cause, answer.refused or ", ".join(signals), EXIT_STOPPED
    if world.is_main:
        attempts.record_end(run, what, attempt, cause, why)
    world.barrier()  # with --kill-on-bad-exit the first rank that exits ends the others
    return code


def _evaluate_all(run: RunDir, what: str, world: World, stop: StopFlag) -> None:
    """Compute the rows that are requested, and those of further weights that the run has exported. A collective."""
    from hpcssl.evals.run import evaluate_run
    from hpcssl.train.main import evaluation_should_stop

    request = evaluations.parse_request(what)
    score = partial(
        evaluate_run,
        request.name,
        run,
        world,
        train=request.shards.get("train"),
        val=request.shards.get("val"),
        overrides=request.overrides,
        stop=partial(evaluation_should_stop, world, stop),
    )
    score(step="last" if request.step is None else request.step)
    remaining = evaluations.remaining_steps(run, request) if world.is_main else None
    for step in json.loads(world.broadcast_text(json.dumps(remaining))):
        score(step=step)
