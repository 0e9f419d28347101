"""Whether shard files change while an attempt reads them: looked up at the end of each epoch, by all ranks together.

A rank that looked up all files that it has read from would look up each shard, since a shuffle over all shards takes
every rank to every shard: 512 ranks would ask a file system for the status of 1,282 shards 656,384 times. So each file
is looked up by one rank: of all ranks for shards that the nodes share, of those of a node for the copies on its disk.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from hpcssl.data.node_folder import has_mark
from hpcssl.data.shard_files import Identity, check_rewritten, identity_of
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.liveness.record import node_name
from hpcssl.distributed.world import World
from hpcssl.errors import DataError, HpcsslError

LOG = logging.getLogger("hpcssl")
_THREADS = 16  # per rank: a look-up on a parallel file system mostly waits


class ShardWatch:
    """Compares the shard files with what they were when the attempt began. All ranks build it together.

    Args:
        shards: The shards, where this node reads them.
        world: The processes.
        identities: For files that all nodes share: what the files were that this rank looks up, by number. None for
            copies on this node, which bear the mark of ``node_folder.mark_verified``.
        kept: Returns the numbers of the copies that the node keeps, where copies come and go. By default all shards.
    """

    def __init__(
        self,
        shards: ShardSet,
        world: World,
        identities: Mapping[int, Identity] | None = None,
        kept: Callable[[], Sequence[int]] | None = None,
    ):
        self._shards, self._world, self._identities = shards, world, dict(identities or {})
        self._removed: set[int] = set()
        self._comes_and_goes = kept is not None
        if identities is not None:
            numbers = sorted(identities)
            self._share: Callable[[], Sequence[int]] = lambda: numbers
            return
        nodes = world.all_gather_text(node_name())
        sharers = [rank for rank, node in enumerate(nodes) if node == nodes[world.rank]]
        place, count, kept = sharers.index(world.rank), len(sharers), kept or (lambda: range(len(shards.shards)))
        self._share = lambda: [number for number in kept() if number % count == place]

    def check(self) -> None:
        """Look up this rank's share of the files, while no batch is being waited for. A collective.

        A removed file, and one that was written again with the same bytes, only give a warning.

        Raises:
            DataError: On all ranks, with the same message: a file was changed, or cannot be looked up.
        """
        self._world.set_phase("check")
        error, numbers = None, self._share()
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                is_same = list(pool.map(self._is_unchanged, numbers))
            for number in (number for number, same in zip(numbers, is_same, strict=True) if not same):
                self._compare(number)
        except DataError as caught:
            error = caught
        if self._world.any(error is not None):
            reports = self._world.all_gather_text(json.dumps(error.to_json()) if error else "")
            raise HpcsslError.from_json(json.loads(next(filter(None, reports))))
        self._world.set_phase("data")

    def _is_unchanged(self, number: int) -> bool:
        try:
            status = os.stat(self._shards.path(number))
        except OSError:
            return False
        if number in self._identities:
            return identity_of(status) == self._identities[number]
        return has_mark(status, self._shards.shards[number])

    def _compare(self, number: int) -> None:
        """Find out what has become of a file that is not what it was."""
        path = self._shards.path(number)
        try:
            identity = identity_of(os.stat(path))
            check_rewritten(self._shards, number)
            self._identities[number] = identity
        except FileNotFoundError:
            if not self._comes_and_goes and number not in self._removed:
                self._removed.add(number)
                LOG.warning(
                    "Shard %s was removed. This attempt continues where the file is open; another attempt cannot.", path
                )
        except OSError as error:
            raise DataError(
                f"shard {path}",
                got=error.strerror,
                expected="a readable file",
                fix="check that the file system works; the same command then continues from the last checkpoint",
            ) from error
