"""A JSON-lines file with one line per step: it stays open, survives a full disk, and is cut when a run resumes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from hpcssl.storage.folders import make_folder
from hpcssl.storage.records import RecordError, parse_record
from hpcssl.storage.tail import read_backward


class JsonLinesWriter:
    """Appends records to a JSON-lines file that has one writer.

    Lines that a full disk refuses are kept in memory, in order, and written by a later call: as long as the process
    lives, no line is lost or torn.

    Args:
        path: The file. Missing folders are created.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._fd: int | None = self._open()
        self._pending: list[bytes] = []

    def _open(self) -> int:
        make_folder(self.path.parent)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _descriptor(self) -> int:
        """The open file. If it was moved or removed, a new one is opened: lines to an unnamed file would be lost."""
        assert self._fd is not None, "the writer is closed"
        if self.path.exists() and os.path.samestat(os.fstat(self._fd), self.path.stat()):
            return self._fd
        new = self._open()
        os.close(self._fd)
        self._fd = new
        return new

    def add(self, *records: dict[str, Any]) -> str | None:
        """Write records, one a line.

        Returns:
            None; or, if the lines have to wait, the reason in words.
        """
        self._pending += [(json.dumps(record) + "\n").encode() for record in records]
        if not self._pending:
            return None
        body, end = b"".join(self._pending), None
        try:
            self._descriptor()
            assert self._fd is not None
            end = os.fstat(self._fd).st_size
            if os.write(self._fd, body) < len(body):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                if end is not None and self._fd is not None:
                    os.ftruncate(self._fd, end)
            return error.strerror or str(error)
        self._pending.clear()
        return None

    def sync(self) -> str | None:
        """Write the lines that wait, and force everything to the disk.

        Returns:
            None; or, if that failed, the reason in words.
        """
        why = self.add()
        if self._fd is None:
            return why
        try:
            os.fsync(self._fd)
        except OSError as error:
            return why or error.strerror
        return why

    def close(self) -> str | None:
        """``sync`` and close the file. Returns the reason if some lines could not be written."""
        if self._fd is None:
            return None
        why = self.sync()
        os.close(self._fd)
        self._fd = None
        return why


def truncate_after(path: Path, step: int) -> None:
    """Remove the lines of a JSON-lines file that belong to later steps: a resumed run writes them again.

    Only these lines and the one before them are read. Lines at the end that cannot be read are removed as well.

    Args:
        path: The file, whose lines are in the order of their steps. It need not exist.
        step: The last step whose lines are kept.
    """
    if not path.exists():
        return
    end = path.stat().st_size
    for offset, line in read_backward(path):
        with contextlib.suppress(RecordError):
            if parse_record(line, {"step": int})["step"] <= step:
                end = offset + len(line) + 1
                break
        end = offset
    with open(path, "r+b") as file:
        if end > file.seek(0, os.SEEK_END):  # a last line without its end
            file.write(b"\n")
        file.truncate(end)
        os.fsync(file.fileno())


def read_scored_steps(path: Path, step: int) -> set[int]:
    """Return the steps from ``step`` on that have the scores of an evaluation in a journal, which is read from its end.

    Args:
        path: The journal. It need not exist.
        step: The first step that is looked for.
    """
    scored: set[int] = set()
    for _, line in read_backward(path) if path.exists() else ():
        with contextlib.suppress(RecordError):
            record = parse_record(line, {"step": int})
            if record["step"] < step:
                break
            if record.get("eval"):
                scored.add(record["step"])
    return scored
