"""The code snapshot of a run: a copy of the code in the run folder, made at submission.

Jobs run this copy, so that a requeued job does not import a working tree that has changed in the meantime.
"""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

from hpcssl.code_version import SNAPSHOT_FILE, code_commit
from hpcssl.errors import SubmitError
from hpcssl.files import atomic_dir, atomic_write, remove, temporaries
from hpcssl.run_dir import RunDir
from slurm.backend import permissions

PACKAGES = ("hpcssl", "slurm", "data_prep")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def create_snapshot(run: RunDir) -> str:
    """Copy the three packages that this process has imported to ``run.code``.

    A run that is submitted again gets the code of that moment, for example with a bug fixed. The old copy is removed
    only after the new one is complete.

    Returns:
        The commit of the code, which is stored with it.
    """
    commit = code_commit()
    new, old = run.code.with_name("code.new"), run.code.with_name("code.old")
    for leftover in (new, old, *temporaries(run.root, "code.*")):
        remove(leftover)
    with atomic_dir(new) as part:
        for name in PACKAGES:
            shutil.copytree(_package_folder(name), part / name, ignore=_IGNORED)
        atomic_write(part / SNAPSHOT_FILE, commit + "\n")
        _make_private(part)
    if run.code.exists():
        run.code.rename(old)
    new.rename(run.code)
    remove(old)
    return commit


def verify_snapshot(run: RunDir) -> None:
    """Check that this process has imported the code snapshot of the run.

    Raises:
        SubmitError: It runs other code.
    """
    for name in PACKAGES[:2]:
        folder = _package_folder(name)
        if not folder.is_relative_to(run.code.resolve()):
            raise SubmitError(
                f"package {name} of this job",
                got=f"the copy in {folder}",
                expected=f"the copy in {run.code}",
                fix="unset what puts another copy first on Python's path, then submit again",
            )


def _make_private(code: Path) -> None:
    """Take write permission away from others, whatever the umask and the modes of the sources.

    The folders of compiled files are created as well: Python would create them with the umask of the first import.
    """
    for package in [path for path in code.rglob("*") if path.is_dir()]:
        if any(package.glob("*.py")):
            (package / "__pycache__").mkdir()
    for path in (code, *code.rglob("*")):
        permissions.make_private(path)


def _package_folder(name: str) -> Path:
    file = import_module(name).__file__
    assert file is not None  # the packages are not namespace packages
    return Path(file).resolve().parent
