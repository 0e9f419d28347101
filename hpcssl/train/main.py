"""One attempt at a run: from a run folder and the launcher's variables to an exit code."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable

import torch

from hpcssl import config, files
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.data.stage import stage
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, DataError
from hpcssl.files import RunDir
from hpcssl.journal import Journal, set_up_logging
from hpcssl.signals import Requeue, StopFlag
from hpcssl.train import recipe as recipes
from hpcssl.train.checkpoint import Store
from hpcssl.train.lock import RunLock
from hpcssl.train.loop import Loop, Watch
from hpcssl.train.recipe import MachineOptions, Recipe
from hpcssl.train.state import Training, method_of, plan_of
from hpcssl.train.support import attach
from hpcssl.world import World

LOG = logging.getLogger("hpcssl")


def train(run: RunDir, recipe: Recipe | None = None, *, stop: StopFlag,
          requeue: Callable[[list[str]], Requeue] | None = None, attempt: dict | None = None,
          watch: Callable[..., Watch | None] | None = None) -> int:
    """Train ``recipe`` (by default what ``run.config`` says) from the newest whole checkpoint on. All ranks call it.

    ``requeue(signals)`` asks for another attempt after a stop (rank 0, once the state is durable). ``attempt``: what
    ``attempts.jsonl`` should say of this one (``attempt``, ``job``). ``watch(recipe, run,
    world, stop)`` makes the evaluation during training. Returns 0 when the run is finished, 75 when it was stopped.
    Raises ``HpcsslError``.
    """
    recipe = recipe or recipes.read(run.config)
    prepare(recipe.machine)
    world = World.start(recipe.machine.devices, recipe.machine.timeout_minutes * 60)
    set_up_logging(world.rank)
    record = _Attempt(run, world, attempt or {})
    with record:
        code = _attempt(recipe, run, world, record, stop, requeue, watch)
    world.barrier()  # rank 0 has written its end: whoever leaves first may bring KILL to the others
    world.close()  # not after an error: the other ranks may still be in a collective, which closing would wait for
    return code


def prepare(machine: MachineOptions) -> None:
    """Set what must be set before the first operation of the process: thread counts change the order of sums."""
    on_cpu = machine.devices == "cpu" or not torch.cuda.is_available()
    if machine.threads or on_cpu:
        torch.set_num_threads(machine.threads or 1)
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif not on_cpu:
        torch.backends.cudnn.benchmark = True


def _attempt(recipe: Recipe, run: RunDir, world: World, record: _Attempt, stop: StopFlag, requeue, watch) -> int:
    record.take_lock(patience_s=120.0 if requeue else 10.0)
    if world.any(world.main and run.done.exists()):  # asked of rank 0, once nobody else writes here
        LOG.info("%s is finished; evaluate it, or start another run in another folder", run.root)
        return EXIT_DONE
    shards = open_shards(recipe)
    world.on_main(lambda: store(run, recipe, shards))
    if recipe.data.stage:
        shards = stage(shards, recipe.data.stage)
    order = Order([s.samples for s in shards.shards], seed=recipe.seed, global_batch=recipe.optim.batch,
                  window=recipe.data.window_shards, micro_batches=recipe.machine.accumulate)
    order.rows(world.size)  # refuse a world that does not divide before anything is built
    training = Training(recipe, world, steps_per_epoch=order.steps_per_epoch, labels=shards.labels,
                        data_digest=shards.digest)
    machine = recipe.machine
    checkpoints = Store(run, world, keep=machine.keep, keep_every=machine.keep_every)
    saved = checkpoints.newest()
    if saved is not None:
        changed = training.load(saved)
        LOG.info("resumed at step %d from %s", training.step, saved.folder.name)
        if changed:
            LOG.warning("from here on the bits may differ from a run that was never stopped: %s", ", ".join(changed))
    watched = watch(recipe, run, world, stop.is_set) if watch else None
    record.start(training.step)
    # mapped only where nobody else writes: a mapped file that shrinks kills the process
    reader = Reader(shards, limit=recipe.data.damaged_limit, seed=recipe.seed, mapped=bool(recipe.data.stage))
    common = {"threads": machine.loader_threads, "pin": world.device.type == "cuda"}
    loader = Loader(reader, order, training.view_specs, seed=recipe.seed, rank=world.rank, size=world.size, **common)
    support = attach(training, reader, **common)
    journal = Journal(run, world, first_step=training.step, last_step=training.last_step, every=machine.log_steps,
                      batch=recipe.optim.batch)
    loop = Loop(training, loader.run, checkpoints, journal, run, stop, watched)
    try:
        done = loop.go()
    finally:
        record.last_step = training.step
        loader.close()
        if support is not None:
            support.close()
        journal.close()
    if done:
        LOG.info("finished after %d steps: %s", training.step, run.weights_at(training.step))
        return EXIT_DONE
    record.signals, record.why = sorted({*world.gather_text(stop.reason or "")} - {""}), loop.unsaved
    asked = requeue(record.signals) if requeue and world.main else Requeue("stopped")
    record.cause, answer = asked.cause, world.tell(asked.refused)
    record.why = record.why or answer
    LOG.info("stopped at step %d, %s; %s", training.step,
             "saved" if loop.unsaved is None else f"NOT saved ({loop.unsaved}): the checkpoint before it stays",
             "run the same command to go on" if requeue is None else answer or "another attempt was asked for")
    return EXIT_STOPPED


def store(run: RunDir, recipe: Recipe, shards: ShardSet) -> None:
    """Write the recipe of this attempt and the data's digest into the run folder, on rank 0."""
    text = config.to_yaml(recipe)
    if not run.data.exists():
        files.atomic_write(run.data, json.dumps({"train": shards.digest}))
    if not run.config.exists() or run.config.read_text() != text:
        files.atomic_write(run.config, text)


