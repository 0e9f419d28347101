"""The training shards of one attempt: found, brought near, checked, and the damaged samples in them counted."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

from hpcssl import files
from hpcssl.data import loader
from hpcssl.data.cache import Cache, opened
from hpcssl.data.loader import Batch
from hpcssl.data.order import Order
from hpcssl.data.reader import Loss, Reader, too_many
from hpcssl.data.shards import ShardSet
from hpcssl.data.stage import again, stage
from hpcssl.data.stream import Remote, is_remote
from hpcssl.errors import ConfigError, DataError, ResumeError
from hpcssl.files import RunDir
from hpcssl.train.recipe import DataOptions, Recipe
from hpcssl.train.state import method_of, plan_of
from hpcssl.world import World

LOG = logging.getLogger("hpcssl")


def open_shards(recipe: Recipe, *, allow_pipe: bool = False) -> ShardSet:
    """The training shards of a recipe; of a remote set, its index alone. ``ConfigError`` where none are named,
    ``DataError`` where they are bad. ``allow_pipe``: whether ``data.train`` may be a shell command."""
    if not recipe.data.train:
        raise ConfigError("data.train", got="no folder", expected="a folder written by hpcssl-shard",
                          mend="add data.train=FOLDER to the command")
    if is_remote(recipe.data.train):
        return _usable(_remote(recipe.data, allow_pipe).open(), recipe)
    return _usable(ShardSet.open(recipe.data.train), recipe)


def open_val(recipe: Recipe) -> ShardSet:
    """The shards of ``data.val``; ``near()`` fetches those of an address. ``DataError`` where they are bad."""
    data = recipe.data
    return opened(data.val, stage=data.stage, key="data.val", stall_s=data.stall_seconds, tries=data.tries)


def _remote(data: DataOptions, allow_pipe: bool) -> Remote:
    return Remote(data.train, allow_pipe=allow_pipe, stall_s=data.stall_seconds, tries=data.tries)


def _usable(shards: ShardSet, recipe: Recipe) -> ShardSet:
    if any(view.second for view in plan_of(recipe, method_of(recipe)).views) and not shards.has_second:
        raise DataError(f"shard folder {shards.root}", got="images without a second modality", expected="a KEY.b.png "
                        "beside each image, since the method's views show it",
                        mend="write the shards with `hpcssl-shard images SRC OUT --second edges`")
    return shards


class Feed:
    """What an attempt reads its batches from: ``shards``, where they lie for this node, and a ``reader`` of them.

    All ranks build it together: the index of a remote set is rank 0's on all of them, whatever the server gives the
    next one who asks. ``allowed``: the one shell command that ``data.train`` may be. Raises ``DataError``, and
    ``ResumeError`` where the run was started on other shards.
    """

    def __init__(self, recipe: Recipe, run: RunDir, world: World, *, allowed: str = ""):
        self.data, self.cache, self._order, self._last = recipe.data, None, None, 0
        data, mend = recipe.data, None
        world.mark("stage", patient=True)  # another process of this node may be copying
        if is_remote(data.train):
            remote, text = _remote(data, data.train == allowed), []
            world.on_main(lambda: text.append(remote.text()))
            self.cache = Cache(remote, world.tell(text[0] if text else None), data.stage,
                               limit=int(data.stage_gb * 1e9), owner=str(run.root),
                               progress=partial(world.nearer, "data"))
            self.shards, mend = _usable(self.cache.shards, recipe), self.cache.again
        else:
            self.shards = there = open_shards(recipe)
            if data.stage:
                self.shards = near = stage(there, data.stage, progress=lambda: world.mark("stage"))
                mend = partial(again, there, near)
        _refuse_other(run, self.shards)
        if data.verify == "sha256":
            verify(self.shards, world, mend)
        # mapped only where nobody else writes: a mapped file that shrinks kills the process
        self.reader = Reader(self.shards, limit=None, seed=recipe.seed, mapped=bool(data.stage),
                             near=self.cache.path if self.cache else None)

    def follow(self, order: Order, start: int, stop: int, *, whole: bool) -> None:
        """Have the shards of steps ``start`` .. ``stop`` - 1 brought near before they are needed. ``whole``: any sample
        may be asked for at any step. Raises ``ConfigError`` for a limit that cannot work."""
        self._order, self._last = order, stop - 1
        if self.cache is None:
            return
        if whole and self.cache.limit:
            raise ConfigError("data.stage_gb", got=f"{self.data.stage_gb:g}, with a support set that is drawn from all "
                              "images at each step", expected="room for the whole set", mend="set data.stage_gb=0")
        self.cache.follow(order, start, stop, ahead=loader.RING, forget=self.reader.keep_only)

    def progress(self, step: int, opened: int) -> None:
        """As ``Loader`` calls it. At the end of each epoch and before the last step the files are compared with what
        they were: ``DataError`` names one that was changed while the job runs."""
        if self.cache is not None:
            self.cache.at(step, opened)
        if step == self._last or (step + 1) % self._order.steps_per_epoch == 0:
            self.reader.check()

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()


def _refuse_other(run: RunDir, shards: ShardSet) -> None:
    was = (files.read_record(run.data, "train") or {}).get("train", shards.digest)
    if was != shards.digest:
        raise ResumeError(f"run folder {run.root}", got=f"data.train with other shards (digest {shards.digest[:12]}…)",
                          expected=f"those that the run was started on ({was[:12]}…)",
                          mend="put these back, or start a new run with another --run folder")


def verify(shards: ShardSet, world: World, mend: Callable[[int], None] | None = None) -> None:
    """Read every shard that is here and compare its sha256 with the index; the ranks share the work, those of each node
    where every node has a copy of its own (``mend``, which brings a shard anew). All ranks raise the same
    ``DataError``, which names the changed shards."""
    hosts = world.gather_text(socket.gethostname())
    mates = [r for r, host in enumerate(hosts) if mend is None or host == hosts[world.rank]]
    mine = [n for n in range(len(shards.shards)) if n % len(mates) == mates.index(world.rank)]

    def wrong(number: int) -> bool:
        world.mark("verify")
        try:
            return files.digest(shards.path(number)) != shards.shards[number].sha256
        except FileNotFoundError:
            return mend is None  # else it is fetched when it is needed
        except OSError:
            return True

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // len(mates))) as pool:
        bad = [number for number, is_wrong in zip(mine, pool.map(wrong, mine), strict=True) if is_wrong]
    if mend is not None:
        bad = [number for number in bad if not _mended(shards, number, mend)]
    told = world.gather_text(json.dumps([shards.shards[number].name for number in bad]))
    found = sorted({name for text in told for name in json.loads(text)})
    if found:
        raise DataError(f"shards of {shards.root}", got=f"other bytes than {len(found)} of them had when their index "
                        f"was written: {', '.join(found[:8])}{', …' if len(found) > 8 else ''}",
                        expected="the sha256 that index.json records", mend="`hpcssl-shard verify` names each damaged "
                        "sample; copy these shards again, or run the command that wrote them")


def _mended(shards: ShardSet, number: int, mend: Callable[[int], None]) -> bool:
    LOG.warning("%s has changed on this disk; it is brought anew", shards.path(number))
    try:
        mend(number)
    except DataError as error:
        LOG.error("%s", error)
        return False
    return True


class Damage:
    """The damaged samples that the world has met since the run began, in ``damaged.jsonl`` of the run folder.

    Each counts once, at the first step whose batch should have held it, whichever rank and attempt that was: how many
    there are after a step depends on the data and the order alone. All ranks hold the same list. Raises ``DataError``
    on all ranks where there are more than ``limit``, at once where an earlier attempt has met them.
    """

    def __init__(self, run: RunDir, world: World, shards: ShardSet, limit: int):
        self.run, self.world, self.shards, self.limit = run, world, shards, limit
        told = world.tell(json.dumps(files.read_lines(run.damaged)) if world.main else None)
        self.known = {line["index"]: Loss(**{k: line[k] for k in Loss.__dataclass_fields__})
                      for line in json.loads(told) if line.keys() >= Loss.__dataclass_fields__.keys()}
        self._refuse_more()

    def news(self, batch: Batch) -> bool:
        """Whether this rank's rows hold a damaged sample that nobody has met before. No collective."""
        return any(loss.index not in self.known for loss in batch.lost)

    def note(self, step: int, batch: Batch) -> None:
        """Write down what is new on any rank."""
        told = self.world.gather_text(json.dumps([asdict(loss) for loss in batch.lost]))
        losses = {loss["index"]: loss for text in told for loss in json.loads(text)}
        for index in sorted(losses.keys() - self.known.keys()):
            self.known[index] = Loss(**losses[index])
            if self.world.main:
                self._write({"step": step} | losses[index])
        self._refuse_more()

    def _write(self, line: dict) -> None:
        try:
            files.append_line(self.run.damaged, line)
        except OSError as error:  # the count goes on without; the next attempt meets this sample again
            LOG.warning("%s: %s; sample %s is not noted there", self.run.damaged, error.strerror, line["index"])

    def _refuse_more(self) -> None:
        if len(self.known) > self.limit:
            raise too_many(self.shards, f"{len(self.known)} damaged", self.known.values(), self.limit)
