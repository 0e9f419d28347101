"""The code of a run, copied into its folder at submit: a requeued job must not import tomorrow's working tree."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

from hpcssl.errors import SubmitError
from hpcssl.files import RunDir, atomic_dir, atomic_write, remove, temporaries
from slurm import trust

PACKAGES = ("hpcssl", "slurm", "data_prep")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def freeze(run: RunDir) -> str:
    """Copy the three packages that this process imports to ``run.code``; returns the commit that was noted.

    A run that is submitted again gets today's code: whoever mends a bug and submits again means it. The old copy
    goes only after the new one is whole.
    """
    stamp = commit()
    fresh, old = run.code.with_name("code.new"), run.code.with_name("code.old")
    for left in (fresh, old, *temporaries(run.root, "code.*")):
        remove(left)
    with atomic_dir(fresh) as part:
        for name in PACKAGES:
            shutil.copytree(_home(name), part / name, ignore=_LEFT_OUT)
        atomic_write(part / "COMMIT", stamp + "\n")
        _close(part)
    if run.code.exists():
        run.code.rename(old)
    fresh.rename(run.code)
    remove(old)
    return stamp


def _close(code: Path) -> None:
    """Nobody else may write what jobs import, whatever the umask and the rights of the sources. The folders of
    compiled files are made now, too: Python would make them by the umask of whoever imports first."""
    for package in [p for p in code.rglob("*") if p.is_dir()]:
        if any(package.glob("*.py")):
            (package / "__pycache__").mkdir()
    for path in (code, *code.rglob("*")):
        trust.close(path)


def commit() -> str:
    """The commit of the code, ``-dirty`` after it when files differ from it; the package's version outside git."""
    home = _home("hpcssl").parent
    frozen = home / "COMMIT"
    if frozen.is_file():
        return frozen.read_text().strip()
    if (home / ".git").exists():  # installed: a .git further up would be somebody else's
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12",
                                   "--exclude=*"], capture_output=True, text=True, check=True,
                                  timeout=60).stdout.strip()
    return f"v{import_module('hpcssl').__version__}"


def verify(run: RunDir) -> None:
    """Refuse to train with any code but the frozen one. Raises ``SubmitError``."""
    for name in PACKAGES[:2]:
        found = _home(name)
        if not found.is_relative_to(run.code.resolve()):
            raise SubmitError(f"package {name} of this job", got=f"the copy in {found}", expected=f"{run.code}",
                              mend="unset what puts another copy first on Python's path, then submit again")


def _home(name: str) -> Path:
    return Path(import_module(name).__file__).resolve().parent
