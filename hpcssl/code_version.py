"""Which code runs: the git commit, for result rows, reports and code snapshots."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import hpcssl

SNAPSHOT_FILE = "COMMIT"
"""A file beside the packages of a code snapshot (``RUN/code``) that holds the commit it was copied from."""


def code_commit() -> str:
    """Return the commit of the code that this process has imported.

    That is the commit recorded with a code snapshot, if the code runs from one; else that of the git checkout, with
    ``-dirty`` if files differ from it; else the version, as in ``v0.1.0``.
    """
    home = Path(hpcssl.__file__).resolve().parents[1]
    recorded = home / SNAPSHOT_FILE
    if recorded.is_file():
        return recorded.read_text().strip()
    if (home / ".git").exists():  # an installed package: a .git in a folder further up belongs to another project
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(
                ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout.strip()
    return f"v{hpcssl.__version__}"
