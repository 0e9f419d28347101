"""The notebook of the documentation runs, and ends with the digest of the commands that it shows."""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat
import pytest

from hpcssl import cli
from tests.docs import notebook as runner

SIZE_LIMIT = 100_000
"""Bytes of the stored notebook: its outputs are part of every clone."""


def output_of(cell):
    """What a cell has printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_notebook_ends_with_the_digest_of_the_command_line(tmp_path, monkeypatch, capsys):
    executed = runner.execute(tmp_path)
    digest = output_of(executed.cells[-1]).strip()
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    page = "\n".join(cell.source for cell in executed.cells if cell.cell_type == "markdown")
    commands = re.findall(r"^\$ hpcssl (.*)$", page.replace("\\\n", " "), re.M)
    assert [command.split()[0] for command in commands] == ["train", "digest"]
    words = [sys.executable, "-m", "hpcssl", *commands[0].split()]
    done = subprocess.run(words, cwd=tmp_path, env=runner.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):  # in this process, which has imported torch
        cli.main(commands[1].split())
    assert capsys.readouterr().out.strip() == digest


def test_the_stored_notebook_is_complete_small_and_without_paths_of_a_machine():
    stored, text = nbformat.read(runner.NOTEBOOK, as_version=4), runner.NOTEBOOK.read_text()
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code) and re.fullmatch(r"[0-9a-f]{64}\s*", output_of(code[-1]))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert len(text) < SIZE_LIMIT and not re.search(r"/(tmp|home|root|work)/", text)
