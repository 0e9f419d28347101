"""A picture of the views of a recipe: one row per image, the image itself first.

Views are drawn, cut and augmented by the code of the training, with the keys of its first epoch. Mixed views are those
of its first step, in which one λ and one box serve all images.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl import files, rng
from hpcssl.data.crop import crop_view
from hpcssl.data.decode import DamagedImageError, ScratchBuffer, decode
from hpcssl.data.reader import Reader
from hpcssl.data.shards import INDEX, ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, DataError
from hpcssl.train.builders import build_method, build_view_plan, view_spec
from hpcssl.train.recipe import Recipe
from hpcssl.views import mix
from hpcssl.views.augment import PARAMS, augment_batch, draw_params
from hpcssl.views.mix import MixPairing
from hpcssl.views.plan import View, ViewPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 6
"""Images that are drawn; an even number, since images are mixed in pairs."""
GAP, CAPTION, HEAD = 0.08, 0.3, 0.9  # between images, beneath each, above all: in widths of an image
_SCALE = 1.3  # inches per image
_LETTERS = 30  # of a line beneath an image
_LEGEND = "Beneath a view: how much of the image's area it shows,\nand what was done to it."
_MEAN, _STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # drawn views are not normalized

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Column:
    """One column of the picture.

    Attributes:
        title: What it shows, in up to three lines.
        images: One image per row, uint8 [H, W, 3].
        captions: One caption per row.
    """

    title: str
    images: list[Image]
    captions: list[str]


def draw_views(recipe: Recipe, data: Path, path: Path, rows: int = ROWS) -> Path:
    """Draw what a recipe makes of some images.

    Args:
        recipe: Its views, crops and mixtures are drawn, with its seed.
        data: A shard folder, a folder with shards in ``train``, or any folder with images in it.
        path: The .png file to write.
        rows: Number of images. Where images are mixed, an odd number is reduced by one.

    Returns:
        The path.

    Raises:
        ConfigError: The path does not end with .png.
        DataError: There are no images, or no second modality for a recipe that shows one.
    """
    if path.suffix != ".png":
        raise ConfigError(
            f"--to {path}", got=f"the suffix {path.suffix!r}", expected=".png", fix=f"--to {path.with_suffix('.png')}"
        )
    plan = build_view_plan(recipe, build_method(recipe))
    has_second = any(view.second for view in plan.views)
    names, indices, first, second = _read_images(data, recipe.seed, rows, has_second)
    if plan.mixed:
        count = len(first) // 2 * 2
        names, indices, first, second = names[:count], indices[:count], first[:count], second[:count]
        if not first:
            raise DataError(f"DATA {data}", got="one image", expected="two images to mix", fix="set mix.kind=none")
    columns = [Column("image", first, names)]
    if has_second:
        columns.append(Column("second\nmodality", second, [""] * len(first)))
    columns += make_columns(recipe, plan, indices, first, second)
    title = f"{recipe.name}: views of {len(first)} images of {data}"
    files.atomic_write(path, _draw(title, columns))
    return path


def make_columns(
    recipe: Recipe, plan: ViewPlan, indices: Sequence[int], first: Sequence[Image], second: Sequence[Image]
) -> list[Column]:
    """Make the views of images, as the training does in its first epoch.

    Args:
        recipe: Gives the seed and the options of the mixture.
        plan: Its views.
        indices: Numbers of the images in the data set, which the random keys depend on.
        first: The images.
        second: Their second modality; empty where the plan shows none.
    """
    columns, views = [], []
    for number, view in enumerate(plan.views):
        images, params = _cut(recipe, number, view, indices, second if view.second else first)
        views.append(augment_batch(images, params, view.augmentation, mean=_MEAN, std=_STD))
        captions = [_describe(row, image) for row, image in zip(params, second if view.second else first, strict=True)]
        columns.append(Column(_title(plan, number), _to_pixels(views[-1]), captions))
    return columns + _mix(recipe, plan, views)


def _cut(
    recipe: Recipe, number: int, view: View, indices: Sequence[int], images: Sequence[Image]
) -> tuple[Tensor, npt.NDArray[np.void]]:
    """Crop one view of every image: uint8 [rows, S, S, 3], and its parameters."""
    spec, scratch = view_spec(number, view), ScratchBuffer()
    cut = torch.zeros(len(images), spec.size, spec.size, 3, dtype=torch.uint8)
    params = np.zeros(len(images), PARAMS)
    for row, (index, image) in enumerate(zip(indices, images, strict=True)):
        height, width = image.shape[:2]
        params[row] = draw_params(spec.augment, rng.key(recipe.seed, "view", 0, index, number), height, width)
        crop_view(image, params[row]["box"].tolist(), spec, cut[row : row + 1].permute(0, 3, 1, 2), scratch)
    return cut, params


def _mix(recipe: Recipe, plan: ViewPlan, views: Sequence[Tensor]) -> list[Column]:
    """The mixed views of the first step, with the rows as its batch."""
    if not plan.mixed:
        return []
    options, columns, rows = recipe.mix, [], len(views[0])
    pairing = MixPairing.draw(options, rng.key(recipe.seed, "pairs", 0), rows, World.single_process())
    for number, source in enumerate(plan.mixed, len(plan.views)):
        key = rng.key(recipe.seed, "mix", 0, source if options.lambda_scope == "view" else plan.mixed[0])
        mixture = mix.draw_mixture(options, key, plan.views[source].size)
        mixed = mix.mix_images(views[source], mixture, pairing.partner_images(views[source]))
        title = f"{number}: query\n{options.kind} of {source},\n{options.loss.upper()}"
        columns.append(Column(title, _to_pixels(mixed), [f"λ = {mixture.lam:.2f}"] * rows))
    return columns


def _title(plan: ViewPlan, number: int) -> str:
    view = plan.views[number]
    sources = {*plan.queries, *(plan.mixed if plan.mixed else ())}
    roles = [name for name, members in (("query", sources), ("target", plan.targets)) if number in members]
    modality = ", second modality" if view.second else ""
    return f"{number}: {', '.join(roles)}\n{view.augment}{modality}\n{view.size} pixels"


def _describe(params: np.void, image: Image) -> str:
    """What was drawn for one view, in a few words."""
    _, _, height, width = params["box"].tolist()
    area = height * width / (image.shape[0] * image.shape[1])
    words = [f"{area:.0%}"]
    words += [name for name in ("flip", "jitter", "gray") if params[name]]
    words += ["blur"] * bool(params["sigma"] > 0) + ["solarize"] * bool(params["solarize"])
    return ", ".join(words)


def _to_pixels(views: Tensor) -> list[Image]:
    """[rows, 3, S, S] in [0, 1] as uint8 [S, S, 3] per row."""
    return list((views.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _read_images(
    data: Path, seed: int, rows: int, has_second: bool
) -> tuple[list[str], list[int], list[Image], list[Image]]:
    """Draw images from a data set.

    Returns:
        Their names, their numbers, the images, and their second modality (empty without ``has_second``).
    """
    shards = next((folder for folder in (data, data / "train") if (folder / INDEX).is_file()), None)
    if shards is None:
        return _read_folder(data, seed, rows, has_second)
    opened = ShardSet.open(shards)
    if has_second and not opened.has_second:
        raise DataError(
            f"shard folder {opened.root}",
            got="images without a second modality",
            expected="one, since the recipe has views of two modalities",
            fix="write the shards with `hpcssl-shard images SRC OUT --second-modality edges`",
        )
    names, indices, first, second = [], [], [], []
    with Reader(opened, limit=None, seed=seed) as reader:
        for index in _choose(len(opened), seed, rows, data):
            _, image, other = reader.read_images(index, 0, second=has_second)
            assert image is not None  # read_images was not asked to leave it out
            names.append(opened.key(index).rpartition("/")[2])
            indices.append(index)
            first.append(image)
            if other is not None:
                second.append(other)
    return names, indices, first, second


def _read_folder(
    data: Path, seed: int, rows: int, has_second: bool
) -> tuple[list[str], list[int], list[Image], list[Image]]:
    if not data.is_dir() or has_second:
        raise DataError(
            f"DATA {data}",
            got="no shards" if data.is_dir() else "no such folder",
            expected="a folder that hpcssl-shard wrote" + ("" if has_second else ", or a folder of images"),
            fix="check the path",
        )
    paths = sorted(path for path in data.rglob("*") if path.is_file() and not path.name.startswith("."))
    names, indices, images = [], [], []
    for index in _choose(len(paths), seed, len(paths), data):
        try:
            images.append(decode(paths[index].read_bytes()))
        except (DamagedImageError, OSError):
            continue
        names.append(paths[index].name)
        indices.append(index)
        if len(images) == rows:
            break
    if not images:
        raise DataError(f"DATA {data}", got="no file that is an image", expected="images", fix="check the path")
    return names, indices, images, []


def _choose(count: int, seed: int, rows: int, data: Path) -> list[int]:
    """Numbers of random images."""
    if count == 0:
        raise DataError(f"DATA {data}", got="no images", expected="at least one", fix="check the path")
    chosen: list[int] = rng.permutation(rng.key(seed, "view picture"), count)[:rows].tolist()
    return chosen


def _draw(title: str, columns: Sequence[Column]) -> bytes:
    from matplotlib.figure import Figure

    rows = len(columns[0].images)
    width, height = GAP + len(columns) * (1 + GAP), HEAD + rows * (1 + CAPTION)
    figure = Figure(figsize=(_SCALE * width, _SCALE * height), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(GAP, 0.14, title, va="center", fontsize="medium")
    axes.text(GAP, 0.31, _LEGEND, va="center", fontsize="x-small")
    for at, column in enumerate(columns):
        x = GAP + at * (1 + GAP)
        axes.text(x, HEAD - 0.08, column.title, fontsize="small", va="bottom", linespacing=1.15)
        for row, (image, caption) in enumerate(zip(column.images, column.captions, strict=True)):
            _draw_image(axes, x, HEAD + row * (1 + CAPTION), image, caption)
    axes.set(xlim=(0, width), ylim=(height, 0))  # imshow has changed the limits
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw_image(axes: Axes, x: float, y: float, image: Image, caption: str) -> None:
    """Draw an image into a square, with its aspect ratio, and the caption beneath it."""
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    side = max(height, width)
    inner_w, inner_h = width / side, height / side
    left, top = x + (1 - inner_w) / 2, y + (1 - inner_h) / 2
    extent: Any = (left, left + inner_w, top + inner_h, top)
    axes.imshow(image, extent=extent, interpolation="antialiased", aspect="auto")
    axes.add_patch(  # so that a white image has edges
        Rectangle((left, top), inner_w, inner_h, fill=False, linewidth=0.5, edgecolor="0.6")
    )
    lines = textwrap.wrap(caption, _LETTERS, max_lines=2, placeholder=" …")
    axes.text(x + 0.5, y + 1.04, "\n".join(lines), fontsize="x-small", ha="center", va="top", linespacing=1.1)
