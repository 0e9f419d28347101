"""The screen of ``hpcssl-submit top``, with Textual.

SLURM and the file system are read and written on worker threads only: a controller that does not answer for a minute
leaves the screen alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Static

from hpcssl.errors import HpcsslError
from hpcssl.run_dir import RunDir
from slurm.manage import control
from slurm.top import rows as display
from slurm.top.rows import Row
from slurm.top.screens import ConfirmScreen, LogScreen

COLORS = {
    "RUNNING": "green",
    "FINISHED": "cyan",
    "COMPLETED": "cyan",
    "PENDING": "yellow",
    "COMPLETING": "yellow",
    "CANCELLED": "magenta",
    "UNKNOWN": "magenta",
}
"""Colors of states, beside their names; any other state with a job is a failure, and red."""
NUMBERS = ("step", "left", "epoch", "img/s", "loss", "k-NN")


class TopApp(App[None]):
    """All runs below folders, refreshed again and again.

    Args:
        roots: The folders.
        every: Seconds between two refreshes.
    """

    TITLE = "hpcssl-submit top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary { height: auto; padding: 0 1; background: $primary-background; color: $text; }
    #runs { height: 1fr; scrollbar-size-horizontal: 0; }
    #details { height: auto; max-height: 40%; padding: 0 1; border-top: solid $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l,enter", "log", "Log", key_display="l"),
        Binding("p", "preempt", "Preempt"),
        Binding("r", "requeue", "Requeue"),
        Binding("c", "cancel", "Cancel"),
        Binding("f5,space", "refresh", "Refresh", key_display="space"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, roots: Sequence[Path], every: float):
        super().__init__()
        self.rows: list[Row] = []
        self.error = ""
        self._roots, self._every = list(roots), every
        self._is_reading, self._is_stale = threading.Event(), False
        self._last_read = 0.0

    def compose(self) -> ComposeResult:
        """Lay out summary, table, details and keys."""
        yield Static("Reading …", id="summary", markup=False)
        yield DataTable(id="runs", cursor_type="row", zebra_stripes=True)
        yield Static(id="details", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Read now, and again and again."""
        self.query_one(DataTable).focus()
        self.action_refresh()
        self.set_interval(self._every, self.action_refresh)

    def on_resize(self) -> None:
        """Choose the columns again, once the screen has its new size."""
        self.call_after_refresh(self._show)

    def on_data_table_row_highlighted(self) -> None:
        """Show the details of the run under the cursor."""
        if self._is_drawn:
            self._show_details()

    def on_data_table_row_selected(self) -> None:
        """Open the log: the table takes the key Enter for itself."""
        self.action_log()

    def action_refresh(self) -> None:
        """Read the states, unless that is under way: then read once more after it."""
        if self._is_reading.is_set():
            self._is_stale = True
            return
        self._is_reading.set()
        self.run_worker(self._read, thread=True, group="refresh", exit_on_error=False)

    def action_log(self) -> None:
        """Show the end of the training's log, and follow it."""
        if (row := self._selected) is not None:
            self.push_screen(LogScreen(row.run))

    def action_preempt(self) -> None:
        """Ask, then send the signals of a preemption."""
        self._confirm("Preempt", "The training saves, and continues later.", control.preempt)

    def action_requeue(self) -> None:
        """Ask, then let SLURM requeue the job."""
        note = "SLURM ends the job and puts it back into the queue; a held job is released."
        self._confirm("Requeue", note, control.requeue)

    def action_cancel(self) -> None:
        """Ask, then cancel all jobs of the run."""
        note = "All jobs of the run end for good, evaluations included. The same submission continues it."
        self._confirm("Cancel", note, lambda run: f"Cancelled job {', '.join(control.cancel(run))}")

    @property
    def _is_drawn(self) -> bool:
        """Whether the widgets exist: messages also arrive before they do, and while the screen is being left."""
        return bool(self.query(DataTable))

    @property
    def _selected(self) -> Row | None:
        position = self.query_one(DataTable).cursor_row
        return self.rows[position] if 0 <= position < len(self.rows) else None

    def _confirm(self, verb: str, note: str, act: Callable[[RunDir], str]) -> None:
        """Ask whether to act on the selected run. It stays that run, even if the table changes meanwhile."""
        if (row := self._selected) is None:
            return

        def proceed(confirmed: bool | None) -> None:
            if confirmed:
                self.run_worker(lambda: self._act(act, row.run), thread=True, group="actions", exit_on_error=False)

        self.push_screen(ConfirmScreen(f"{verb} {row.cells['run']}?", note, verb), proceed)

    def _act(self, act: Callable[[RunDir], str], run: RunDir) -> None:
        """Runs on a worker thread."""
        try:
            text, severity = act(run), "information"
        except (HpcsslError, OSError) as error:
            text, severity = str(error), "error"
        self.call_from_thread(self.notify, text, severity=severity, markup=False, timeout=8)
        self.call_from_thread(self.action_refresh)

    def _read(self) -> None:
        """Runs on a worker thread."""
        rows: list[Row] | None = None
        error = ""
        try:
            rows = display.read_rows(self._roots)
        except (HpcsslError, OSError, ValueError) as caught:  # such as a run folder that is removed meanwhile
            error = str(caught)
        self.call_from_thread(self._take, rows, error)

    def _take(self, rows: list[Row] | None, error: str) -> None:
        self._is_reading.clear()
        self.error = error
        if not self._is_drawn:
            return
        if rows is not None:
            selected = self._selected
            self.rows, self._last_read = rows, time.time()
            self._show(selected)
        else:
            self._show_summary()
        if self._is_stale:
            self._is_stale = False
            self.action_refresh()

    def _show(self, selected: Row | None = None) -> None:
        """Draw everything; the cursor stays on its run."""
        if not self._is_drawn:
            return
        table = self.query_one(DataTable)
        selected = selected or self._selected
        top = table.scroll_y
        columns = display.choose_columns(self.rows, self.size.width - 2)  # the scroll bar needs two
        table.clear(columns=True)
        for name, width in columns.items():
            table.add_column(Text(name, justify="right" if name in NUMBERS else "left"), width=width, key=name)
        for row in self.rows:
            table.add_row(*(_draw_cell(row, name, width) for name, width in columns.items()))
        roots = [row.run.root for row in self.rows]
        if selected is not None and selected.run.root in roots:
            table.move_cursor(row=roots.index(selected.run.root), animate=False)
        table.scroll_to(y=top, animate=False, force=True)
        self._show_summary()
        self._show_details()

    def _show_summary(self) -> None:
        if not self._last_read and not self.error:
            return
        text = display.summarize(self.rows) if self._last_read else "Nothing could be read yet"
        if self._last_read and not self.rows:
            text = f"No runs below {', '.join(map(str, self._roots))} yet"
        when = time.strftime("%H:%M:%S", time.localtime(self._last_read)) if self._last_read else ""
        summary = Text(text + (f" · read at {when}, every {self._every:g} s" if when else ""))
        if self.error:
            summary.append(f"\n{self.error}", style="bold red")
        self.query_one("#summary", Static).update(summary)

    def _show_details(self) -> None:
        row, details = self._selected, self.query_one("#details", Static)
        details.display = row is not None
        if row is not None:
            lines = [Text.assemble((f"{name}: ", "bold"), text) for name, text in row.details]
            details.update(Text("\n").join(lines))


def _draw_cell(row: Row, name: str, width: int) -> Text:
    text = display.shorten(row.cells[name], width, keep_end=name == "run")
    color = COLORS.get(row.state, "" if row.state == "NONE" else "red") if name == "state" else ""
    return Text(text, style=color, justify="right" if name in NUMBERS else "left", no_wrap=True)
