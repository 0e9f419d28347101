"""``hpcssl report``: the page about runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of runs such as that of a sweep.")
    ],
    to: Annotated[Path, typer.Option("--to", help="The .html file.")],
    compute: Annotated[
        bool,
        typer.Option(
            "--compute",
            help="Compute features that no k-NN evaluation has stored, for nearest neighbors and the map.",
        ),
    ] = False,
) -> None:
    """Write one HTML page about runs: a summary, scores, curves, attempts, neighbors, a map, and the configuration.

    The page needs no other file and no network. A folder of runs gives an index with a page for each run beside it.
    """
    from hpcssl.journal import set_up_logging
    from hpcssl.report.page import write_report

    set_up_logging()
    sys.stdout.writelines(f"{path}\n" for path in write_report(runs, to, compute=compute)[:1])
