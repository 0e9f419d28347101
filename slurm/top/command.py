"""The command ``hpcssl-submit top``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpcssl.errors import ConfigError

Folders = Annotated[
    list[Path] | None, typer.Argument(metavar="[DIR]...", help="Run folders, or folders of runs; by default this one.")
]


def top(
    folders: Folders = None,
    every: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="Time between refreshes.")] = 10.0,
) -> None:
    """Show all runs below folders on one screen, with keys for log, preemption, requeue and cancellation."""
    roots = folders or [Path()]
    for root in roots:
        if not root.is_dir():
            raise ConfigError(
                f"folder {root}",
                got="a file" if root.exists() else "no such folder",
                expected="a folder with runs in it",
                fix="check the path",
            )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "top",
            got="standard input or output that is no terminal",
            expected="a terminal, since it draws on the whole screen and reads keys",
            fix="use `hpcssl-submit status --watch`, or `status --json` for programs",
        )
    if importlib.util.find_spec("textual") is None:
        raise ConfigError(
            "top",
            got="no package textual",
            expected="an environment with it",
            fix="pip install 'hpcssl[top]', or use `hpcssl-submit status --watch`",
        )
    from slurm.top.app import TopApp

    TopApp(roots, every).run()
