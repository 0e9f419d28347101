"""The command ``hpcssl``. Each module holds the commands of one subject; this one puts them together."""

from __future__ import annotations

import sys

import typer

from hpcssl import cli_runner
from hpcssl.cli import encoder, inference, init, report, tables, track, train
from hpcssl.terminal.help_pages import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Pre-train image encoders without labels, and evaluate them.",
    epilog=cli_runner.EPILOG,
)
# in the order of the help text
app.command("init")(init.init)
app.command("train")(train.train)
app.command("eval")(encoder.evaluate)
app.command("export")(encoder.export)
app.command("embed")(inference.embed)
app.command("search")(inference.search)
app.command("digest")(train.digest)
app.command("results")(tables.results)
app.command("report")(report.report)
app.command("track")(track.track)
app.command("recipes")(tables.recipes)
app.command("show")(tables.show)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``hpcssl``; ends the process with the exit code.

    Args:
        argv: Arguments without the program's name; None for those of this process.
    """
    code = cli_runner.run(app, argv, "hpcssl")
    if argv is None:
        cli_runner.end_process(code)
    sys.exit(code)
