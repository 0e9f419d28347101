"""When a training ran, why each attempt ended, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hpcssl.report import svg
from hpcssl.report.facts import AttemptFacts, RunFacts
from hpcssl.report.markup import Markup, details, element, paragraph, section, table
from hpcssl.results.curves import COLORS
from hpcssl.terminal.progress import format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.4
"""Inches, at a text size of 10 points: as wide as a phone."""
MAX_OPEN = 12
"""Rows of a table that is shown unfolded."""
MAX_ATTEMPTS = 30
"""Attempts of a single run that are listed; of more the newest."""
_PATTERNS = {  # color and hatching by cause, so that it is visible without color
    "done": (COLORS[2], ""),
    "timeout": (COLORS[0], "//"),
    "preempted": (COLORS[0], ".."),
    "stopped": (COLORS[0], "--"),
    "cancelled": (COLORS[3], "||"),
    "interrupted": (COLORS[3], "--"),
    "node_fail": (COLORS[1], "xx"),
    "error": (COLORS[1], "\\\\"),
    "killed": (COLORS[1], "++"),
    "hang": (COLORS[1], "oo"),
    "lost": (COLORS[4], "**"),
    "": (COLORS[5], ""),
}
"""An attempt without a recorded end has an empty cause."""


def draw_timeline(runs: Sequence[RunFacts]) -> str:
    """Draw the attempts: a row per attempt of a single run, or a row per run of several. Empty without an attempt."""
    begun = [run for run in runs if run.attempts]
    if not begun:
        return ""
    if len(runs) == 1:
        shown = begun[0].attempts[-MAX_ATTEMPTS:]
        left_out = len(begun[0].attempts) - len(shown)
        rows = [(f"attempt {attempt.number}", [attempt]) for attempt in shown]
        note = [paragraph(f"The first {left_out} attempts are left out.")] if left_out else []
        text = _attempt_table(begun[0], shown)
    else:
        rows = [(run.label, run.attempts) for run in begun]
        note, text = [], _run_table(begun)
        text = details("Attempts of each run", text) if len(begun) > MAX_OPEN else text
    return section("Attempts", *note, _draw_rows(rows), text)


def _draw_rows(rows: Sequence[tuple[str, Sequence[AttemptFacts]]]) -> str:
    timed = [(name, [a for a in attempts if a.began]) for name, attempts in rows]
    starts = [attempt.began for _, attempts in timed for attempt in attempts]
    if not starts:
        return paragraph("Not drawn: the attempts have no recorded times.", class_="dim")
    several = any(len(attempts) > 1 for _, attempts in timed)
    figure = svg.new_figure(WIDTH, 0.8 + 0.3 * len(timed))
    axes = figure.subplots()
    origin = min(starts)
    spans = [_span(attempt, origin) for _, attempts in timed for attempt in attempts]
    longest = max(start + length for start, length in spans)
    divisor, unit = next(
        (d, u)
        for d, u in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if longest >= 2 * d or d == 1
    )
    for row, (_, attempts) in enumerate(timed):
        for k, attempt in enumerate(attempts):
            start, length = (seconds / divisor for seconds in _span(attempt, origin))
            color, hatch = _PATTERNS.get(attempt.cause, (COLORS[4], ""))
            axes.barh(
                row,
                length,
                0.62,
                start,
                facecolor="none",
                edgecolor=color,
                hatch=hatch,
                linewidth=1.4,
                gid=f"bar-{row}-{k}",
            )
            if not several:
                axes.annotate(
                    _label(attempt),
                    (start + length, row),
                    (4, 0),
                    textcoords="offset points",
                    fontsize=8,
                    va="center",
                    annotation_clip=False,
                )
    axes.set_yticks(range(len(timed)), [_shorten(name) for name, _ in timed])
    axes.set_ylim(len(timed) - 0.5, -0.5)
    axes.set_xlabel(f"{unit} since the first start")
    axes.set_xlim(0, longest / divisor * (1.0 if several else 1.5) or 1.0)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    causes = list(dict.fromkeys(attempt.cause for _, attempts in timed for attempt in attempts))
    if several:
        _draw_legend(axes, causes)
    figure.draw_without_rendering()
    text = "; ".join(f"{name}: " + ", ".join(map(_label, attempts)) for name, attempts in timed[:MAX_ATTEMPTS])
    picture = svg.to_svg(figure, "timeline", "Attempts over time", text, axes)
    caption = element("figcaption", f"The first start was at {_format_time(origin)}.")
    return element("figure", picture, caption, class_="wide")


def _draw_legend(axes: Axes, causes: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = []
    for cause in causes:
        color, hatch = _PATTERNS.get(cause, (COLORS[4], ""))
        handles.append(Patch(facecolor="none", edgecolor=color, hatch=hatch, label=cause or "no end recorded"))
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes that were drawn have one
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8)


def _attempt_table(run: RunFacts, attempts: Sequence[AttemptFacts]) -> str:
    head = ["attempt", "began", "lasted", "from step", "to step", "end", "steps lost", "ranks", "where", "message"]
    rows = [
        [
            str(a.number),
            Markup(element("time", _format_time(a.began))),
            format_seconds(a.ended - a.began) if a.began and a.ended >= a.began else "unknown",
            a.first_step,
            "unknown" if a.last_step is None else a.last_step,
            a.cause or "not recorded",
            "unknown" if a.lost is None else a.lost,
            a.world or "",
            a.host,
            a.error[:300],
        ]
        for a in attempts
    ]
    kept = [
        k for k, name in enumerate(head) if name not in ("where", "message", "ranks") or any(row[k] for row in rows)
    ]
    return table([head[k] for k in kept], [[row[k] for k in kept] for row in rows], f"Attempts of {run.label}")


def _run_table(runs: Sequence[RunFacts]) -> str:
    head = ["run", "attempts", "ends", "steps lost", "in steps that counted"]
    rows = [
        [
            run.label,
            len(run.attempts),
            ", ".join(f"{count} {cause}" for cause, count in run.causes.most_common()) or "none recorded",
            run.lost_text,
            f"{100 * run.uptime.share:.1f} %" if run.uptime is not None and run.uptime.step else "",
        ]
        for run in runs
    ]
    kept = len(head) if any(row[-1] for row in rows) else -1
    return table(head[:kept], [row[:kept] for row in rows], "Attempts of each run")


def _span(attempt: AttemptFacts, origin: float) -> tuple[float, float]:
    """Start and length in seconds; an attempt without a recorded end is drawn as a point."""
    return attempt.began - origin, max(attempt.ended - attempt.began, 0.0)


def _label(attempt: AttemptFacts) -> str:
    lost = f", {attempt.lost} steps lost" if attempt.lost else ""
    return (attempt.cause or "no end recorded") + lost


def _format_time(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC") if time else "unknown"


def _shorten(name: str, letters: int = 18) -> str:
    return name if len(name) <= letters else "…" + name[1 - letters :]
