"""Atomic and durable writes, JSON records, and file locks.

Writers create a temporary file in the same folder, sync it, and rename it. A reader, or a job that starts after a
kill, therefore sees the old file or the new one, never a part of one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hpcssl.storage.folders import check_pinned, make_folder, sync_folder
from hpcssl.storage.records import NO_FIELDS, Fields, RecordError, parse_record, seal
from hpcssl.storage.tail import MAX_LINE_BYTES

LOG = logging.getLogger("hpcssl")
_MAX_RECORD_BYTES = 64 << 20
_warned: set[str] = set()  # messages that this process has logged: some files are read every second
NO_LOCK_ERRORS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of ``flock`` on file systems that have no locks."""


def _open_private(path: str, flags: int) -> int:
    """Open a file that others may read but not write, whatever the umask: some files say what to execute."""
    return os.open(path, flags, 0o644)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def temporaries(folder: Path, name: str = "*") -> list[Path]:
    """Temporary files of ``name`` that killed writers left in ``folder``, for a caller who is the only writer."""
    return sorted(folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"))


def remove(path: Path) -> None:
    """Remove a file or a folder; errors are ignored. A folder is renamed first, so that it is never seen in part."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            doomed = path if path.suffix == ".tmp" else _temporary(path)
            if doomed != path:
                os.rename(path, doomed)
            shutil.rmtree(doomed)
        else:
            path.unlink()


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open ``path`` for writing bytes; it appears under its name only if the block ends without an error.

    Yields:
        The open file.

    Raises:
        OSError: Naming ``path``, not the temporary file.
    """
    path = Path(path)
    make_folder(path.parent)
    part = _temporary(path)
    try:
        with open(part, "wb", opener=_open_private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        _set_path(error, part, path)
        raise


def _set_path(error: BaseException, part: Path, path: Path) -> None:
    """Let an error name ``path``: a failed write names no file, and the user does not know the temporary."""
    if isinstance(error, OSError) and error.filename in (None, os.fspath(part)):
        error.filename = os.fspath(path)


def atomic_write(path: Path | str, content: bytes | mmap.mmap | str) -> None:
    """Write all of ``content`` to ``path``, or leave ``path`` as it was. Raises ``OSError``."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` if the block ends without an error.

    ``path`` must not exist yet, since directories cannot be swapped in one operation.

    Yields:
        The temporary directory.
    """
    path = Path(path)
    make_folder(path.parent)
    part = _temporary(path)
    try:
        part.mkdir()
        yield part
        sync_folder(part)
        os.rename(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        _set_path(error, part, path)
        raise


def append_line(path: Path | str, record: Mapping[str, Any]) -> None:
    """Append a record with its checksum to a JSON-lines file durably.

    It is one call of ``write``, so that lines of two writers never interleave. If a kill or a full disk has left a torn
    line at the end, that is terminated first.

    Raises:
        OSError: If the line cannot be written.
    """
    path = Path(path)
    make_folder(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.fstat(fd).st_size
        torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
        line = b"\n" * torn + (json.dumps(seal(record)) + "\n").encode()
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
        if end == 0:
            sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        os.close(fd)


def write_record(path: Path | str, record: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write a JSON object with its checksum to a file of its own, atomically. Raises ``OSError``."""
    atomic_write(path, json.dumps(seal(record), indent=indent) + "\n")


def read_lines(
    path: Path | str, required: Fields = NO_FIELDS, optional: Fields = NO_FIELDS, *, max_bytes: int = MAX_LINE_BYTES
) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file; an empty list if it does not exist.

    Lines that ``parse_record`` refuses (torn by a kill, or damaged) are left out, with a warning in the log.

    Args:
        path: The file.
        required: Fields that a record must have, with their types.
        optional: Types of fields that it may have.
        max_bytes: Longest line that is accepted; of a longer one no more than this is held in memory.
    """
    records: list[dict[str, Any]] = []
    skipped: list[str] = []
    if not Path(path).exists():
        return []
    with open(path, "rb") as file:
        for number, (line, is_whole) in enumerate(_split_lines(file, max_bytes), 1):
            try:
                if not is_whole:
                    raise RecordError(f"more than {max_bytes} bytes")
                records.append(parse_record(line, required, optional))
            except RecordError as error:
                if line.strip() and (line.endswith(b"\n") or not is_whole):  # the end of the file may be being written
                    skipped.append(f"line {number} has {error}")
    if skipped:
        _warn_once(path, f"lines that cannot be used and are skipped: {len(skipped)}; {skipped[0]}")
    return records


def _split_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Yield each line, and whether it is no longer than ``max_bytes``; of a longer one only the beginning."""
    while line := file.readline(max_bytes + 1):
        is_whole = len(line) <= max_bytes
        rest = b"" if is_whole or line.endswith(b"\n") else b"..."
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(max_bytes)
        yield line, is_whole


def read_record(path: Path | str, required: Fields = NO_FIELDS, optional: Fields = NO_FIELDS) -> dict[str, Any] | None:
    """Read a file that holds one JSON object.

    Returns:
        The object, without its checksum. None if the file does not exist; or if ``parse_record`` refuses it, with a
        warning in the log that says why.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_RECORD_BYTES + 1)
        if len(text) > _MAX_RECORD_BYTES:
            raise RecordError(f"more than {_MAX_RECORD_BYTES} bytes")
        return parse_record(text, required, optional)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except RecordError as error:
        _warn_once(path, f"the file is damaged and not used; it has {error}")
        return None


def _warn_once(path: Path | str, what: str) -> None:
    message = f"{path}: {what}."
    if message not in _warned:
        _warned.add(message)
        LOG.warning("%s", message)


def sha256_of_file(path: Path | str) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_descriptor(descriptor: int, *, wait: bool = False) -> bool | None:
    """Take the kernel's exclusive lock (``flock``) of an open file.

    The kernel releases it when the file is closed or the process ends, so a kill never leaves a lock behind. (The
    package ``filelock`` does not serve here: it truncates the file that it locks, and we lock files that hold records;
    and it cannot continue where the file system has no locks.)

    Args:
        descriptor: The open file.
        wait: Wait until the lock is free.

    Returns:
        True if it was taken, False if another process holds it, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # the latter where NFS emulates the lock by another one
        return False
    except OSError as error:
        if error.errno not in NO_LOCK_ERRORS:
            raise
        return None
    return True


@contextlib.contextmanager
def exclusive_lock(path: Path | str, patience_s: float = 10.0) -> Iterator[None]:
    """Hold the lock of ``path`` for a short read-modify-write. The file is created if it does not exist.

    After ``patience_s`` seconds, or where there are no locks, the block runs without: it records how a process ends,
    and a process that fails must not hang here.
    """
    deadline = time.monotonic() + patience_s
    check_pinned(path)
    with open(path, "ab", opener=_open_private) as file:
        with contextlib.suppress(OSError):
            while lock_descriptor(file.fileno()) is False and time.monotonic() < deadline:
                time.sleep(0.05)
        yield
