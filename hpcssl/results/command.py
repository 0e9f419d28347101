"""``hpcssl results``: tables, pictures and the page of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpcssl.errors import ConfigError
from hpcssl.evals.frozen.knn_options import ONE_LABEL
from hpcssl.results import claims as claim_table
from hpcssl.results import compare, page, tables
from hpcssl.results.columns import Record
from hpcssl.results.records import collect_records, select_shown


def main(
    runs: Sequence[Path],
    *,
    write: Path | None = None,
    as_csv: bool = False,
    as_json: bool = False,
    steps: bool = False,
    sort: str = "",
    claim: str = "",
    claims: bool = False,
    published: bool = False,
    plots: Path | None = None,
    gallery: Path | None = None,
) -> None:
    """Print a table of the runs, or draw pictures and print their paths.

    Args:
        runs: Run folders.
        write: Page, such as RESULTS.md, to bring up to date.
        as_csv: Print CSV.
        as_json: Print JSON.
        steps: Also show the encoders between step 0 and the last one.
        sort: Column by which settings are ranked, the best first; empty for the order of the runs.
        claim: Two settings to compare, as ``A > B``; empty for none.
        claims: Print the claims of the papers, as these runs decide them; with ``write``, from the rows of the page.
        published: Print or write the tables of the papers instead; takes no runs.
        plots: Folder for pictures of learning curves.
        gallery: PNG file for validation images with their nearest training images; takes one run.

    Raises:
        ConfigError: The options exclude each other.
        EvalError: A path is not a run folder, or no run has results.
    """
    _check_options(runs, as_csv, as_json, published, claims, write, {"plots": plots, "gallery": gallery})
    _check_claims(claims, as_csv=as_csv, is_alone=not (sort or claim or published or plots or gallery or steps))
    _check_comparison(sort, claim, is_alone=not (published or write or plots or gallery or steps))
    out = sys.stdout
    if plots is not None or gallery is not None:
        out.writelines(f"{path}\n" for path in _draw_pictures(runs, plots, gallery))
        return
    style = "csv" if as_csv else "json" if as_json else ""
    if published:
        out.write(_print_published(write, style))
        return
    records = collect_records(runs) if runs else []
    if claims:
        out.write(_print_claims(records, write, as_json))
        return
    if claim:
        out.write(_render_claim(records, claim, as_json))
        return
    if sort:
        records = compare.rank_settings(records, sort)
    if write is not None:
        page.update_page(write, select_shown(records, steps=steps))
    out.write(render_records(records, style=style, steps=steps, terminal=out.isatty()))
    if not style and any("one label" in record["metrics"] for record in records):
        sys.stderr.write(f"one label: {ONE_LABEL}\n")


def _draw_pictures(runs: Sequence[Path], plots: Path | None, gallery: Path | None) -> Iterator[Path | str]:
    """Draw what was asked for, and yield the paths."""
    if plots is not None:
        from hpcssl.results import curves

        yield from curves.draw_curves(runs, plots)
    if gallery is not None:
        from hpcssl.results import gallery as pictures

        yield pictures.draw_gallery(runs[0], gallery)


def _print_published(write: Path | None, style: str) -> str:
    """Update a page, and return its path, or return the published tables."""
    if write is not None:
        page.update_page(write, None, with_published=True)
        return f"{write}\n"
    return tables.export_published(style) if style else page.format_published() + "\n"


def _print_claims(records: Sequence[Record], write: Path | None, as_json: bool) -> str:
    """Update a page, and return its path, or return the claims as the records decide them."""
    if write is not None:
        page.update_page(write, select_shown(records) if records else None, with_claims=True)
        return f"{write}\n"
    return claim_table.render_claims(claim_table.read_record_scores(records), as_json=as_json)


def _render_claim(records: Sequence[Record], claim: str, as_json: bool) -> str:
    comparisons = compare.check_claim(records, claim)
    if as_json:
        return json.dumps([one.to_json() for one in comparisons], indent=2, ensure_ascii=False) + "\n"
    return "".join(one.line() + "\n" for one in comparisons)


def render_records(
    records: Sequence[Record], *, style: str = "", steps: bool = False, terminal: bool = False, width: int | None = None
) -> str:
    """Return records as text.

    Args:
        records: The records, as ``collect_records`` returns them.
        style: ``csv`` or ``json`` for all records; empty for a table of those that ``select_shown`` selects.
        steps: Show the encoders between step 0 and the last one in the table too.
        terminal: Draw the table for a terminal; otherwise its columns are separated by tabs.
        width: Columns of the terminal; None to detect them.
    """
    if style:
        return {"csv": tables.to_csv, "json": tables.to_json}[style](records)
    shown = select_shown(records, steps=steps)
    return tables.draw_table(shown, width) if terminal else tables.to_tsv(shown)


def _check_comparison(sort: str, claim: str, *, is_alone: bool) -> None:
    given = [name for name, value in (("--sort", sort), ("--claim", claim)) if value]
    if len(given) == 2 or (given and not is_alone):
        raise ConfigError(
            "hpcssl results",
            got=f"{' and '.join(given)} with another form of output" if len(given) == 1 else " and ".join(given),
            expected=f"{given[0]} alone, or with --json",
            fix="run the command once for each",
        )


def _check_claims(claims: bool, *, as_csv: bool, is_alone: bool) -> None:
    if claims and (as_csv or not is_alone):
        raise ConfigError(
            "hpcssl results",
            got="--claims with another form of output",
            expected="--claims alone, or with --json or --write",
            fix="run the command once for each",
        )


def _check_options(
    runs: Sequence[Path],
    as_csv: bool,
    as_json: bool,
    published: bool,
    claims: bool,
    write: Path | None,
    pictures: Mapping[str, Path | None],
) -> None:
    what = "hpcssl results"
    if as_csv and as_json:
        raise ConfigError(what, got="--csv and --json", expected="one of them", fix="leave one out")
    if published and (runs or any(pictures.values())):
        raise ConfigError(
            what,
            got="--published and runs or pictures",
            expected="--published alone, or with --write",
            fix="leave --published out: the table shows the published values of each run anyway",
        )
    if published and write is not None and (as_csv or as_json):
        raise ConfigError(
            what,
            got="--published --write with --csv or --json",
            expected="one of the two",
            fix="leave --write out to get the values; the page is Markdown",
        )
    if not runs and not (published or (claims and write)):
        raise ConfigError(
            what,
            got="no run folders",
            expected="at least one, or --published",
            fix="name the folders of runs, such as runs/demo",
        )
    if any(pictures.values()) and (as_csv or as_json or write):
        raise ConfigError(
            what,
            got="a table and a picture",
            expected="--plots and --gallery without --write, --csv and --json",
            fix="run the command once for the tables and once for the pictures",
        )
    if pictures["gallery"] is not None and len(runs) > 1:
        raise ConfigError(f"{what} --gallery", got=f"{len(runs)} runs", expected="one", fix="name one run folder")
