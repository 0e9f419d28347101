"""Nearest neighbors as images, and a map of the embeddings, both from the features that k-NN evaluations store."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from hpcssl import rng
from hpcssl.data.reader import Reader
from hpcssl.errors import HpcsslError
from hpcssl.report import svg
from hpcssl.report.facts import RunFacts
from hpcssl.report.markup import element, paragraph, section
from hpcssl.results import gallery
from hpcssl.results.curves import COLORS, MARKERS
from hpcssl.results.gallery import EncodedSets, NeighborRows

SIDE = 96
"""Pixels of the side of an image."""
MAP_POINTS, MAP_CLASSES = 1000, 10
"""Images and classes of the map. More points would hide each other, and more classes would look alike."""
PERPLEXITY = 30.0
"""Of t-SNE (van der Maaten and Hinton, 2008): the number of neighbors that it weighs, their default."""


def draw_pictures(run: RunFacts, *, compute: bool) -> list[str]:
    """Draw neighbors and map of the last weights of a run; a sentence where they cannot be drawn.

    Args:
        run: The run.
        compute: Compute features that are not stored.
    """
    try:
        encoded = gallery.encode_sets(run.run, compute=compute)
    except HpcsslError as error:
        text = f"Not shown: {error.what}: {error.got}." + (f" To show them: {error.fix}." if error.fix else "")
        return [section("Nearest neighbors and map of embeddings", paragraph(text, class_="dim"))]
    return [
        draw_neighbors(gallery.find_neighbors(encoded, gallery.QUERIES, gallery.NEIGHBORS)),
        draw_map(encoded),
    ]


def draw_neighbors(shown: NeighborRows) -> str:
    """Draw validation images beside the training images that the encoder finds most similar."""
    same, sets = shown.is_same_label, shown.sets
    intro = paragraph(
        f"Left: a validation image. Beside it: the {shown.neighbors.shape[1]} training images that the encoder of "
        f"step {shown.step} finds most similar, the nearest first. {int(same.sum())} of {same.size} have the label of "
        "the image (solid frame); the others have a dashed frame."
    )
    rows = []
    with Reader(sets["val"]) as val, Reader(sets["train"]) as train:
        for row, query in enumerate(shown.queries.tolist()):
            label = sets["val"].classes[sets["val"].labels[query]]
            images = [_image(val, query, "query", f"image of class {label}")]
            for column, neighbor in enumerate(shown.neighbors[row].tolist()):
                name = sets["train"].classes[sets["train"].labels[neighbor]]
                kind = "same" if same[row, column] else "other"
                text = f"neighbor {column + 1}: class {name}, cosine {shown.similarity[row, column]:.3f}"
                images.append(_image(train, neighbor, kind, text))
            rows.append(element("div", *images, class_="row"))
    return section("Nearest neighbors", intro, *rows)


def _image(reader: Reader, index: int, kind: str, text: str) -> str:
    image = gallery.read_square(reader, index, SIDE)
    source = min((_encode(image, name, **options) for name, options in _FORMATS.items()), key=len)
    return element("img", class_=kind, src=source, alt=text, title=text)


_FORMATS: dict[str, dict[str, int]] = {"PNG": {}, "JPEG": {"quality": 90}}
"""The smaller one is taken: PNG for drawings, JPEG for photographs."""


def _encode(image: Image.Image, kind: str, **options: int) -> str:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def draw_map(encoded: EncodedSets) -> str:
    """Draw the validation images of some classes as points, near each other where their features are similar."""
    features, classes = encoded.features["val"], encoded.sets["val"].classes
    chosen, shown = choose_points(features.labels.numpy())
    if len(chosen) < 3:
        text = "Not drawn: the validation set has fewer than three images."
        return section("Map of embeddings", paragraph(text, class_="dim"))
    rows = torch.nn.functional.normalize(features.rows(torch.as_tensor(chosen)), dim=1).numpy()
    points, method = project(rows)
    labels = features.labels.numpy()[chosen]
    names = [classes[label] for label in shown]
    rest = "" if len(shown) == len(np.unique(features.labels)) else f", of {len(shown)} of the {len(classes)} classes"
    intro = paragraph(
        f"{len(chosen)} validation images{rest}, placed by {method} of their features at step {encoded.step}: near "
        "points are similar images. Each class has a color and a marker, and its name stands at the image that "
        "is nearest to all others of the class. Distances between groups mean little."
    )
    picture = _draw_points(points, [labels == label for label in shown], names)
    return section("Map of embeddings", intro, element("figure", picture, class_="wide"))


def choose_points(labels: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Draw images of up to ``MAP_CLASSES`` classes at random, the same ones each time.

    Args:
        labels: Class numbers, [N].

    Returns:
        Indices of the images, rising, and the class numbers.
    """
    order = rng.permutation(rng.key(0, "map of embeddings"), len(labels))
    present = np.unique(labels)
    if len(present) > MAP_CLASSES:
        picks = rng.permutation(rng.key(0, "classes of the map"), len(present))[:MAP_CLASSES]
        present = np.sort(present[picks])
    chosen = order[np.isin(labels[order], present)][:MAP_POINTS]
    return np.sort(chosen), [int(label) for label in present]


def project(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], str]:
    """Place rows on a plane, and say by what.

    Args:
        rows: Features of unit length, [N, D], N >= 3.

    Returns:
        Points [N, 2], and ``t-SNE``, or ``PCA`` where there are too few rows for it.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(rows) <= 3 * PERPLEXITY:
        return PCA(2, svd_solver="full").fit_transform(rows), "PCA"
    reduced = PCA(min(50, *rows.shape), svd_solver="full").fit_transform(rows)
    model = TSNE(2, perplexity=PERPLEXITY, init="pca", learning_rate="auto", random_state=0, n_jobs=1)
    return model.fit_transform(reduced), "t-SNE"


def _draw_points(points: npt.NDArray[np.float32], groups: Sequence[npt.NDArray[np.bool_]], names: list[str]) -> str:
    figure = svg.new_figure(4.4, 4.0)
    figure.set_layout_engine("none")  # there is nothing beside the axes
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    for k, (group, name) in enumerate(zip(groups, names, strict=True)):
        x, y = points[group].T
        color = COLORS[k % len(COLORS)]
        marker = MARKERS[k % len(MARKERS)]
        axes.plot(x, y, marker, color=color, markersize=3.5, fillstyle="none", gid=f"points-{k}")
        if len(x):
            middle = points[group][np.abs(points[group][:, None] - points[group]).sum((1, 2)).argmin()]
            x, y = middle.tolist()
            axes.text(x, y, name[:20], ha="center", va="center", gid=f"label-{k}", parse_math=False)
    axes.set_axis_off()
    figure.draw_without_rendering()
    text = f"{len(points)} points in {len(names)} classes: {', '.join(name[:40] for name in names)}."
    return svg.to_svg(figure, "map", "Map of embeddings by class", text, axes)
