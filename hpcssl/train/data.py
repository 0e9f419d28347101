"""The training shards of one attempt: opened, copied to the node or downloaded, verified, and read."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from hpcssl import files
from hpcssl.data.address import is_remote
from hpcssl.data.batch import RING_SIZE
from hpcssl.data.cache import Cache, open_shard_set
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.data.stage import restage_shard, stage
from hpcssl.data.stream import Remote
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, DataError, ResumeError, Stopped
from hpcssl.run_dir import RunDir
from hpcssl.train.attempt.node_index import open_on_node
from hpcssl.train.attempt.shard_check import check_shards
from hpcssl.train.attempt.shard_watch import ShardWatch
from hpcssl.train.builders import build_method, build_view_plan
from hpcssl.train.options import DataOptions
from hpcssl.train.recipe import Recipe

LOG = logging.getLogger("hpcssl")


def open_train_shards(recipe: Recipe, *, allow_pipe: bool = False, world: World | None = None) -> ShardSet:
    """Open the training shards of a recipe. Of shards at an address only the index is downloaded.

    Args:
        recipe: Its ``data.train`` is opened.
        allow_pipe: Whether ``data.train`` may be a shell command.
        world: Processes that open it together; None for one process.

    Raises:
        ConfigError: ``data.train`` is empty, or an address that is not allowed.
        DataError: The shards are damaged, or lack the second modality that the method needs.
    """
    if not recipe.data.train:
        fix = "add data.train=FOLDER to the command"
        raise ConfigError("data.train", got="no folder", expected="a folder written by hpcssl-shard", fix=fix)
    if is_remote(recipe.data.train):
        shards = _remote(recipe.data, allow_pipe).open()
    else:
        shards = open_on_node(recipe.data.train, world or World.single_process())
    _check_modalities(shards, recipe)
    return shards


def open_val_shards(recipe: Recipe) -> ShardSet:
    """Open the shards of ``data.val``; those at an address are downloaded by their ``to_local()``.

    Raises:
        DataError: The shards are damaged.
    """
    data = recipe.data
    return open_shard_set(
        data.val,
        stage=data.stage_dir,
        key="data.val",
        stall_s=data.stall_timeout_seconds,
        tries=data.download_attempts,
    )


def _remote(data: DataOptions, allow_pipe: bool) -> Remote:
    return Remote(data.train, allow_pipe=allow_pipe, stall_s=data.stall_timeout_seconds, tries=data.download_attempts)


def _check_modalities(shards: ShardSet, recipe: Recipe) -> None:
    plan = build_view_plan(recipe, build_method(recipe))
    if any(view.second for view in plan.views) and not shards.has_second:
        raise DataError(
            f"shard folder {shards.root}",
            got="images without a second modality",
            expected="a KEY.b.png for each image, since the method has views of two modalities",
            fix="write the shards with `hpcssl-shard images SRC OUT --second-modality edges`",
        )


class DataPipeline:
    """What one attempt reads its batches from: the shards where this node can read them, and a reader.

    All ranks build it together. The index of shards at an address is the one that rank 0 downloaded, on all ranks,
    even if the server changes it meanwhile.

    Args:
        recipe: Its ``data`` section.
        run: The run folder; it names the shards that the run was started on.
        world: The processes.
        allowed_pipe: The only shell command that ``data.train`` may be; empty for none.
        stop: Whether this process was asked to stop; polled while shards are staged.

    Attributes:
        shards: The training shards, with paths on this node.
        reader: Reader of ``shards``. It counts damaged samples without a limit; see ``DamageLog``.
        cache: Local copies of shards at an address, or None.

    Raises:
        ConfigError: ``data.train`` is not valid.
        DataError: The shards are damaged, or there is no room to stage them.
        ResumeError: The run was started on other shards, or on other images in them.
        Stopped: On all ranks, if one of them was asked to stop.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        world: World,
        *,
        allowed_pipe: str = "",
        stop: Callable[[], bool] = lambda: False,
    ):
        data = recipe.data
        self._data, self._last_step = data, 0
        self._order: Order | None = None
        self.cache: Cache | None = None
        restore: Callable[[int], None] | None = None
        world.set_phase("stage")
        if is_remote(data.train):
            self.cache = _open_cache(recipe, run, world, allow_pipe=data.train == allowed_pipe)
            self.shards, restore = self.cache.shards, self.cache.refetch
            _check_modalities(self.shards, recipe)
        else:
            self.shards = original = open_train_shards(recipe, world=world)
            if data.stage_dir:
                self.shards = staged = _stage(original, data.stage_dir, world, stop)
                restore = partial(restage_shard, original, staged)
        _check_same_shards(run, self.shards)
        if data.verify == "sha256":
            verify(self.shards, world, restore)
        # copies on this node were compared with the index when they were made
        own = None if restore else check_shards(run, self.shards, world, refuse=data.changed == "refuse")
        self._watch = ShardWatch(self.shards, world, own, self.cache.kept if self.cache else None)
        self.reader = Reader(
            self.shards,
            limit=None,
            seed=recipe.seed,
            # Only files that nobody else writes are mapped: a mapped file that shrinks kills the process.
            mapped=bool(data.stage_dir),
            locate=self.cache.path if self.cache else None,
        )

    def start_prefetch(self, order: Order, first_step: int, end_step: int, *, random_access: bool) -> None:
        """Start downloading the shards of the steps ``first_step`` to ``end_step - 1`` before they are needed.

        Args:
            order: The order of samples.
            first_step: First step that is trained.
            end_step: Step after the last one.
            random_access: Whether any sample may be read at any step, as support sets do.

        Raises:
            ConfigError: ``data.stage_limit_gb`` is too small for the shards that are read at a time.
        """
        self._order, self._last_step = order, end_step - 1
        if self.cache is None:
            return
        if random_access and self.cache.limit:
            raise ConfigError(
                "data.stage_limit_gb",
                got=f"{self._data.stage_limit_gb:g}, with a support set of random images of the whole data set",
                expected="room for the whole data set",
                fix="set data.stage_limit_gb=0",
            )
        self.cache.start_prefetch(order, first_step, end_step, lookahead=RING_SIZE, release=self.reader.keep_only)

    def progress(self, step: int, opened: int) -> None:
        """Report to the downloads how far the loader is.

        A collective before the last step of each epoch and of all: the shard files are compared with what they were.

        Args:
            step: The step whose batch is taken.
            opened: The loader has begun to read all steps before this one.

        Raises:
            DataError: On all ranks: a shard file was changed while the job runs.
        """
        if self.cache is not None:
            self.cache.set_position(step, opened)
        assert self._order is not None, "start_prefetch comes first"
        if step == self._last_step or (step + 1) % self._order.steps_per_epoch == 0:
            self._watch.check()

    def close(self) -> None:
        """Stop downloading."""
        if self.cache is not None:
            self.cache.close()


