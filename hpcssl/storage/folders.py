"""Creation of folders that survives a crash of the machine, and folders that must stay where they are."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

_PINNED: dict[str, os.stat_result] = {}


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def pin_folder(path: Path | str) -> bool:
    """Let no later call in this process create ``path`` again, or write below another folder of this name.

    A run folder that is renamed, removed, or replaced through a symlink would otherwise come into being a second time
    under its old path, and a job would finish there.

    Args:
        path: An existing folder, as later calls will name it.

    Returns:
        False if it was pinned before.

    Raises:
        OSError: If it does not exist, or was pinned and is not the same folder any more.
    """
    check_pinned(path)
    folder = os.path.abspath(path)
    if folder in _PINNED:
        return False
    _PINNED[folder] = os.stat(folder)
    return True


def unpin_folder(path: Path | str) -> None:
    """Undo ``pin_folder``."""
    _PINNED.pop(os.path.abspath(path), None)


def check_pinned(path: Path | str) -> None:
    """Check that the pinned folders above a path, or at it, are still the ones that were pinned.

    Raises:
        OSError: ``ESTALE``, naming the folder.
    """
    for folder, pinned in list(_PINNED.items()):  # other threads may pin folders meanwhile
        if not Path(os.path.abspath(path)).is_relative_to(folder):
            continue
        try:
            is_same = os.path.samestat(os.stat(folder), pinned)
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise OSError(errno.ESTALE, "the folder was moved, removed or replaced while this process used it", folder)


def make_folder(path: Path | str) -> None:
    """Create a folder and its missing parents durably.

    Each new folder's entry in its parent is synced too: a file is lost with the folder that it is in.

    Raises:
        NotADirectoryError: If a file or broken symlink exists where a folder is expected.
        OSError: See ``check_pinned``.
    """
    path = Path(path)
    check_pinned(path)
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(folder)) from error
        with contextlib.suppress(PermissionError):  # the parent may be writable but not readable
            sync_folder(folder.parent)
