"""What ``hpcssl results`` does with its words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hpcssl.errors import ConfigError
from hpcssl.results import page, tables
from hpcssl.results.records import collect, shown


def main(runs: Sequence[Path], *, write: Path | None = None, as_csv: bool = False, as_json: bool = False,
         steps: bool = False, published: bool = False, plots: Path | None = None, gallery: Path | None = None) -> None:
    """Print a table of the runs, or draw pictures and print their paths. Raises ``ConfigError`` and ``EvalError``."""
    _check(runs, as_csv, as_json, published, write, [plots, gallery])
    out = sys.stdout
    if plots is not None:
        from hpcssl.results import curves

        out.writelines(f"{path}\n" for path in curves.draw(runs, plots))
    if gallery is not None:
        from hpcssl.results import gallery as pictures

        out.write(f"{pictures.draw(runs[0], gallery)}\n")
    if plots is not None or gallery is not None:
        return
    style = "csv" if as_csv else "json" if as_json else ""
    if published:
        if write is not None:
            page.write(write, None, with_published=True)
            out.write(f"{write}\n")
        else:
            out.write(tables.published_as(style) if style else page.published_part() + "\n")
        return
    records = collect(runs)
    if write is not None:
        page.write(write, shown(records, steps=steps))
    out.write(show(records, style=style, steps=steps, terminal=out.isatty()))


def show(records: Sequence[dict], *, style: str = "", steps: bool = False, terminal: bool = False,
         width: int | None = None) -> str:
    """CSV and JSON hold every record; a table, drawn for a terminal or else uncut, those that ``shown`` chooses."""
    if style:
        return {"csv": tables.as_csv, "json": tables.as_json}[style](records)
    chosen = shown(records, steps=steps)
    return tables.as_drawn(chosen, width) if terminal else tables.as_plain(chosen)


def _check(runs, as_csv, as_json, published, write, pictures) -> None:
    what = "hpcssl results"
    if as_csv and as_json:
        raise ConfigError(what, got="--csv and --json", expected="one of them", mend="leave one out")
    if published and (runs or any(pictures)):
        raise ConfigError(what, got="--published and runs or pictures", expected="--published alone, or with --write",
                          mend="leave --published out: a row's published values stand beside it anyway")
    if published and write is not None and (as_csv or as_json):
        raise ConfigError(what, got="--published --write with --csv or --json", expected="one of the two",
                          mend="the page is markdown; leave --write out to get the values")
    if not runs and not published:
        raise ConfigError(what, got="no run folders", expected="at least one, or --published",
                          mend="name the folders of runs, such as runs/demo")
    if any(pictures) and (as_csv or as_json or write):
        raise ConfigError(what, got="a table and a picture", expected="--plots and --gallery without --write, --csv "
                          "and --json", mend="run the command twice")
    if pictures[1] is not None and len(runs) > 1:
        raise ConfigError(f"{what} --gallery", got=f"{len(runs)} runs", expected="one", mend="name one run folder")
