"""The list of commands in a help page."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

MAX_WIDTH = 120
"""Columns of a help page on a wide terminal: longer lines are hard to read."""


class CommandGroup(TyperGroup):
    """A group of commands whose help page has the whole first sentence of each of them, however narrow it is.

    The base class cuts each sentence to a single line.
    """

    def __init__(self, *args: Any, context_settings: dict[str, Any] | None = None, **options: Any) -> None:
        settings = {"max_content_width": MAX_WIDTH} | (context_settings or {})
        super().__init__(*args, context_settings=settings, **options)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands, with their sentences wrapped."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, c.get_short_help_str(limit=10**6)) for name, c in commands if c is not None and not c.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
