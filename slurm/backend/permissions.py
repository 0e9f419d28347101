"""Who may write what a job runs from.

Whoever can write the code snapshot, the folder of the batch script, or the files that say what to run next, can run
anything as the user of the job. A run folder in a group-writable folder, or one that is group-writable itself, is
common (umask 002, setgid folders) and stays allowed. Only the paths that matter are made private, and the run folder
gets the sticky bit: others may add files, but not replace those of its owner. The page "What is trusted" of the
documentation describes the whole design.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from hpcssl.errors import SubmitError

WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
"""Mode bits that let the group or everybody write."""
TRUSTED_PATHS = ("logs", "code", "code/hpcssl", "code/slurm", "config.yaml", "chain.json", "jobs.jsonl")
"""Paths in the run folder that decide what a job runs."""


def check(root: Path | str) -> None:
    """Check that only the user of this process can decide what the jobs of a run folder run.

    Raises:
        SubmitError: Another user (except root) owns the run folder or a path that jobs run from, or can write one.
    """
    root = Path(root)
    _check_owner(root)
    for name in TRUSTED_PATHS:
        path = root / name
        if not path.exists():
            continue
        _check_owner(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & WRITE_BY_OTHERS:
            raise SubmitError(
                str(path),
                got=f"mode {mode:04o}, which lets others write it",
                expected="write permission for its owner only, since jobs run what it contains",
                fix=f"check that nobody has changed it, then run chmod -R go-w {shlex.quote(str(path))}",
            )


def secure_run_folder(root: Path) -> None:
    """Take write permission on what jobs run from away from others, then ``check`` it. Called before a submission.

    Raises:
        SubmitError: See ``check``.
    """
    _check_owner(root)
    mode = stat.S_IMODE(root.stat().st_mode)
    if mode & WRITE_BY_OTHERS and not mode & stat.S_ISVTX:
        with contextlib.suppress(OSError):
            root.chmod(mode | stat.S_ISVTX)
    (root / "logs").mkdir(exist_ok=True)
    for path in (root / "logs", *(p for p in root.iterdir() if p.is_file())):
        with contextlib.suppress(OSError):  # a file of somebody else: `check` refuses it if it matters
            make_private(path)
    check(root)


@contextlib.contextmanager
def private_umask() -> Iterator[None]:
    """Let nobody else write the files that are created in this block.

    For code that sets no modes itself.
    """
    before = os.umask(WRITE_BY_OTHERS)
    os.umask(before | WRITE_BY_OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def make_private(path: Path) -> None:
    """Take write permission on a file or folder away from everybody but its owner."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & WRITE_BY_OTHERS:
        path.chmod(mode & ~WRITE_BY_OTHERS)


def _check_owner(path: Path) -> None:
    for status in (path.lstat(), path.stat()):  # of a link, and of what it points to
        if status.st_uid not in (os.geteuid(), 0):
            raise SubmitError(
                str(path),
                got=f"a path of the user with id {status.st_uid}",
                expected="a path of your own, since jobs run what it contains",
                fix="choose a --run folder of your own",
            )
