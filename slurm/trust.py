"""What a job runs from must be ours alone: whoever can write the frozen code, the batch script's folder or the files
that say what to run next, can run anything in our name.

A run folder below a group-writable one, or group-writable itself, is common (umask 002, setgid folders) and may stay
so: the few places that matter are closed one by one, and the folder gets the sticky bit, so that others may put files
beside ours but not replace ours. docs/security.md has the whole picture.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from hpcssl.errors import SubmitError

OTHERS = stat.S_IWGRP | stat.S_IWOTH
RUN_FROM = ("logs", "code", "code/hpcssl", "code/slurm", "config.yaml", "chain.json", "jobs.jsonl")


def check(root: Path | str) -> None:
    """Raise ``SubmitError`` unless the run folder is ours (or root's), and what is run from it only ours to write."""
    root = Path(root)
    _check_owner(root)
    for name in RUN_FROM:
        path = root / name
        if not path.exists():
            continue
        _check_owner(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & OTHERS:
            raise SubmitError(str(path), got=f"mode {mode:04o}: others can write it", expected="a mode that lets its "
                              "owner alone write it, since jobs run what is there",
                              mend=f"see that nobody has changed it, then chmod -R go-w {shlex.quote(str(path))}")


def secure(root: Path) -> None:
    """Close a run folder before a job is submitted, then ``check`` it. Raises ``SubmitError``."""
    _check_owner(root)
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & OTHERS and not mode & stat.S_ISVTX:
        with contextlib.suppress(OSError):
            root.chmod(mode | stat.S_ISVTX)
    (root / "logs").mkdir(exist_ok=True)
    for path in (root / "logs", *(p for p in root.iterdir() if p.is_file())):
        with contextlib.suppress(OSError):  # not ours: `check` says so where it matters
            close(path)
    check(root)


@contextlib.contextmanager
def ours_alone() -> Iterator[None]:
    """What other programs' code writes in this block (submitit its batch script), nobody else can write."""
    before = os.umask(OTHERS)
    os.umask(before | OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def close(path: Path) -> None:
    """Take the right to write from all but the owner."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        path.chmod(mode & ~OTHERS)


def _check_owner(path: Path) -> None:
    for found in (path.lstat(), path.stat()):
        if found.st_uid not in (os.geteuid(), 0):
            raise SubmitError(str(path), got=f"an owner with user id {found.st_uid}", expected="one of your own, "
                              "since jobs run what is there", mend="use a --run folder of your own")
