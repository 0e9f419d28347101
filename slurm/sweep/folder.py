"""The folder of many runs, and the record of what it is for: ``sweep.json``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl import files
from hpcssl.errors import ConfigError, SubmitError
from hpcssl.storage.records import Fields

FILE, LOCK = "sweep.json", ".lock"
_FIELDS: Fields = {"kind": str, "source": str, "values": list[str], "points": list[str]}


@dataclass(frozen=True)
class Definition:
    """What a folder of runs is for. A folder with another one is refused.

    Attributes:
        kind: ``sweep``, ``search`` (a sweep whose points a sampler chooses) or ``table``.
        source: The recipe, or the table.
        values: The recipe values that all runs share, sorted.
        points: The names of the runs; of a search its ranges, lists and sampler; empty for a table, whose number of
            seeds may grow.
    """

    kind: str
    source: str
    values: tuple[str, ...]
    points: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {"kind": self.kind, "source": self.source, "values": [*self.values], "points": [*self.points]}


def check_folder(root: Path, definition: Definition) -> None:
    """Check that a folder does not exist, is empty, or is of the same definition.

    Raises:
        ConfigError: It is anything else.
        SubmitError: Its record is damaged.
    """
    what, fix = f"folder {root}", "choose another folder with --out"
    if root.exists() and not root.is_dir():
        raise ConfigError(what, got="a file", expected="a folder", fix=fix)
    if not root.is_dir() or not any(path.name != LOCK for path in root.iterdir()):
        return
    if not (root / FILE).exists():
        raise ConfigError(
            what, got="other files", expected="an empty or new folder, or that of the same command", fix=fix
        )
    stored = files.read_record(root / FILE, _FIELDS)
    if stored is None:
        raise SubmitError(
            f"record {root / FILE}",
            got="a file that cannot be read",
            expected="the file that hpcssl-submit wrote",
            fix="remove the file, and move the runs beside it to a new folder",
        )
    changed = [name for name, value in definition.to_json().items() if stored.get(name) != value]
    if changed:
        raise ConfigError(
            what,
            got=f"a {stored['kind']} of {stored['source']} with other {_NAMES[changed[0]]}: "
            f"{_shorten(stored[changed[0]])}",
            expected=f"a {definition.kind} of {definition.source}: {_shorten(definition.to_json()[changed[0]])}",
            fix=fix,
        )


@contextlib.contextmanager
def open_folder(root: Path, definition: Definition) -> Iterator[None]:
    """Create a folder of ``check_folder`` if it is missing, and allow one submission into it at a time.

    Raises:
        ConfigError: Another command has taken the folder meanwhile.
        OSError: The folder cannot be written, or the file system has no locks.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / LOCK, "ab") as lock:
        files.lock_descriptor(lock.fileno(), wait=True)
        if (root / FILE).exists():
            check_folder(root, definition)
        else:
            files.write_record(root / FILE, definition.to_json(), indent=1)
        yield


_NAMES = {"kind": "purpose", "source": "source", "values": "values", "points": "points"}


def _shorten(value: Any) -> str:
    text = " ".join(value) if isinstance(value, list) else str(value)
    return (text[:100] + " …" if len(text) > 100 else text) or "none"
