"""Copy a shard folder to this node's own disk: once per node, verified, and safe to kill at any moment.

Every process of a node calls ``stage``. One copies while the others wait for a file lock, which the kernel frees when
its holder ends. A shard appears under its name only when it is complete and its sha256 agrees, so that an interrupted
copy continues where it stopped. ``index.json`` is written last: a folder with an index is complete. Nobody else writes
these files, so they may be mapped into memory, which is not safe on a shared file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hpcssl.data.node_folder import (
    copy_error,
    hold_lock,
    is_verified,
    make_private_folder,
    mark_verified,
    no_space_error,
)
from hpcssl.data.shards import INDEX, ROWS, TABLE, TARGETS, Shard, ShardSet
from hpcssl.data.stream import Remote
from hpcssl.errors import DataError, format_bytes
from hpcssl.files import atomic_file, atomic_write, sha256_of_file

LOG = logging.getLogger("hpcssl")
_BLOCK = 4 << 20


def stage(shards: ShardSet, folder: Path | str, watch: Callable[[bool], None] = lambda _: None) -> ShardSet:
    """Copy a shard set below ``folder`` unless it is there already.

    The copy lies in a subfolder named by the set's digest, which only this user can enter. So several sets and several
    jobs can share one folder.

    Args:
        shards: The set to copy.
        folder: A folder on this node's disk.
        watch: Called as ``watch(progress)`` before each block is copied, and again and again while another process
            copies; ``progress`` is whether its copy has grown since. It may raise to end the staging, which the next
            call continues.

    Returns:
        The copied set.

    Raises:
        DataError: If there is too little space, a file cannot be read or written, or a shard differs from its index.
    """
    target = make_private_folder(folder, shards.digest[:16])
    seen = (0, 0)

    def watch_other() -> None:
        nonlocal seen
        before, seen = seen, _measure(target)
        watch(seen != before)

    with hold_lock(target / "lock", watch_other):
        if not _is_complete(target):
            _copy_missing(shards, target, watch)
    staged = ShardSet.open(target, mapped=True)
    if staged.digest != shards.digest:
        raise DataError(
            f"staging folder {target}",
            got="another set under this name",
            expected=shards.digest[:16],
            fix="remove that folder",
        )
    return staged


def restage_shard(shards: ShardSet, staged: ShardSet, number: int) -> None:
    """Copy one shard again after its copy has changed on the disk.

    Args:
        shards: The original set.
        staged: The copied set.
        number: Number of the shard.

    Raises:
        DataError: If the shard cannot be copied, or the original differs from its index.
    """
    try:
        _copy(shards.path(number), staged.path(number), shards.shards[number])
    except OSError as error:
        raise copy_error(Path(staged.root), shards.shards[number].bytes, error) from error


def stage_index(remote: Remote, text: str, folder: Path) -> ShardSet:
    """Keep the index files of a remote set in a folder of this node. They are downloaded once per node.

    Args:
        remote: The remote set.
        text: Its ``index.json``.
        folder: The folder, in which the set's shards will also lie.

    Returns:
        The set with its files in ``folder``; shards may be missing.

    Raises:
        DataError: If a file cannot be downloaded or written, or the index files do not agree with each other.
    """

    def write(name: str, body: bytes | mmap.mmap | str) -> None:
        try:
            atomic_write(folder / name, body)
        except OSError as error:
            raise copy_error(folder, len(body), error) from error

    def read(name: str, sha256: str) -> Path:
        path = folder / name
        if not path.exists() or sha256_of_file(path) != sha256:
            write(name, remote.read_file(text, name, sha256))
        return path

    with hold_lock(folder / "lock"):
        shards = ShardSet.from_index(f"the index of {remote.address}", folder, text, read)
        if not (folder / INDEX).exists() or (folder / INDEX).read_text() != text:
            write(INDEX, text)
    return shards


def _is_complete(target: Path) -> bool:
    """Whether every file is there as it was copied. Otherwise the index goes, so that the others are copied again."""
    if not (target / INDEX).exists():
        return False
    try:
        staged = ShardSet.open(target)
        changed = [shard.name for shard in staged.shards if not is_verified(target / shard.name, shard)]
        why = f"{', '.join(changed[:8])} in {target} changed since they were copied" if changed else ""
    except DataError as error:
        why = str(error)
    if why:
        LOG.warning("Staging shards again: %s", why)
        (target / INDEX).unlink()
    return not why


def _measure(target: Path) -> tuple[int, int]:
    """Number of files in a folder, and bytes of those that another process is writing."""
    names, size = os.listdir(target), 0
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            size += (target / name).stat().st_size if name.endswith(".tmp") else 0
    return len(names), size


def _copy_missing(shards: ShardSet, target: Path, watch: Callable[[bool], None]) -> None:
    for temporary in target.glob(".*.tmp"):  # of a copy that was killed; nobody else writes here under the lock
        temporary.unlink()
    missing = [
        (number, shard) for number, shard in enumerate(shards.shards) if not is_verified(target / shard.name, shard)
    ]
    needed, free = sum(shard.bytes for _, shard in missing), shutil.disk_usage(target).free
    if needed > free:
        raise no_space_error(target, needed, free)
    LOG.info("Staging %d of %d shards (%s) to %s.", len(missing), len(shards.shards), format_bytes(needed), target)
    try:
        for number, shard in missing:
            _copy(shards.path(number), target / shard.name, shard, watch)
        names = [TABLE if shards.pages else ROWS, *([] if shards.targets is None else [TARGETS])]
        pages = [shard.page for shard in shards.shards] if shards.pages else []
        for name in (*pages, *names, INDEX):  # the index comes last, because it marks the copy as complete
            atomic_write(target / name, (Path(shards.root) / name).read_bytes())
    except OSError as error:
        raise copy_error(target, needed, error) from error


def _copy(source: Path, target: Path, shard: Shard, watch: Callable[[bool], None] = lambda _: None) -> None:
    digest = hashlib.sha256()
    with open(source, "rb") as reading, atomic_file(target) as writing:
        while block := reading.read(_BLOCK):
            watch(True)
            digest.update(block)
            writing.write(block)
        if digest.hexdigest() != shard.sha256:
            raise DataError(
                f"shard {source}",
                got=f"sha256 {digest.hexdigest()[:12]}…",
                expected=f"{shard.sha256[:12]}… as recorded in {INDEX}",
                fix="run `hpcssl-shard verify`, and copy or write this shard again",
            )
        mark_verified(writing, shard)