def _stage(shards: ShardSet, folder: str, world: World, stop: Callable[[], bool]) -> ShardSet:
    """Copy shards to this node, or wait for another process that does. A collective."""
    stopped = Stopped(
        f"staging to {folder}",
        got="a request to stop",
        expected="time to copy all shards",
        fix="run the same command again; finished shards are kept",
    )

    def watch(progress: bool) -> None:
        if progress:
            world.report_progress("stage")
        if stop():
            raise stopped

    staged = None
    with contextlib.suppress(Stopped):
        staged = stage(shards, folder, watch)
    if world.any(staged is None):
        raise stopped
    assert staged is not None
    return staged


def _open_cache(recipe: Recipe, run: RunDir, world: World, *, allow_pipe: bool) -> Cache:
    """Open the local copies of shards at an address, with the index that rank 0 downloads."""
    remote, index = _remote(recipe.data, allow_pipe), []
    world.run_on_main(lambda: index.append(remote.read_index()))
    return Cache(
        remote,
        world.broadcast_text(index[0] if index else None),
        recipe.data.stage_dir,
        limit=int(recipe.data.stage_limit_gb * 1e9),
        owner=str(run.root),
        progress=partial(world.report_progress, "data"),
    )


def _check_same_shards(run: RunDir, shards: ShardSet) -> None:
    recorded = (files.read_record(run.data, {"train": str}) or {}).get("train", shards.digest)
    if recorded != shards.digest:
        raise ResumeError(
            f"run folder {run.root}",
            got=f"data.train with other shards (digest {shards.digest[:12]}…)",
            expected=f"the shards that the run was started on (digest {recorded[:12]}…)",
            fix="put those back, or start a new run with another --run folder",
        )


def verify(shards: ShardSet, world: World, restore: Callable[[int], None] | None = None) -> None:
    """Read every shard and compare its sha256 with the index. A collective: the ranks share the work.

    Args:
        shards: The shards to read.
        world: The processes.
        restore: For nodes with copies of their own: brings one shard again, by its number. The ranks of each node
            then share the work of that node, shards that are not there yet are left out, and damaged ones are
            restored.

    Raises:
        DataError: On all ranks, naming the shards that differ and cannot be restored.
    """
    hosts = world.all_gather_text(socket.gethostname())
    sharers = [rank for rank, host in enumerate(hosts) if restore is None or host == hosts[world.rank]]
    numbers = [n for n in range(len(shards.shards)) if n % len(sharers) == sharers.index(world.rank)]

    def is_damaged(number: int) -> bool:
        world.set_phase("verify")
        try:
            return files.sha256_of_file(shards.path(number)) != shards.shards[number].sha256
        except FileNotFoundError:
            return restore is None  # else it is downloaded when it is needed
        except OSError:
            return True

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // len(sharers))) as pool:
        damaged = [n for n, is_bad in zip(numbers, pool.map(is_damaged, numbers), strict=True) if is_bad]
    if restore is not None:
        damaged = [number for number in damaged if not _is_restored(shards, number, restore)]
    reports = world.all_gather_text(json.dumps([shards.shards[number].name for number in damaged]))
    names = sorted({name for report in reports for name in json.loads(report)})
    if names:
        raise DataError(
            f"shards of {shards.root}",
            got=f"{len(names)} whose content differs from their index: "
            f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}",
            expected="the sha256 of each shard in index.json",
            fix="copy or write these shards again; `hpcssl-shard verify` names each damaged sample",
        )


def _is_restored(shards: ShardSet, number: int, restore: Callable[[int], None]) -> bool:
    LOG.warning("Shard %s has changed on this disk. It is copied again.", shards.path(number))
    try:
        restore(number)
    except DataError as error:
        LOG.error("%s", error)
        return False
    return True
