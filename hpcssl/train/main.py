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
from hpcssl.data.shards import ShardSet
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, WorldError
from hpcssl.files import RunDir
from hpcssl.journal import Journal, set_up_logging
from hpcssl.signals import Requeue, StopFlag
from hpcssl.train import recipe as recipes
from hpcssl.train.checkpoint import Store
from hpcssl.train.data import Damage, Feed
from hpcssl.train.lock import RunLock
from hpcssl.train.loop import Loop, Watch
from hpcssl.train.recipe import MachineOptions, Recipe
from hpcssl.train.state import Training
from hpcssl.train.support import attach
from hpcssl.train.watchdog import RankLost, watchdog
from hpcssl.world import World

LOG = logging.getLogger("hpcssl")


def train(run: RunDir, recipe: Recipe | None = None, *, stop: StopFlag,
          requeue: Callable[[list[str]], Requeue] | None = None, attempt: dict | None = None,
          watch: Callable[..., Watch | None] | None = None, on_hang: Callable[[str], None] | None = None,
          allow_pipe: str = "") -> int:
    """Train ``recipe`` (by default what ``run.config`` says) from the newest whole checkpoint on. All ranks call it.

    ``requeue(signals)`` asks for another attempt after a stop (rank 0, once the state is durable). ``attempt``: what
    ``attempts.jsonl`` should say of this one (``attempt``, ``job``). ``watch(recipe, run, world, stop)`` makes the
    evaluation during training. ``on_hang(sentence)`` leaves a process that makes no progress, from another thread.
    ``allow_pipe``: the one shell command that ``data.train`` may be. Returns 0 when the run is finished, 75 when it was
    stopped. Raises ``HpcsslError``: ``Stopped`` where that came before all ranks had, or the run's lock was ours.
    """
    recipe = recipe or recipes.read(run.config)
    prepare(recipe.machine)
    world = World.start(recipe.machine.devices, recipe.machine.timeout_minutes * 60, stop.is_set)
    set_up_logging(world.rank)
    record = _Attempt(run, world, attempt or {})
    with record, watchdog(world, recipe.machine.hang_minutes, record.fail, on_hang):
        code = _attempt(recipe, run, world, record, stop, requeue, watch, allow_pipe)
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


def _attempt(recipe: Recipe, run: RunDir, world: World, record: _Attempt, stop: StopFlag, requeue, watch,
             allow_pipe: str) -> int:
    one_for_all(world, "recipe", config.as_dict(recipe) | {"torch": torch.__version__})
    record.take_lock(patience_s=120.0 if requeue else 10.0, stop=stop)
    if world.any(world.main and run.finished is not None):  # asked of rank 0, once nobody else writes here
        LOG.info("%s is finished; evaluate it, or start another run in another folder", run.root)
        return EXIT_DONE
    feed = Feed(recipe, run, world, allowed=allow_pipe)
    shards, reader = feed.shards, feed.reader
    one_for_all(world, "shards", {"data.train": shards.digest})
    world.on_main(lambda: store(run, recipe, shards))
    order = Order([s.samples for s in shards.shards], seed=recipe.seed, global_batch=recipe.optim.batch,
                  window=recipe.data.window_shards, micro_batches=recipe.machine.accumulate)
    training = Training(recipe, world, steps_per_epoch=order.steps_per_epoch, labels=shards.labels,
                        data_digest=shards.digest)
    machine = recipe.machine
    checkpoints = Store(run, world, keep=machine.keep, keep_every=machine.keep_every,
                        guard=record.check_lock)
    world.mark("resume")
    saved = checkpoints.newest()
    if saved is not None:
        changed = training.load(saved)
        LOG.info("resumed at step %d from %s", training.step, saved.folder.name)
        if changed:
            LOG.warning("from here on the bits may differ from a run that was never stopped: %s", ", ".join(changed))
    watched = watch(recipe, run, world, lambda: _asked(world, stop)) if watch else None
    record.start(training.step)
    common = {"threads": machine.loader_threads, "pin": world.device.type == "cuda"}
    loader = Loader(reader, order, training.view_specs, seed=recipe.seed, rank=world.rank, size=world.size,
                    progress=feed.progress, **common)
    support = attach(training, reader, **common)
    journal = Journal(run, world, first_step=training.step, last_step=training.last_step, every=machine.log_steps,
                      batch=recipe.optim.batch)
    loop = Loop(training, loader.run, checkpoints, journal, run, stop, watched,
                damage=Damage(run, world, shards, recipe.data.damaged_limit))
    feed.follow(order, training.step, training.last_step, whole=support is not None)
    try:
        done = loop.go()
    finally:
        record.last_step = training.step
        feed.close()
        loader.close()
        if support is not None:
            support.close()
        journal.close()
    if done:
        LOG.info("finished after %d steps: %s", training.step, run.weights_at(training.step))
        return EXIT_DONE
    record.signals, record.why = sorted({*world.gather_text(stop.reason or "")} - {""}), loop.unsaved
    world.mark("requeue")
    asked = requeue(record.signals) if requeue and world.main else Requeue("stopped")
    record.cause, answer = asked.cause, world.tell(asked.refused)
    record.why = record.why or answer
    LOG.info("stopped at step %d, %s; %s", training.step,
             "saved" if loop.unsaved is None else f"NOT saved ({loop.unsaved}): the checkpoint before it stays",
             "run the same command to go on" if requeue is None else answer or "another attempt was asked for")
    return EXIT_STOPPED


