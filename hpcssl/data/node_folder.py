"""Folders and locks on a node's own disk that the processes of one user share, and the errors of copies to them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hpcssl.data.shards import Shard
from hpcssl.errors import ConfigError, DataError, format_bytes
from hpcssl.files import lock_descriptor


def make_private_folder(folder: Path | str, name: str) -> Path:
    """Make ``folder/hpcssl-UID-name``, a folder that only this user can enter.

    Everybody can write to /tmp and /dev/shm. A file, a link or another user's folder of this name is therefore refused.

    Args:
        folder: Folder on the node's disk; made if it does not exist.
        name: End of the subfolder's name.

    Returns:
        The subfolder's path.

    Raises:
        DataError: If the folder cannot be made, or something else has its name.
    """
    target = Path(folder).absolute() / f"hpcssl-{os.getuid()}-{name}"
    what = f"staging folder {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            target.mkdir(mode=0o700)
        status = target.lstat()
    except OSError as error:
        raise DataError(
            what,
            got=error.strerror or str(error),
            expected="a path where a folder can be made",
            fix="set data.stage_dir to a folder on this node's own disk, such as /tmp",
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "a file"
        raise DataError(
            what,
            got="a folder of another user" if stat.S_ISDIR(status.st_mode) else kind,
            expected="a folder of this user",
            fix="remove it, or choose another data.stage_dir on this node",
        )
    if status.st_mode & 0o077:
        target.chmod(0o700)
    return target


POLL_S = 0.2
"""Seconds between two looks at a lock that another process holds."""


def mark_verified(file: BinaryIO, shard: Shard) -> None:
    """Mark a copy of a shard whose sha256 agrees: its modification time is set to one that follows from the sha256.

    Whoever writes into the file later changes that time. Call it after the last byte was written.
    """
    file.flush()
    os.utime(file.fileno(), (time.time(), _verified_time(shard)))


def is_verified(path: Path, shard: Shard) -> bool:
    """Whether the file has the size of the shard, and nobody wrote to it since ``mark_verified``. Reads no content."""
    try:
        return has_mark(path.stat(), shard)
    except OSError:
        return False


def has_mark(status: os.stat_result, shard: Shard) -> bool:
    """Whether a file of this status has the size of the shard and the mark of ``mark_verified``."""
    return status.st_size == shard.bytes and int(status.st_mtime) == _verified_time(shard)


def bytes_of_shards(folder: Path) -> int:
    """Bytes of all shards that are in a folder, from which other processes may be removing some."""
    total = 0
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _verified_time(shard: Shard) -> int:
    return int(shard.sha256[:7], 16)  # in seconds, before the year 1979


@contextlib.contextmanager
def hold_lock(path: Path, watch: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Wait for the lock of this file and hold it. The kernel frees it when the process ends.

    Args:
        path: The file.
        watch: Called again and again while another process holds the lock. It may raise to end the wait.

    Raises:
        OSError: If the file cannot be opened, or its file system has no locks.
    """
    with _open_lock_file(path) as descriptor:
        while not _take_lock(descriptor, path):
            watch()
            time.sleep(POLL_S)
        os.utime(descriptor)  # `hpcssl-shard show` reports when a set was last used
        yield


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock of this file if it is free.

    Yields:
        Whether the lock is held. False where another process has it.

    Raises:
        OSError: If the file cannot be opened, or its file system has no locks.
    """
    with _open_lock_file(path) as descriptor:
        yield _take_lock(descriptor, path)


@contextlib.contextmanager
def _open_lock_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # closing also frees the lock


def _take_lock(descriptor: int, path: Path) -> bool:
    is_held = lock_descriptor(descriptor)
    if is_held is None:  # going on without would let two processes write the same shard
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), os.fspath(path))
    return is_held


def copy_error(target: Path, needed: int, error: OSError) -> DataError:
    """Make the error for a copy to ``target`` that failed.

    Args:
        target: The folder that was written to.
        needed: Bytes that the copy needs, for the message about a full disk.
        error: What reading or writing raised.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space_error(target, needed, shutil.disk_usage(target).free)
    return DataError(
        f"staging to {target}",
        got=f"{error.strerror or error} ({error.filename or 'while copying'})",
        expected="readable shards and a writable folder",
        fix="check both, then run the same command again; finished shards are kept",
    )


def no_space_error(target: Path, needed: int, free: int) -> DataError:
    """Make the error for a disk with ``free`` bytes of space where ``needed`` bytes are required."""
    return DataError(
        f"staging to {target}",
        got=f"{format_bytes(free)} of free space",
        expected=format_bytes(needed),
        fix="free space there (`hpcssl-shard show` of that folder lists the sets in it), name another disk, "
        "or leave out data.stage_dir to read the shards where they are; for a remote set, "
        "data.shuffle_window=N with data.stage_limit_gb=N keeps only a part",
    )


def small_limit_error(limit: int, least: int, window: int | str) -> ConfigError:
    """Make the error for a limit of bytes below the ``least`` that a window of the shuffle reads at a time."""
    alternative = (
        "set data.shuffle_window=16, which reads a few shards at a time"
        if window == "all"
        else "use a smaller data.shuffle_window, or smaller shards"
    )
    return ConfigError(
        "data.stage_limit_gb",
        got=f"{limit / 1e9:g}",
        expected=f"at least {least / 1e9:.3g} for the shards that data.shuffle_window={window} reads at a time, or 0 "
        "for no limit",
        fix=f"raise it, or {alternative}",
    )
