"""``hpcssl report``: one page about one or several runs, in a single file.

The file requests nothing, and its content security policy lets a browser request nothing: pictures and styles are part
of it, and there is no script. It is readable on a phone, in dark mode and without color.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from hpcssl import files
from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.errors import ConfigError, EvalError, HpcsslError
from hpcssl.report import panels, pictures, scores, settings, timeline, words
from hpcssl.report.facts import RunFacts, has_readable_recipe, name_runs, read_facts
from hpcssl.report.markup import Markup, element, escape, paragraph, section, table
from hpcssl.report.style import STYLE
from hpcssl.results import curves
from hpcssl.results.records import open_runs
from hpcssl.run_dir import RunDir, find_runs

LOG = logging.getLogger("hpcssl")

MAX_WITH_PICTURES = 3
"""Runs that one page shows with neighbors and map; the pages of single runs have those of more."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(paths: Sequence[Path | str], to: Path | str, *, compute: bool = False) -> list[Path]:
    """Write the page of runs.

    A folder that is no run but holds runs, as that of a sweep, gives an index: the page about all of them links to a
    page about each, in a folder beside it.

    Args:
        paths: Run folders, or folders of runs.
        to: The file, which ends with .html.
        compute: Compute the features for neighbors and map where the run folder has none, as ``hpcssl eval knn`` does.

    Returns:
        The pages, the one named ``to`` first.

    Raises:
        ConfigError: ``to`` has another suffix.
        EvalError: A path is not a run folder and holds none, or no named run has trained yet.
    """
    to = Path(to)
    if to.suffix not in (".html", ".htm"):
        raise ConfigError(
            f"--to {to}", got=f"the suffix {to.suffix!r}", expected=".html", fix=f"write --to {to.with_suffix('.html')}"
        )
    folders = [Path(path) for path in paths]
    below = {path: runs for path in folders if (runs := [r for r in find_runs(path) if has_readable_recipe(r)])}
    runs = [run for path in folders for run in below.get(path) or open_runs([path])]
    runs = list(dict.fromkeys(RunDir(run.root.resolve()) for run in runs))
    facts = [read_facts(run, label) for run, label in zip(runs, name_runs(runs), strict=True)]
    if not below and not any(run.curves for run in facts):
        raise EvalError(
            f"run folder {runs[0].root if runs else folders[0]}",
            got="a journal without steps",
            expected="a run that has trained",
            fix="write the page after its first steps",
        )
    links, pages = {}, []
    for run in facts if below else ():
        page = to.with_suffix("") / f"{run.label.replace('/', '-')}.html"
        if run.curves:
            files.atomic_write(page, render([run], compute=compute, up=f"../{to.name}"))
            links[run.label] = f"{quote(page.parent.name)}/{quote(page.name)}"
            pages.append(page)
            LOG.info("%s", page)
    title = below and " and ".join(path.resolve().name for path in below)
    files.atomic_write(to, render(facts, compute=compute, links=links, title=title or ""))
    return [to, *pages]


def render(
    runs: Sequence[RunFacts],
    *,
    compute: bool = False,
    links: dict[str, str] | None = None,
    title: str = "",
    up: str = "",
) -> str:
    """Write the text of a page.

    Args:
        runs: The runs.
        compute: See ``write_report``.
        links: Address of the page of a run, by its label.
        title: The title; by default recipe and name of a single run, or the number of runs.
        up: Address of the index; empty for none.
    """
    if not title:
        title = f"{runs[0].recipe.get('name', '')}: {runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs"
    trained = [run for run in runs if run.curves]
    body = [
        element("p", element("a", "All runs", href=up)) if up else "",
        element("h1", escape(title)),
        *(paragraph(text) for text in words.summarize(runs)),
        _list_runs(runs, links or {}) if len(runs) > 1 else "",
        scores.describe_scores(runs),
        _draw_curves(trained),
        timeline.draw_timeline(runs),
        *_draw_pictures(runs, compute, bool(links)),
        settings.describe_configuration(runs),
        settings.describe_environment(runs),
        _describe_digest(runs[0]) if len(runs) == 1 else "",
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width,initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("link", rel="icon", href="data:,"),  # a browser would ask the server for one
        element("title", escape(title)),
        f"<style>{STYLE}</style>",
    )
    main = element("body", element("main", *filter(None, body)))
    return f"<!DOCTYPE html>\n{element('html', head, main, lang='en')}\n"


def _list_runs(runs: Sequence[RunFacts], links: dict[str, str]) -> str:
    head = ["run", "state", "step", "loss", "k-NN %", "images/s", "interruptions", "steps lost"]
    rows = []
    for run in runs:
        name = escape(run.label)
        rows.append(
            [
                Markup(element("a", name, href=links[run.label]) if run.label in links else name),
                run.state,
                f"{run.step}/{run.total or '?'}",
                _format(run.last_value("loss"), ".4g"),
                _format(run.last_value("knn"), ".1f"),
                _format(run.images_per_s, ".4g"),
                run.interruptions,
                run.lost_text,
            ]
        )
    return section("Runs", table(head, rows, "State and last values of each run"))


def _draw_curves(runs: Sequence[RunFacts]) -> str:
    if not runs:
        return section("Curves", paragraph("No run has trained yet.", class_="dim"))
    groups = curves.group_by_seed({run.run: run.curves for run in runs})
    notes = [paragraph(f"Loss, spread and purity are means over windows of a {curves.WINDOWS}th of the steps.")]
    if any(len(group.runs) > 1 for group in groups):
        notes.append(paragraph("Runs that differ only in the seed are one line, their mean, in a band of a deviation."))
    return section("Curves", *notes, panels.draw_curves(groups))


def _draw_pictures(runs: Sequence[RunFacts], compute: bool, has_links: bool) -> list[str]:
    if len(runs) == 1:
        return pictures.draw_pictures(runs[0], compute=compute)
    if len(runs) > MAX_WITH_PICTURES or has_links:
        where = "are on the pages of the single runs" if has_links else "are shown for one to three runs at a time"
        return [section("Nearest neighbors and map of embeddings", paragraph(f"They {where}.", class_="dim"))]
    return [
        element("div", element("h2", escape(run.label)), *pictures.draw_pictures(run, compute=compute)) for run in runs
    ]


def _describe_digest(run: RunFacts) -> str:
    try:
        digest = checkpoint_digest(run.run)
    except HpcsslError:  # the checkpoints were deleted
        return ""
    text = "sha256 of the newest checkpoint's whole state: "
    return element("p", text + element("code", digest), class_="dim")


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
