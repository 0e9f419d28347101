"""A chained evaluation, inside its job: the counterpart of ``hpcssl.run.train``, imported there only."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, Stopped
from hpcssl.files import RunDir
from hpcssl.signals import Requeue, StopFlag
from slurm import attempts, chain


def evaluate(run: RunDir, what: str, *, stop: StopFlag, requeue: Callable[[list[str]], Requeue], attempt: dict) -> int:
    """Evaluate the run's weights by ``what`` (a ``chain.Entry``); every rank calls it. 0 when the rows are there, 75
    when stopped.

    What is finished of an evaluation is kept, so a stop costs little, and asking again for finished rows is free.
    """
    from hpcssl.evals.run import evaluate_run
    from hpcssl.journal import set_up_logging
    from hpcssl.train import recipe
    from hpcssl.train.main import prepare
    from hpcssl.world import World

    machine = recipe.read(run.config).machine
    prepare(machine)
    world = World.start(machine.devices, machine.timeout_minutes * 60, stop.is_set)
    set_up_logging(world.rank)
    if world.main:
        attempts.begin(run, what, attempt)
    try:
        asked = chain.entry(what)
        ask = partial(evaluate_run, asked.name, run, world, overrides=asked.overrides, stop=stop.is_set, **asked.shards)
        ask(step="last" if asked.step is None else asked.step)
        left = world.tell(json.dumps(chain.left_over(run, asked) if world.main else None))
        for step in json.loads(left):
            ask(step=step)
        cause, why, code = "done", "", EXIT_DONE
    except Stopped:  # agreed by all ranks
        signals = sorted({*world.gather_text(stop.reason or "")} - {""})
        cause, why = requeue(signals) if world.main else Requeue("stopped")
        why, code = why or ", ".join(signals), EXIT_STOPPED
    if world.main:
        attempts.end(run, what, attempt, cause, why)
    world.barrier()  # with --kill-on-bad-exit the first to leave ends the others
    return code