def one_for_all(world: World, what: str, values: dict) -> None:
    """All ranks raise ``WorldError`` where one has other values than rank 0 (a command typed twice, a node that sees
    an old file): gradients are averaged over whatever the ranks learn, so that nothing else would tell."""
    marks = world.gather_text(config.fingerprint(values))
    if len(set(marks)) == 1:
        return
    told = [json.loads(text) for text in world.gather_text(json.dumps(values))]
    rank = next(r for r, mark in enumerate(marks) if mark != marks[0])
    raise WorldError(f"rank {rank}'s {what}", got=f"other values than rank 0's: "
                     f"{', '.join(config.differing(told[rank], told[0]))}", expected="the same on all ranks",
                     mend="start all ranks by one command, on nodes that see the same files")


def _asked(world: World, stop: StopFlag) -> bool:
    """Whether to stop; an evaluation that asks, makes progress."""
    world.mark("evaluate")
    return stop.is_set()


def store(run: RunDir, recipe: Recipe, shards: ShardSet) -> None:
    """Write the recipe of this attempt and the data's digest into the run folder, on rank 0."""
    text = config.to_yaml(recipe)
    if digest_of(run) is None:
        files.atomic_write(run.data, json.dumps({"train": shards.digest}))
    if not run.config.exists() or run.config.read_text() != text:
        files.atomic_write(run.config, text)


def digest_of(run: RunDir) -> str | None:
    """Digest of the shards that the run was started on; None before its first attempt, and where ``data.json`` is
    damaged: the checkpoint knows it, too."""
    return (files.read_record(run.data, "train") or {}).get("train")


class _Attempt:
    """Two lines in ``attempts.jsonl``: where this attempt began, and how it ended. Rank 0 writes them, but for a
    failure, which the rank writes that it befalls first."""

    def __init__(self, run: RunDir, world: World, told: dict):
        self.run, self.world = run, world
        self.last_step: int | None = None
        self.signals: list[str] | None = None
        self.cause, self.why = "stopped", None
        past = [a["attempt"] for a in files.read_lines(run.attempts) if isinstance(a.get("attempt"), int)]
        self.about = {"attempt": max(past, default=0) + 1, "job": f"process {os.getpid()}"} | told
        self.lock = RunLock(run, str(self.about["job"]), attempt=self.about["attempt"],
                            requeued="job" in told) if world.main else None
        self.started = False

    def take_lock(self, patience_s: float, stop: StopFlag) -> None:
        """Rank 0 takes the run's lock; if it cannot, every rank raises its reason. Whoever loses it later, stops."""
        if self.lock is not None:
            self.lock.on_loss = lambda: stop.set("the run's lock was taken over")
        self.world.mark("lock", patient=True)  # it waits for another, as long as is set there
        self.world.on_main(lambda: self.lock.take(patience_s, stop.is_set))

    def check_lock(self) -> None:
        """On rank 0: raise ``ResumeError`` if another process has taken the run over."""
        self.lock.check()

    def start(self, step: int) -> None:
        self.world.on_main(lambda: self._write(event="start", first_step=step))
        self.last_step, self.started = step, True

    def _write(self, **fields) -> None:
        files.append_line(self.run.attempts, {"host": socket.gethostname()} | self.about | fields | {
            "world": self.world.size, "time": round(time.time(), 1)})

    def __enter__(self) -> _Attempt:
        return self

    def fail(self, cause: str, why: str, step: int | None = None) -> None:
        """Write how the attempt failed, from any rank and once it has started, unless a rank has done so: what fails
        after the first is its echo. No collective."""
        if not self.started or self._ended():  # asked first: of a thousand ranks few should queue for the file
            return
        with files.alone(self.run.attempts):
            if not self._ended():
                self._write(event="end", cause=cause, why=why, last_step=self.last_step if step is None else step)

    def _ended(self) -> bool:
        return any(x.get("event") == "end" and x.get("attempt") == self.about["attempt"]
                   for x in files.read_lines(self.run.attempts))

    def __exit__(self, kind, error, _trace) -> None:
        try:
            self._end(kind, error)
        except OSError as full:  # which must not hide the error, or make a failure of a stop
            LOG.warning("%s: %s; how this attempt ended is not noted there", self.run.attempts, full.strerror or full)
        if self.lock is not None:
            self.lock.release()

    def _end(self, kind, error) -> None:
        if not self.started:
            return
        if error is not None:
            who = "" if self.world.main else f"rank {self.world.rank}: "
            self.fail(*((error.cause, error.got) if isinstance(error, RankLost) else
                        ("error", (who + " ".join(f"{kind.__name__}: {error}".split()))[:500])))
        elif self.world.main and self.signals is not None:
            self._write(event="end", cause=self.cause, signals=self.signals, last_step=self.last_step,
                        **({"why": self.why} if self.why else {}))
        elif self.world.main:
            self._write(event="end", cause="done", last_step=self.last_step)
