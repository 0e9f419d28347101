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
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcssl.data.shards import INDEX, ROWS, TARGETS, Shard, ShardSet
from hpcssl.errors import DataError
from hpcssl.files import atomic_file, atomic_write

log = logging.getLogger("hpcssl")
_BLOCK = 4 << 20


def stage(shards: ShardSet, folder: Path | str, progress: Callable[[], None] = lambda: None) -> ShardSet:
    """The same set below ``folder``, a directory on this node's disk; copied if it is not there yet.

    It lands in a subfolder named by the set's digest, which only this user can enter: several sets and several jobs
    share a folder. ``progress`` is called before each copy.

    Raises ``DataError`` where there is too little room, or a shard differs from its index.
    """
    target = own_folder(folder, shards.digest[:16])
    with locked(target / "lock"):
        if not _is_whole(target):
            _copy_all(shards, target, progress)
    staged = ShardSet.open(target)
    if staged.digest != shards.digest:
        raise DataError(f"staging folder {target}", got="another set under this name", expected=shards.digest[:16],
                        mend="remove that folder")
    return staged


def own_folder(folder: Path | str, name: str) -> Path:
    """``folder/hpcssl-UID-name``, made if need be: a real folder of this user's that nobody else may enter.

    /tmp and /dev/shm belong to everybody: what another user has put there under this name, a link to a folder of ours
    among it, is refused. Raises ``DataError``.
    """
    target = Path(folder).absolute() / f"hpcssl-{os.getuid()}-{name}"
    what = f"staging folder {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            target.mkdir(mode=0o700)
        found = target.lstat()
    except OSError as error:
        raise DataError(what, got=error.strerror or str(error), expected="a folder that can be made there",
                        mend="name a folder on this node's own disk with data.stage, such as /tmp") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "a file"
        raise DataError(what, got="a folder of another user" if stat.S_ISDIR(found.st_mode) else kind,
                        expected="a folder of our own", mend="remove it, or choose another data.stage on this node")
    if found.st_mode & 0o077:
        target.chmod(0o700)
    return target


def _is_whole(target: Path) -> bool:
    """Whether all was copied, and nobody has removed or cut a part since: then that part is copied again."""
    if not (target / INDEX).exists():
        return False
    try:
        ShardSet.open(target)
    except DataError as error:
        log.warning("%s; it is staged again", error)
        (target / INDEX).unlink()
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file; it dies with its holder."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.utime(fd)  # `hpcssl-shard show` says when a set was last used
        yield
    finally:
        os.close(fd)  # and with it the lock


def _copy_all(shards: ShardSet, target: Path, progress: Callable[[], None]) -> None:
    for left_over in target.glob(".*.tmp"):  # of a copy that was killed; under the lock nobody else writes here
        left_over.unlink()
    todo = [(n, s) for n, s in enumerate(shards.shards)
            if not (target / s.name).exists() or (target / s.name).stat().st_size != s.bytes]
    needed, free = sum(s.bytes for _, s in todo), shutil.disk_usage(target).free
    if needed > free:
        raise no_room(target, needed, free)
    log.info("staging %d of %d shards (%.1f GB) to %s", len(todo), len(shards.shards), needed / 1e9, target)
    try:
        for number, shard in todo:
            progress()
            _copy(shards.path(number), target / shard.name, shard)
        targets = [] if shards.targets is None else [TARGETS]
        for name in (ROWS, *targets, INDEX):  # the index last: with it the copy counts
            atomic_write(target / name, (shards.root / name).read_bytes())
    except OSError as error:
        raise refused(target, needed, error) from error


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


def again(shards: ShardSet, staged: ShardSet, number: int) -> None:
    """Copy one shard again, whose staged copy has changed on the disk. Raises ``DataError``."""
    try:
        _copy(shards.path(number), staged.path(number), shards.shards[number])
    except OSError as error:
        raise refused(staged.root, shards.shards[number].bytes, error) from error


def refused(target: Path, needed: int, error: OSError) -> DataError:
    """What to raise where reading or writing a copy failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(target, needed, shutil.disk_usage(target).free)
    return DataError(f"staging to {target}", got=f"{error.strerror or error} ({error.filename or 'while copying'})",
                     expected="shards that can be read, and a folder that can be written",
                     mend="check both, then run the same command again: what is copied stays")


def no_room(target: Path, needed: int, free: int) -> DataError:
    return DataError(f"staging to {target}", got=f"{free / 1e9:.2f} GB of free space",
                     expected=f"{needed / 1e9:.2f} GB", mend="free room there (`hpcssl-shard show` of that folder "
                     "lists the sets in it), name another disk, or leave out data.stage to read the shards where they "
                     "are; of a remote set, data.window=N with data.stage_gb=N keeps a part")
