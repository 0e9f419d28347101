"""Whether the shards of an evaluation hold the images that their index describes.

A result row names its data by the digest of their index. Images that were changed in a shard after it was written would
give other scores under the same digest, and no attempt of a training reads the shards of an evaluation. So those of a
set that is not too large are read once more and compared with their sha256; the evaluation then finds them in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import DataError, HpcsslError
from hpcssl.evals.common.sync import as_eval_error, raise_on_any_rank
from hpcssl.files import sha256_of_file

HASHED_BYTES = 8 * 10**9
"""Largest set in bytes that is compared. ``hpcssl-shard verify`` compares any set."""
_verified: dict[tuple[str, str], tuple[int, int, int]] = {}  # files that had the sha256, with their state at that time


def verify_content(sets: Mapping[str, ShardSet], world: World, threads: int) -> None:
    """Compare the shards of each set of at most ``HASHED_BYTES`` with the index. A collective.

    The ranks share the work. A file that this process has compared before is read again only if it was written to
    since then.

    Args:
        sets: Sets on this machine, by role.
        world: The processes.
        threads: Threads that read.

    Raises:
        EvalError: On all ranks: a shard has other content, or cannot be read.
    """
    for data in sets.values():
        if int(data.bytes_per_shard.sum()) > HASHED_BYTES:
            continue
        error: HpcsslError | None = None
        own = range(world.rank, len(data.shards), world.size)
        try:
            with ThreadPoolExecutor(threads) as pool:
                is_whole = list(pool.map(lambda number, data=data: _is_whole(data, number, world), own))
            changed = [data.shards[n].name for n, whole in zip(own, is_whole, strict=True) if not whole]
            if changed:
                error = _changed_error(data, changed)
        except OSError as caught:
            error = as_eval_error(caught)
        raise_on_any_rank(world, f"shards of {data.root}", error=error)


def _is_whole(data: ShardSet, number: int, world: World) -> bool:
    world.set_phase("evaluate")
    path, sha256 = data.path(number), data.shards[number].sha256
    now = _state(path)
    if _verified.get((str(path), sha256)) == now:
        return True
    is_whole = sha256_of_file(path) == sha256
    if is_whole:
        _verified[str(path), sha256] = now
    return is_whole


def _state(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _changed_error(data: ShardSet, names: list[str]) -> DataError:
    more = ", …" if len(names) > 8 else ""
    return DataError(
        f"shards of {data.root}",
        got=f"{len(names)} with other content than when they were written: {', '.join(names[:8])}{more}",
        expected="the sha256 of each shard in index.json",
        fix="copy or write these shards again; `hpcssl-shard verify` names each damaged sample",
    )
