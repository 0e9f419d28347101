"""Execute the notebook of the documentation. ``python tests/docs/notebook.py`` also stores its outputs in it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorials" / "notebook.ipynb"


def environment() -> dict[str, str]:
    """The variables of a shell in which the commands of this clone are installed."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def execute(folder: Path) -> Any:
    """Execute all cells of the notebook in a folder, and return the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell has failed.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=place, record_timing=False)
    return client.execute(env=environment())


def main() -> None:
    """Store the outputs of an execution in the notebook, without the paths of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
        text = nbformat.writes(notebook).replace(f"{Path(folder).resolve()}/", "").replace(f"{folder}/", "")
    NOTEBOOK.write_text(text + "\n")


if __name__ == "__main__":
    main()
