"""The curves of a page: one panel per quantity, with all runs in it, and one legend for all panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcssl.report import svg
from hpcssl.report.markup import element, escape
from hpcssl.results import curves
from hpcssl.results.curves import AXES, COLORS, MARKERS, STYLES, RunGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.4, 3.0)
ORDER = ("loss", "knn", "purity", "spread", "lr", "images_per_s")
MAX_NUMBERS = 16
"""Lines whose numbers stand at their ends; more of them would overlap."""
MAX_DESCRIBED = 8
"""Lines that the text alternative of a panel describes; the table of runs has all of them."""

_DASHES = {"-": None, "--": "6 3", "-.": "9 3 2 3", ":": "2 3"}
_SHAPES = {  # outlines of markers around (18, 6), as matplotlib draws them
    "o": "M15 6a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
    "s": "M15 3h6v6h-6z",
    "^": "M18 2.5l3.5 6.5h-7z",
    "D": "M18 2l4 4l-4 4l-4 -4z",
    "v": "M18 9.5l3.5 -6.5h-7z",
    "P": "M16.8 2.5h2.4v2.3h2.3v2.4h-2.3v2.3h-2.4v-2.3h-2.3v-2.4h2.3z",
    "X": "M15 4.5l1.5 -1.5l1.5 1.5l1.5 -1.5l1.5 1.5l-1.5 1.5l1.5 1.5l-1.5 1.5l-1.5 -1.5l-1.5 1.5l-1.5 -1.5l1.5 -1.5z",
    "<": "M14.5 6l6.5 -3.5v7z",
    ">": "M21.5 6l-6.5 -3.5v7z",
    "*": "M18 2l1.1 2.7l2.9 .2l-2.2 1.9l.7 2.8l-2.5 -1.5l-2.5 1.5l.7 -2.8l-2.2 -1.9l2.9 -.2z",
    "h": "M18 2l3.4 2v4l-3.4 2l-3.4 -2v-4z",
}


def draw_curves(groups: Sequence[RunGroup]) -> str:
    """Draw all quantities that the runs have logged, and their legend.

    Args:
        groups: The runs. Runs that differ only in the seed are one line, their mean.
    """
    names = [name for name in ORDER if any(name in group.curves for group in groups)]
    figures = [element("figure", draw_quantity(groups, name)) for name in names]
    legend = [draw_legend(groups)] if len(groups) > 1 else []
    return "\n".join([*legend, element("div", *figures, class_="curves")])


def draw_quantity(groups: Sequence[RunGroup], name: str) -> str:
    """Draw one quantity as an SVG element.

    The path in the group ``NAME-line-I-J`` has the points of line J of group I.

    Args:
        groups: The runs.
        name: A key of ``curves.AXES``.
    """
    figure = svg.new_figure(*SIZE)
    axes = figure.subplots()
    curves.draw_panel(axes, groups, name)
    figure.draw_without_rendering()
    if 1 < len(groups) <= MAX_NUMBERS:
        _write_numbers(axes, groups, name)
    return svg.to_svg(figure, name, f"{AXES[name]} by epoch", describe_quantity(groups, name), axes)


def describe_quantity(groups: Sequence[RunGroup], name: str) -> str:
    """The text alternative of a panel: first, last, lowest and highest value of each line."""
    sentences = []
    for number, group in enumerate(groups, 1):
        for kind, members in group.curves.get(name, {}).items():
            epochs, values, _ = curves.average_members(members)
            finite = values[np.isfinite(values)]
            if not len(finite):
                continue
            who = " ".join(filter(None, [f"{number}" if len(groups) > 1 else "", group.label, kind]))
            sentences.append(
                f"{who}: {_number(finite[0])} at epoch {_number(epochs[0])}, {_number(finite[-1])} at epoch "
                f"{_number(epochs[-1])}, between {_number(finite.min())} and {_number(finite.max())}."
            )
    rest = len(sentences) - MAX_DESCRIBED
    return " ".join(sentences[:MAX_DESCRIBED]) + (f" And {rest} more lines." if rest > 0 else "")


def draw_legend(groups: Sequence[RunGroup]) -> str:
    """Draw number, line and name of each group."""
    items = []
    for i, group in enumerate(groups):
        color = "currentColor" if i % len(COLORS) == len(COLORS) - 1 else f"var(--c{i % len(COLORS)})"
        line = element(
            "path", d="M0 6H36", stroke=color, stroke_width="2", stroke_dasharray=_DASHES[STYLES[i % len(STYLES)]]
        )
        shape = element("path", d=_SHAPES[MARKERS[i % len(MARKERS)]], fill=color)
        picture = element("svg", line, shape, viewBox="0 0 36 12", aria_hidden="true")
        items.append(element("li", f"{picture}{i + 1} {escape(group.label)}"))
    return element("ol", *items, class_="legend")


def _write_numbers(axes: Axes, groups: Sequence[RunGroup], name: str) -> None:
    """Write the number of each group at the end of its line, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * 9 / (SIZE[1] * svg.DPI * 0.75)  # the height of a digit of 8 points
    ends = []
    for number, group in enumerate(groups, 1):
        for members in list(group.curves.get(name, {}).values())[:1]:
            _, values, _ = curves.average_members(members)
            finite = values[np.isfinite(values)]
            if len(finite):
                ends.append((float(finite[-1]), number))
    previous = -np.inf
    for value, number in sorted(ends):
        previous = max(value, previous + gap)
        axes.annotate(
            str(number),
            (1.0, previous),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def _number(value: float) -> str:
    return f"{value:.4g}"
