"""Copy a shard folder to this node's own disk: once per node, verified, and safe to kill at any moment.

Every process of a node calls ``stage``; one copies while the others wait at a file lock, which dies with its holder.
A shard appears under its name only when it is whole and its sha256 agrees, so that a copy that was cut off goes on
where it stopped. ``index.json`` comes last: where it is, all is there. Nobody else writes these files, so they may be
mapped (``Reader(..., mapped=True)``), which a shared file system does not allow.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hpcssl.data.shards import INDEX, ROWS, TARGETS, Shard, ShardSet
from hpcssl.errors import DataError
from hpcssl.files import atomic_file, atomic_write

log = logging.getLogger("hpcssl")
_BLOCK = 4 << 20


def stage(shards: ShardSet, folder: Path | str) -> ShardSet:
    """The same set below ``folder``, a directory on this node's disk; copied if it is not there yet.

    It lands in a subfolder named by the set's digest, which only this user can enter: several sets and several jobs
    share a folder. Raises ``DataError`` where there is too little room, or a shard differs from its index.
    """
    folder = Path(folder).absolute()
    target = folder / f"hpcssl-{os.getuid()}-{shards.digest[:16]}"
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if target.stat().st_uid != os.getuid():
        raise DataError(f"staging folder {target}", got="a folder of another user", expected="one of our own",
                        mend="choose another folder on this node's disk")
    with _locked(target / "lock"):
        if not (target / INDEX).exists():
            _copy_all(shards, target)
    staged = ShardSet.open(target)
    if staged.digest != shards.digest:
        raise DataError(f"staging folder {target}", got="another set under this name", expected=shards.digest[:16],
                        mend="remove that folder")
    return staged


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)  # and with it the lock


def _copy_all(shards: ShardSet, target: Path) -> None:
    for left_over in target.glob(".*.tmp"):  # of a copy that was killed; under the lock nobody else writes here
        left_over.unlink()
    todo = [(n, s) for n, s in enumerate(shards.shards)
            if not (target / s.name).exists() or (target / s.name).stat().st_size != s.bytes]
    needed, free = sum(s.bytes for _, s in todo), shutil.disk_usage(target).free
    if needed > free:
        raise _no_room(target, needed, free)
    log.info("staging %d of %d shards (%.1f GB) to %s", len(todo), len(shards.shards), needed / 1e9, target)
    try:
        for number, shard in todo:
            _copy(shards.path(number), target / shard.name, shard)
        targets = [] if shards.targets is None else [TARGETS]
        for name in (ROWS, *targets, INDEX):  # the index last: with it the copy counts
            atomic_write(target / name, (shards.root / name).read_bytes())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(target, needed, shutil.disk_usage(target).free) from error


def _copy(source: Path, target: Path, shard: Shard) -> None:
    digest = hashlib.sha256()
    with open(source, "rb") as read, atomic_file(target) as write:
        while block := read.read(_BLOCK):
            digest.update(block)
            write.write(block)
        if digest.hexdigest() != shard.sha256:
            raise DataError(f"shard {source}", got=f"sha256 {digest.hexdigest()[:12]}…",
                            expected=f"{shard.sha256[:12]}… as {INDEX} records",
                            mend="see `hpcssl-shard verify`, and copy or write this shard again")


def _no_room(target: Path, needed: int, free: int) -> DataError:
    return DataError(f"staging to {target}", got=f"{free / 1e9:.2f} GB of free space",
                     expected=f"{needed / 1e9:.2f} GB", mend="free room there, name another disk, or leave out "
                     "data.stage to read the shards where they are")
