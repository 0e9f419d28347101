"""Every console block of the documentation runs on a CPU as it is printed, or says why it cannot.

A block is fenced as ``console``. Lines that begin with ``$ `` are commands (continued by a backslash at the end of a
line, or by a here-document that ends with ``EOF``), the others are the output that the page shows: where a block shows
output, it must match what the command printed, with ``...`` standing for anything. The blocks of a page run in order
in one empty folder. A block that cannot run here is preceded by a comment ``<!-- not run: REASON -->``.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.command_server import CommandServer

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {
    "collectives.md",
    "commands.md",
    "recipe_keys.md",
    "recipes.md",
}  # by docs/_ext/generated_pages.py, from the code
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if path.name not in GENERATED or path.parent.name != "reference"
)
BLOCK = re.compile(
    r"(?:^<!--\s*not run:(?P<reason>.*?)-->\s*\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)
SHELL_WORDS = ("$ ", "hpcssl", "make ", "pip ", "sbatch", "torchrun")


@dataclass
class Block:
    """One console block: its commands with the output that the page shows, and why it is not run, if it is not."""

    page: Path
    line: int
    commands: list[tuple[str, str]]
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    text, blocks = page.read_text(), []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("body"))
        if match["language"] != "console":
            continue
        commands: list[tuple[str, str]] = []
        document = False  # inside a here-document, whose lines belong to the command
        for row in re.sub(r"\s*\\\n\s*", " ", match["body"]).splitlines():
            if document:
                commands[-1] = (f"{commands[-1][0]}\n{row}", "")
                document = row != "EOF"
            elif row.startswith("$ "):
                commands.append((row[2:], ""))
                document = "<<'EOF'" in row
            else:
                assert commands, f"{page}:{line}: a console block begins with a command, '$ ...'"
                commands[-1] = (commands[-1][0], commands[-1][1] + row + "\n")
        blocks.append(Block(page, line, commands, match["reason"]))
    return blocks


def matches(shown: str, printed: str) -> bool:
    """Whether the output on the page is what was printed; ``...`` stands for anything, blanks count once."""

    def fold(text: str) -> str:
        return " ".join(text.split())

    return re.fullmatch(".*".join(map(re.escape, fold(shown).split("..."))), fold(printed), re.S) is not None


RUN = [page for page in PAGES if page.exists() and any(block.reason is None for block in blocks_of(page))]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of the commands. Those of the package, first in PATH, need no time to import torch.

    Other tests start the installed commands (tests/ground/test_package.py).
    """
    folder = tmp_path_factory.mktemp("bin")
    variables = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HPCSSL_CLONE": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    server = CommandServer(folder, variables)
    yield variables
    server.close()


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, environment):
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        for command, shown in block.commands:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=tmp_path,
                env=environment,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=300,
            )
            place = f"{page.relative_to(ROOT)}:{block.line}: $ {command}"
            expected = 0
            if failure := re.search(r"\(exit code (\d+)\)\s*$", shown):
                expected, shown = int(failure[1]), shown[: failure.start()]
            assert done.returncode == expected, f"{place}\nexit code {done.returncode}\n{done.stdout}"
            assert not shown.strip() or matches(shown, done.stdout), f"{place}\nprinted\n{done.stdout}\nnot\n{shown}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.exists()], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_are_in_console_blocks_and_exceptions_have_reasons(page):
    text = page.read_text()
    for block in blocks_of(page):
        assert block.reason is None or len(block.reason.split()) >= 3, f"{page}:{block.line}: say why it is not run"
    for match in BLOCK.finditer(text):
        if match["language"] in ("", "sh", "bash", "shell", "text"):
            first = match["body"].lstrip().split("\n")[0]
            assert not first.startswith(SHELL_WORDS), f"{page}: fence {first!r} as a console block with prompts"
    outside = BLOCK.sub("", text)
    indented = [line for line in re.findall(r"^    (\S.*)$", outside, re.M) if line.startswith(SHELL_WORDS)]
    assert not indented, f"{page}: fence {indented[0]!r} as a console block"


def test_the_reader_of_blocks_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ echo one \\\n    two\none two\n$ cat <<'EOF'\na\nEOF\na\n$ false\n(exit code 1)\n```\n\n"
        "<!-- not run: needs a cluster -->\n```console\n$ sbatch job\n```\n"
    )
    first, second = blocks_of(page)
    assert first.commands == [
        ("echo one two", "one two\n"),
        ("cat <<'EOF'\na\nEOF", "a\n"),
        ("false", "(exit code 1)\n"),
    ]
    assert second.reason.strip() == "needs a cluster" and first.reason is None
    assert matches("a ... c\n", "a b\nb c") and not matches("a", "a b") and not matches("a ... d", "a b c")
