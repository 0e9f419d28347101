"""Files that are whole or absent, and every path of a run.

Writers go to a temporary in the same directory, fsync, and rename: a reader, or a job that starts after a kill,
sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator:
    """Open ``path`` for writing bytes; it appears under its name only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _temporary(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_dir(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write the whole of ``content`` to ``path``, or leave ``path`` as it was."""
    with atomic_file(path) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
        except OSError as error:  # a write does not say where
            error.filename = error.filename or os.fspath(path)
            raise


@contextlib.contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the block ends without an error.

    ``path`` must not exist yet: directories cannot be swapped in one operation.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _temporary(path)
    part.mkdir()
    try:
        yield part
        _sync_dir(part)
        os.rename(part, path)
        _sync_dir(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def append_line(path: Path | str, record: dict) -> None:
    """Append one JSON line, durably. One ``write`` call, so that lines of two writers never interleave; a torn line
    that a kill or a full disk left behind is ended first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.fstat(fd).st_size
        torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
        line = b"\n" * torn + (json.dumps(record) + "\n").encode()
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(fd)
    finally:
        os.close(fd)


def read_lines(path: Path | str) -> list[dict]:
    """The JSON lines of ``path``; none where it does not exist. A torn last line (a kill mid-write) is left out."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


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

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def weights_at(self, step: int) -> Path:
        return self.weights / f"step-{step:08d}.safetensors"

    def eval_rows(self, name: str) -> Path:
        return self.evals / f"{name}.jsonl"

    def eval_state(self, name: str, identity: str) -> Path:
        """Where an unfinished evaluation keeps what a resume needs."""
        return self.evals / "unfinished" / f"{name}-{identity[:16]}.safetensors"
