"""Rows of images in one figure: a query on the left, and beside it what was found."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAP, CAPTION, HEAD = 0.08, 0.27, 0.75
"""Space between images, beneath each, and above all of them, in widths of an image."""
MAX_SIDE = 160
"""Pixels per side of a drawn image."""


class ImageGrid:
    """A figure of square images in rows and columns.

    It has one pair of axes whose unit is an image: laying out one panel per image would take a minute.

    Args:
        rows: Number of rows.
        columns: Number of images beside the one on the left.
        caption: Space beneath each image, in widths of an image.
    """

    def __init__(self, rows: int, columns: int, caption: float = CAPTION) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = left_edge(columns) + 1 + GAP, rows * (1 + caption) + HEAD
        self._caption = caption
        self.figure = Figure(figsize=(1.2 * self.width, 1.2 * self.height), dpi=150)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()

    def draw_titles(self, title: str, *columns: str) -> None:
        """Write a title, and one above each of the first columns."""
        self.axes.text(GAP, 0.25, title, va="center")
        for column, text in enumerate(columns):
            self.axes.text(left_edge(column), HEAD - 0.08, text, fontsize="small", va="bottom")

    def draw_image(
        self,
        row: int,
        column: int,
        image: Image.Image,
        caption: str,
        frame: tuple[Any, Any] | None = None,
    ) -> None:
        """Draw a square image. ``frame``: color and line style of one around it."""
        from matplotlib.patches import Rectangle

        x, y = left_edge(column), HEAD + row * (1 + self._caption)
        self.axes.imshow(np.asarray(image), extent=(x, x + 1, y + 1, y), interpolation="nearest", aspect="auto")
        self.axes.text(x + 0.5, y + 1.05, caption, fontsize="x-small", ha="center", va="top", parse_math=False)
        if frame is not None:
            color, line = frame
            self.axes.add_patch(
                Rectangle((x, y), 1, 1, fill=False, linewidth=3, capstyle="butt", edgecolor=color, linestyle=line)
            )

    def to_png(self) -> bytes:
        """The figure as the bytes of a PNG file, the same for the same content."""
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0))  # imshow has changed the limits
        out = io.BytesIO()
        self.figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()


def center_square(pixels: npt.NDArray[np.uint8], max_side: int = MAX_SIDE) -> Image.Image:
    """The central square of an image, uint8 [H, W, 3], made smaller where it has more than ``max_side`` a side."""
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image.resize((max_side, max_side), Image.Resampling.LANCZOS) if side > max_side else image


def left_edge(column: int) -> float:
    """Left edge of a column, in widths of an image; the first one stands apart from the others."""
    return GAP + column * (1 + GAP) + (GAP if column else 0)


def shorten(name: str, letters: int = 15) -> str:
    """The name, or as many of its first letters as fit, with an ellipsis."""
    return name if len(name) <= letters else name[: letters - 1] + "…"