def digest_of(run: RunDir) -> str | None:
    """Digest of the shards that the run was started on, or None before its first attempt."""
    return json.loads(run.data.read_text())["train"] if run.data.exists() else None


def open_shards(recipe: Recipe) -> ShardSet:
    """The training shards of a recipe. ``ConfigError`` where none are named, ``DataError`` where they are bad."""
    if not recipe.data.train:
        raise ConfigError("data.train", got="no folder", expected="a folder written by hpcssl-shard",
                          mend="add data.train=FOLDER to the command")
    shards = ShardSet.open(recipe.data.train)
    if any(view.second for view in plan_of(recipe, method_of(recipe)).views) and not shards.has_second:
        raise DataError(f"shard folder {shards.root}", got="images without a second modality", expected="a KEY.b.png "
                        "beside each image, since the method's views show it",
                        mend="write the shards with `hpcssl-shard images SRC OUT --second edges`")
    return shards


class _Attempt:
    """Two lines in ``attempts.jsonl`` from rank 0: where this attempt began, and how it ended."""

    def __init__(self, run: RunDir, world: World, told: dict):
        self.run, self.world = run, world
        self.last_step: int | None = None
        self.signals: list[str] | None = None
        self.cause, self.why = "stopped", None
        past = [a["attempt"] for a in files.read_lines(run.attempts) if a.get("event") == "start"]
        self.about = {"attempt": max(past, default=0) + 1, "job": f"process {os.getpid()}"} | told
        self.lock = RunLock(run, str(self.about["job"])) if world.main else None
        self.started = False

    def take_lock(self, patience_s: float) -> None:
        """Rank 0 takes the run's lock; if it cannot, every rank raises its reason."""
        self.world.on_main(lambda: self.lock.take(patience_s))

    def start(self, step: int) -> None:
        self.world.on_main(lambda: self._write(event="start", first_step=step))
        self.last_step, self.started = step, True

    def _write(self, **fields) -> None:
        if self.world.main:
            files.append_line(self.run.attempts, {"host": socket.gethostname()} | self.about | fields | {
                "world": self.world.size, "time": round(time.time(), 1)})

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, kind, error, _trace) -> None:
        if self.started:
            if error is not None:
                self._write(event="end", cause="error", last_step=self.last_step,
                            why=" ".join(f"{kind.__name__}: {error}".split())[:500])
            elif self.signals is not None:
                self._write(event="end", cause=self.cause, signals=self.signals, last_step=self.last_step,
                            **({"why": self.why} if self.why else {}))
            else:
                self._write(event="end", cause="done", last_step=self.last_step)
        if self.lock is not None:
            self.lock.release()
