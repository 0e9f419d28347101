"""Whether the training shards still hold the images that a run was started on.

The index of a shard folder names the sha256 of every shard, but no attempt can read a terabyte before its first step.
The first attempt therefore records the size and the times of each shard file, and the hashes of a few images of each.
A later attempt compares them: this opens each shard once and reads two images of it, and all ranks share the work.
Shards that were written or copied since then have other times; as many of them as a few seconds allow are read as a
whole and compared with the index, and the next attempt continues with the rest.

A file that was changed in place, on a file system on which that leaves no trace in its times, is noticed only if one of
the recorded images changed. ``data.verify=sha256`` reads everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np

from hpcssl import files, rng
from hpcssl.data.shard_files import Identity, identity_of
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import DataError, ResumeError
from hpcssl.run_dir import RunDir

LOG = logging.getLogger("hpcssl")
IMAGES_PER_SHARD = 2
"""Images of each shard whose hashes are recorded."""
HASHED_BYTES = 8 * 10**9
"""Bytes of rewritten shards that one attempt compares with the index, over all ranks: of those with other images than
the recorded ones, and of the others."""
_THREADS = 16  # per rank: a read of a parallel file system mostly waits
_FIELDS = {"train": str, "shards": list[list[int | str]]}

Stamp = list[int | str]
"""Size of a file in bytes, times of the last change of its content and of its inode in ns, and a hash of images."""


def check_shards(run: RunDir, shards: ShardSet, world: World, *, refuse: bool) -> dict[int, Identity]:
    """Compare the shards with what the first attempt has recorded, or record them. A collective.

    Args:
        run: The run folder.
        shards: The shards, in files that other programs can write to.
        world: The processes. The ranks share the work.
        refuse: Whether other images are an error, rather than a warning.

    Returns:
        The identities of the files that this rank has looked up, by number of the shard: one W-th of all.

    Raises:
        ResumeError: On all ranks: shards hold other images than those that the run was started on.
        DataError: On all ranks: a shard cannot be read.
    """
    first_rows = [0, *accumulate(shards.samples_per_shard.tolist())]
    numbers = range(len(shards.shards))
    identities: dict[int, Identity] = {}
    now = _share(world, shards, numbers, lambda number: _make_stamp(shards, number, first_rows[number], identities))
    before = _read_recorded(run, shards, world)
    if before is None:
        world.run_on_main(lambda: _write(run, shards, now))
        return identities
    touched = [number for number in numbers if now[number] != before[number]]
    others = [number for number in touched if now[number][-1] != before[number][-1]]
    alike = [number for number in touched if now[number][-1] == before[number][-1]]
    hashed = [*_within_budget(shards, others), *_within_budget(shards, alike)]
    is_whole = _share(world, shards, hashed, lambda number: _has_recorded_sha256(shards, number))
    # the index decides where a shard was read: the one that was recorded may have been a damaged copy of it
    changed = [n for n in touched if not is_whole.get(n, now[n][-1] == before[n][-1])]
    if changed:
        _report(run, shards, changed, refuse)
    if touched:
        LOG.info(
            "%d of %d shards were written or copied since they were recorded; %d of them were compared with the index.",
            len(touched),
            len(now),
            len(hashed),
        )
        verified = {number: now[number] if is_whole.get(number) else before[number] for number in numbers}
        world.run_on_main(lambda: _write(run, shards, verified))
    return identities


def _within_budget(shards: ShardSet, numbers: Sequence[int]) -> list[int]:
    """The first of these shards, up to ``HASHED_BYTES``; a larger one alone."""
    bytes_before = [0, *accumulate(shards.shards[number].bytes for number in numbers)]
    return [number for number, total in zip(numbers, bytes_before, strict=False) if total < HASHED_BYTES]


def _share(world: World, shards: ShardSet, numbers: Sequence[int], work: Callable[[int], Any]) -> dict[int, Any]:
    """``work(number)`` of every shard number, on all ranks. A collective: the ranks share the work."""

    def call(number: int) -> tuple[Any, str]:
        world.set_phase("verify")
        try:
            return work(number), ""
        except OSError as error:
            return None, error.strerror or str(error)

    mine = numbers[world.rank :: world.size]
    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(zip(mine, pool.map(call, mine), strict=True))
    reports = [json.loads(text) for text in world.all_gather_text(json.dumps(results))]
    shared = {number: result for report in reports for number, result in report}
    for number, (_, error) in sorted(shared.items()):
        if error:
            raise DataError(
                f"shard {shards.path(number)}",
                got=error,
                expected="a readable file",
                fix="check that the file system works; `hpcssl-shard verify` reads every byte",
            )
    return {number: result for number, (result, _) in shared.items()}


def _make_stamp(shards: ShardSet, number: int, first_row: int, identities: dict[int, Identity]) -> Stamp:
    digest, count = hashlib.sha256(), shards.shards[number].samples
    descriptor = os.open(shards.path(number), os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        identities[number] = identity_of(status)
        for draw in rng.raw(rng.key(0, "recorded images", number), IMAGES_PER_SHARD if count else 0):
            _, offset, size = shards.samples.image(first_row + int(draw % np.uint64(count)))
            digest.update(os.pread(descriptor, size, offset))
    finally:
        os.close(descriptor)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest.hexdigest()[:16]]


def _has_recorded_sha256(shards: ShardSet, number: int) -> bool:
    return files.sha256_of_file(shards.path(number)) == shards.shards[number].sha256


def _read_recorded(run: RunDir, shards: ShardSet, world: World) -> list[Stamp] | None:
    """The recorded stamps, as rank 0 reads them; None if there are none of these shards."""
    record = files.read_record(run.shards, _FIELDS) if world.is_main else None
    is_usable = record is not None and record["train"] == shards.digest and len(record["shards"]) == len(shards.shards)
    text = json.dumps(record["shards"] if record is not None and is_usable else None) if world.is_main else None
    recorded: list[Stamp] | None = json.loads(world.broadcast_text(text))
    return recorded


def _write(run: RunDir, shards: ShardSet, stamps: dict[int, Stamp]) -> None:
    files.write_record(run.shards, {"train": shards.digest, "shards": [stamps[n] for n in range(len(stamps))]})


def _report(run: RunDir, shards: ShardSet, changed: list[int], refuse: bool) -> None:
    names = ", ".join(shards.shards[number].name for number in changed[:8])
    got = f"{len(changed)} shards with other content: {names}{', …' if len(changed) > 8 else ''}"
    if not refuse:
        LOG.warning("Shards of %s: %s. The run continues, because data.changed=warn.", shards.root, got)
        return
    raise ResumeError(
        f"shards of {shards.root}",
        got=got,
        expected=f"the images that the run {run.root} was started on",
        fix="restore these shards as they were, and run the same command again; data.changed=warn trains on with other "
        "images",
    )
