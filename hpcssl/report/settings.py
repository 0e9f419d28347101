"""Configuration, differences between runs, and environment."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from hpcssl import config
from hpcssl.report.facts import RunFacts, read_values
from hpcssl.report.markup import details, element, escape, paragraph, section, table
from hpcssl.results.records import changed_keys

MAX_VALUE = 200
"""Letters of a value in a table."""


def find_differences(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """Return the recipe keys in which runs differ, with the value of each run; ``absent`` where it has none."""
    values = [read_values(run) for run in runs]
    keys = dict.fromkeys(key for flat in values for key in flat)
    texts = {key: [_text(flat[key]) if key in flat else "absent" for flat in values] for key in keys}
    return {key: row for key, row in texts.items() if len(set(row)) > 1}


def describe_configuration(runs: Sequence[RunFacts]) -> str:
    """Write what the runs changed, in what they differ, and the whole recipe of the first one."""
    parts = []
    if len(runs) == 1:
        changed = changed_keys(runs[0].run, runs[0].recipe)
        text = (
            "Changed from the packaged recipe of this name: " + ", ".join(changed)
            if changed
            else ("Nothing was changed from the packaged recipe of this name, or there is none.")
        )
        parts.append(paragraph(f"{text}."))
    else:
        differences = find_differences(runs)
        if differences:
            rows = [[key, *texts] for key, texts in differences.items()]
            head, cells = ["key", *(run.label for run in runs)], rows
            if len(runs) > len(differences):  # the longer side goes down the page
                head = ["run", *differences]
                cells = [[run.label, *(texts[k] for texts in differences.values())] for k, run in enumerate(runs)]
            parts.append(table(head, cells, "Recipe keys in which the runs differ"))
        else:
            parts.append(paragraph("The runs have the same recipe."))
    whole = config.to_yaml(runs[0].recipe)
    title = "The whole recipe" if len(runs) == 1 else f"The whole recipe of {runs[0].label}"
    parts.append(details(title, element("pre", element("code", escape(whole)))))
    return section("Configuration" if len(runs) == 1 else "Differences and configuration", *parts)


def describe_environment(runs: Sequence[RunFacts]) -> str:
    """Write software and hardware of the trainings, as their checkpoints recorded them, and of this page."""
    rows: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        hosts = ", ".join(dict.fromkeys(attempt.host for attempt in run.attempts if attempt.host))
        recorded = {key: _text(value) for key, value in run.machinery.items() if value is not None}
        if hosts:
            recorded["nodes"] = hosts
        if recorded:
            rows.setdefault(tuple(recorded.items()), []).append(run.label)
    parts = []
    for recorded_items, labels in rows.items():
        named = f"{len(labels)} runs: {', '.join(labels)}" if len(labels) < len(runs) else f"All {len(runs)} runs"
        who = "" if len(runs) == 1 else named
        parts.append(
            table(
                ["what", "recorded"],
                [list(item) for item in recorded_items],
                who or "Recorded environment",
                numbers=False,
            )
        )
    if not parts:
        parts.append(paragraph("No checkpoint or attempt has recorded an environment.", class_="dim"))
    note = f"This page was written by hpcssl {_describe_versions()} under Python {platform.python_version()}."
    return section("Environment", *parts, paragraph(note, class_="dim"))


def _describe_versions() -> str:
    import hpcssl

    return f"{hpcssl.__version__} and matplotlib {metadata.version('matplotlib')}"


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
