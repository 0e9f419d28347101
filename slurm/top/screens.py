"""What opens over the table: a question, and the log of a run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Log, Static

from hpcssl.errors import HpcsslError
from hpcssl.run_dir import RunDir
from slurm.manage import control

TAIL_LINES = 500
"""Lines of the log that are shown at first."""
MAX_LINES = 20_000
"""Most lines that stay in memory."""
FOLLOW_S = 1.0


class ConfirmScreen(ModalScreen[bool]):
    """A question whose answer is yes only with the key ``y``.

    Args:
        question: What will be done.
        note: What that means.
        verb: Name of the action, for the key.
    """

    CSS = """
    ConfirmScreen { align: center middle; }
    #question { width: 70; max-width: 90%; height: auto; padding: 1 2; border: round $warning; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,enter,q", "answer(False)", "No", key_display="n"),
    ]

    def __init__(self, question: str, note: str, verb: str):
        super().__init__()
        self._text = f"{question}\n\n{note}\n\ny: {verb.lower()}    n: go back"

    def compose(self) -> ComposeResult:
        """Lay out the question."""
        with Vertical(id="question"):
            yield Static(self._text, markup=False)

    def action_answer(self, answer: bool) -> None:
        """Close with an answer."""
        self.dismiss(answer)


class LogScreen(Screen[None]):
    """The log of rank 0 of a training, standard output and error, followed as it grows.

    Args:
        run: The run folder.
    """

    CSS = "#title { padding: 0 1; background: $primary-background; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,l", "app.pop_screen", "Back", key_display="esc")]

    def __init__(self, run: RunDir):
        super().__init__()
        self._run = run
        self._positions: dict[Path, int] = {}
        self._is_reading, self._is_empty = False, True

    def compose(self) -> ComposeResult:
        """Lay out path, text and keys."""
        yield Static(f"{self._run.root}: log of rank 0", id="title", markup=False)
        yield Log(id="log", max_lines=MAX_LINES)
        yield Footer()

    def on_mount(self) -> None:
        """Read now, and follow."""
        self.query_one(Log).focus()
        self._follow()
        self.set_interval(FOLLOW_S, self._follow)

    def _follow(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self.run_worker(self._read, thread=True, group="log", exit_on_error=False)

    def _read(self) -> None:
        """Runs on a worker thread."""
        lines: list[str] = []
        error = ""
        try:
            for path in control.find_logs(self._run, "train", 0):
                if path in self._positions:
                    self._positions[path] = control.print_new_lines(path, self._positions[path], lines.append)
                else:
                    self._positions[path] = control.print_tail(path, TAIL_LINES, lines.append)
        except (HpcsslError, OSError) as caught:
            error = str(caught)
        self.app.call_from_thread(self._take, lines, error)

    def _take(self, lines: list[str], error: str) -> None:
        self._is_reading = False
        if not self.is_attached:
            return
        log = self.query_one(Log)
        if error and self._is_empty and not log.line_count:
            log.write_line(error)
        if lines:
            if self._is_empty:
                log.clear()
            self._is_empty = False
            log.write_lines(lines)
