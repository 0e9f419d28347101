"""Files that are whole or absent, and every path of a run.

Writers go to a temporary in the same directory, fsync, and rename: a reader, or a job that starts after a kill,
sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _private(path: str, flags: int) -> int:
    """Files that others may read and not write, whatever the umask: some of them say what to run."""
    return os.open(path, flags, 0o644)


def make_folder(path: Path | str) -> None:
    """Create a folder and what is missing above it, durably: a file that is safe in a folder that is not, is lost."""
    path, missing = Path(path), []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:  # a file, or a link that leads nowhere
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(folder)) from error
        with contextlib.suppress(PermissionError):  # a folder of others, in which we may write and not list
            _sync_dir(folder.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def temporaries(folder: Path, name: str = "*") -> list[Path]:
    """What a killed writer of ``name`` left in ``folder``. For who knows that no other writer is at work there."""
    return sorted(folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"))


def remove(path: Path) -> None:
    """Remove a file or a folder if it can be. A folder vanishes at once: half of one must never be met."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            gone = path if path.suffix == ".tmp" else _temporary(path)
            if gone != path:
                os.rename(path, gone)
            shutil.rmtree(gone)
        else:
            path.unlink()


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator:
    """Open ``path`` for writing bytes; it appears under its name only when the block ends without an error."""
    path = Path(path)
    make_folder(path.parent)
    part = _temporary(path)
    try:
        with open(part, "wb", opener=_private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_dir(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        _name(error, part, path)
        raise


def _name(error: BaseException, part: Path, path: Path) -> None:
    """A write does not say where it failed, and nobody knows the temporary: the error shall name ``path``."""
    if isinstance(error, OSError) and error.filename in (None, os.fspath(part)):
        error.filename = os.fspath(path)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write the whole of ``content`` to ``path``, or leave ``path`` as it was."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the block ends without an error.

    ``path`` must not exist yet: directories cannot be swapped in one operation.
    """
    path = Path(path)
    make_folder(path.parent)
    part = _temporary(path)
    try:
        part.mkdir()
        yield part
        _sync_dir(part)
        os.rename(part, path)
        _sync_dir(path.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        _name(error, part, path)
        raise


def append_line(path: Path | str, record: dict) -> None:
    """Append one JSON line, durably. One ``write`` call, so that lines of two writers never interleave; a torn line
    that a kill or a full disk left behind is ended first."""
    path = Path(path)
    make_folder(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.fstat(fd).st_size
        torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
        line = b"\n" * torn + (json.dumps(record) + "\n").encode()
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
        if end == 0:
            _sync_dir(path.parent)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def alone(path: Path | str, patience_s: float = 10.0) -> Iterator[None]:
    """One process at a time, for what must be read from ``path`` and then written. Who has waited too long goes on
    without: a process that has crashed must leave."""
    limit = time.monotonic() + patience_s
    with open(path, "ab", opener=_private) as file:
        while time.monotonic() < limit:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system that has no locks
                break
        yield


class LineFile:
    """A JSON-lines file of one writer, kept open. Lines that a full disk refuses wait, in order, for the next call:
    no line is lost or torn for want of room while the process lives."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._fd: int | None = self._open()
        self._waiting: list[bytes] = []

    def _open(self) -> int:
        make_folder(self.path.parent)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _follow(self) -> None:
        """Whoever moved or removed the file gets a new one: lines to a file without a name are lost."""
        if self.path.exists() and os.path.samestat(os.fstat(self._fd), self.path.stat()):
            return
        fresh = self._open()
        os.close(self._fd)
        self._fd = fresh

    def add(self, *records: dict) -> str | None:
        """Write the lines; if they have to wait, the reason."""
        self._waiting += [(json.dumps(record) + "\n").encode() for record in records]
        if not self._waiting:
            return None
        body, end = b"".join(self._waiting), None
        try:
            self._follow()
            end = os.fstat(self._fd).st_size
            if os.write(self._fd, body) < len(body):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                if end is not None:
                    os.ftruncate(self._fd, end)
            return error.strerror
        self._waiting.clear()
        return None

    def sync(self) -> str | None:
        """Write what waits, and everything is on the disk; else the reason."""
        why = self.add()
        try:
            os.fsync(self._fd)
        except OSError as error:
            return why or error.strerror
        return why

    def close(self) -> str | None:
        if self._fd is None:
            return None
        why = self.sync()
        os.close(self._fd)
        self._fd = None
        return why


def read_lines(path: Path | str, *keys: str) -> list[dict]:
    """The JSON objects of ``path``, one a line; none where it does not exist. A torn line (a kill mid-write) or a
    rotten one, which has not all of ``keys``, is left out."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and record.keys() >= {*keys}]


def read_record(path: Path | str, key: str) -> dict | None:
    """The JSON object of a file, which has ``key``; None where there is no such file, and where it is damaged."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        record = json.loads(Path(path).read_text())
        if isinstance(record, dict) and key in record:
            return record
    return None


def digest(path: Path | str) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class RunDir:
    """Every path of one run. Nothing else in the three packages joins strings into a run's paths."""

    root: Path

    def __init__(self, root: Path | str):
        object.__setattr__(self, "root", Path(root).absolute())

    config = property(lambda self: self.root / "config.yaml")
    code = property(lambda self: self.root / "code")
    data = property(lambda self: self.root / "data.json")
    journal = property(lambda self: self.root / "journal.jsonl")
    samples = property(lambda self: self.root / "samples.jsonl")
    events = property(lambda self: self.root / "tensorboard")
    damaged = property(lambda self: self.root / "damaged.jsonl")
    attempts = property(lambda self: self.root / "attempts.jsonl")
    jobs = property(lambda self: self.root / "jobs.jsonl")
    chain = property(lambda self: self.root / "chain.json")
    checkpoints = property(lambda self: self.root / "checkpoints")
    weights = property(lambda self: self.root / "weights")
    evals = property(lambda self: self.root / "evals")
    features = property(lambda self: self.root / "evals" / "features")
    logs = property(lambda self: self.root / "logs")
    lock = property(lambda self: self.root / "lock")
    done = property(lambda self: self.root / "done.json")

    @property
    def finished(self) -> dict | None:
        """What ``done`` says: the last ``step`` and its ``weights``. None before the end, and where it is damaged: the
        training then goes on from its last checkpoint and writes it again."""
        return read_record(self.done, "step")

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def weights_at(self, step: int) -> Path:
        return self.weights / f"step-{step:08d}.safetensors"

    def eval_rows(self, name: str) -> Path:
        return self.evals / f"{name}.jsonl"

    def eval_state(self, name: str, identity: str) -> Path:
        """Where an unfinished evaluation keeps what a resume needs."""
        return self.evals / "unfinished" / f"{name}-{identity[:16]}.safetensors"
