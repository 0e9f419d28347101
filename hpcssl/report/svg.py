"""Figures of matplotlib as SVG elements of a page: colors follow its mode, and text is text.

An element carries the scale of its axes, so that the numbers behind a line can be read from its points:
``data-x="V0 V1 P0 P1"`` says that the values V0 and V1 lie at the horizontal positions P0 and P1; ``data-y`` says the
same of vertical positions.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from hpcssl.report.markup import escape
from hpcssl.results.curves import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 72  # the unit of matplotlib's SVG files
_CSS = {"#000000": "currentColor", "#595959": "currentColor", "#e6e6e6": "var(--grid)"} | {
    color.lower(): f"var(--c{k})" for k, color in enumerate(COLORS[:-1])
}


def new_figure(width: float, height: float) -> Figure:
    """Create a figure for ``to_svg``. Sizes are in inches, at a text size of 10 points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def to_svg(figure: Figure, name: str, title: str, description: str, axes: Axes | None = None) -> str:
    """Write a figure as an SVG element.

    Args:
        figure: A figure of ``new_figure``.
        name: What no other figure of the page is called; a prefix of all ids.
        title: What the figure shows.
        description: What can be seen in it, for people who hear it.
        axes: The axes whose scale the element carries.
    """
    import matplotlib as mpl

    out = io.StringIO()
    settings: Any = {  # the names of the keys are checked by matplotlib
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "path.simplify": False,  # every point of a line is drawn
    }
    with mpl.rc_context(settings):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for old, new in _CSS.items():
        text = text.replace(old, new)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None  # matplotlib writes it
    scale = _scale(axes) if axes is not None else ""
    head = (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-desc"{scale}>'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return head + text.split(">", 1)[1].strip()


def _scale(axes: Axes) -> str:
    """The attributes ``data-x`` and ``data-y``. The figure was drawn before, so that its layout is final."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    (left, bottom), (right, top) = axes.transData.transform([(x0, y0), (x1, y1)])
    figure = axes.get_figure(root=True)
    assert figure is not None  # axes that were drawn have one
    height = figure.get_size_inches()[1] * DPI  # SVG counts from the top
    return (
        f' data-x="{x0:.17g} {x1:.17g} {left:.17g} {right:.17g}"'
        f' data-y="{y0:.17g} {y1:.17g} {height - bottom:.17g} {height - top:.17g}"'
    )
