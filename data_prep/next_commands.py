"""The commands that lead on from the shards that a command has written."""

from __future__ import annotations

import shlex
from pathlib import Path


def next_commands(folders: list[Path]) -> list[str]:
    """Return the commands to go on with: look at the shards, then write a recipe for them, which prints the next ones.

    Args:
        folders: The shards of the training part, and those of the validation part if there is one.
    """
    data = folders[0].parent if len(folders) > 1 else folders[0]
    return [
        f"hpcssl-shard show {_quote(folders[0])}",
        f"hpcssl init {_quote(data)} > {shlex.quote(data.name + '.yaml')}",
    ]


def _quote(path: Path) -> str:
    """Return a path as a word of a shell, relative to the current folder where it lies below it."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
