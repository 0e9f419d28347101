"""The nearest images to a query among those of a file of features: ``hpcssl search``.

The similarity is the cosine. The search is that of the evaluations (``memory/search.py``): faiss proposes, and exact
arithmetic decides, so that the order does not depend on the library or the number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl import files
from hpcssl.data.decode import DamagedImageError, decode
from hpcssl.errors import ConfigError, DataError, EvalError
from hpcssl.evals.common.features import Features
from hpcssl.evals.frozen import knn
from hpcssl.inference.embed import embed
from hpcssl.inference.embeddings import Embeddings
from hpcssl.inference.images import ImageSource, open_images
from hpcssl.nets.importers import WeightsSource
from hpcssl.results.image_grid import ImageGrid, center_square, shorten

_CAPTION = 0.4  # two lines beneath each image


@dataclass(frozen=True)
class SearchResult:
    """The nearest images of each query.

    Attributes:
        queries: Names of the queries, Q.
        rows: Rows of the nearest images, nearest first, int64 [Q, K].
        similarity: Their cosine similarities, fp64 [Q, K].
    """

    queries: list[str]
    rows: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]


def search_images(
    embeddings: Embeddings,
    queries: Sequence[Path | str],
    top: int = 8,
    *,
    weights: WeightsSource | Path | str | None = None,
    devices: str = "auto",
) -> SearchResult:
    """Find the nearest rows of a file to images, whose features are computed with the same weights.

    Args:
        embeddings: What ``embeddings.read`` gave.
        queries: Image files.
        top: Number of rows per query.
        weights: Where the weights lie now; None for the recorded path.
        devices: ``cpu``, ``gpu`` or ``auto``.

    Raises:
        DataError: A query that cannot be read.
        EvalError: The weights are absent or other ones than those of the file.
    """
    metadata = embeddings.metadata
    source, images = _same_weights(metadata, weights), open_images(queries)
    for number in range(len(images)):
        try:
            decode(images.read(number))
        except DamagedImageError as error:
            raise DataError(
                f"image {images.key(number)}", got=str(error), expected="an image", fix="name an image file"
            ) from error
    query = embed(source, queries, precision=metadata["precision"], devices=devices)
    _check_digest(query.metadata["weights_sha256"], metadata, source)
    return _nearest(embeddings, torch.from_numpy(query.features), query.keys, top)


def search_row(embeddings: Embeddings, row: int, top: int = 8) -> SearchResult:
    """Find the nearest rows to a row of the file, which is not among them. Raises ``ConfigError`` for no such row."""
    if not 0 <= row < len(embeddings):
        raise ConfigError(
            "--row",
            got=row,
            expected=f"a row from 0 to {len(embeddings) - 1}",
            fix="choose another row, or search for an image with --query IMAGE",
        )
    query = torch.from_numpy(np.array(embeddings.features[row : row + 1]))
    hits = _nearest(embeddings, query, [embeddings.keys[row]], top + 1)
    others = hits.rows[0] != row
    others[np.flatnonzero(others)[top:]] = False
    return SearchResult(hits.queries, hits.rows[:, others], hits.similarity[:, others])


def draw_hits(
    embeddings: Embeddings, hits: SearchResult, images: Path | str | None, path: Path, *, row: int | None
) -> None:
    """Draw each query beside its nearest images, with names and similarities.

    Args:
        embeddings: The file of features.
        hits: What was found.
        images: Where the images of the file lie now; None for the recorded folder.
        path: The .png file to write.
        row: The row of the file that is the query; None if the queries are image files.

    Raises:
        ConfigError: The path does not end with .png.
        DataError: The images cannot be found.
    """
    if path.suffix != ".png":
        raise ConfigError(
            f"--to {path}", got=f"the suffix {path.suffix!r}", expected=".png", fix=f"--to {path.with_suffix('.png')}"
        )
    source = open_images(images or embeddings.metadata["images"] or embeddings.keys)
    drawn = sorted({int(hit) for hit in hits.rows.flat} | ({row} if row is not None else set()))
    number_of = {hit: _find_image(source, embeddings, hit) for hit in drawn}
    grid = ImageGrid(len(hits.queries), hits.rows.shape[1], _CAPTION)
    grid.draw_titles(
        f"nearest of {len(embeddings):,} images, {_weights_name(embeddings.metadata)}", "query", "nearest first: cosine"
    )
    for at, query in enumerate(hits.queries):
        body = source.read(number_of[row]) if row is not None else Path(query).read_bytes()
        grid.draw_image(at, 0, center_square(_decode(body, query)), _base(query))
        for column, (hit, similarity) in enumerate(zip(hits.rows[at], hits.similarity[at], strict=True)):
            key = embeddings.keys[hit]
            image = center_square(_decode(source.read(number_of[int(hit)]), key))
            grid.draw_image(at, column + 1, image, f"{_base(key)}\n{similarity:.3f}")
    files.atomic_write(path, grid.to_png())


def _nearest(embeddings: Embeddings, query: Tensor, names: list[str], top: int) -> SearchResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # these arrays cannot be written to, and nobody does
        parts = [torch.from_numpy(part) for part in embeddings.load_parts()]
    bank = Features(parts, np.full(len(embeddings), -1))
    if bank.width != query.shape[1]:
        raise EvalError(
            "features of the query",
            got=f"{query.shape[1]} numbers",
            expected=f"{bank.width}, as in the file",
            fix="search with the weights that the file was written with",
        )
    similarity, rows = knn.nearest_neighbors(F.normalize(query, dim=1), bank, min(top, len(bank)))
    return SearchResult(names, rows.numpy(), similarity.numpy())


def _same_weights(metadata: dict[str, Any], weights: WeightsSource | Path | str | None) -> WeightsSource:
    """The weights of a file, with the recorded choices of how to read them."""
    if isinstance(weights, WeightsSource) and not weights.uses_defaults:
        return weights
    options = dict(metadata["weights_options"])
    for name in ("mean", "std"):
        options[name] = options[name] and tuple(options[name])
    path = Path(metadata["weights"]) if weights is None else Path(WeightsSource.coerce(weights).path)
    if not path.exists():
        raise EvalError(
            f"weights {path}",
            got="no such file",
            expected=f"the weights of the features, sha256 {metadata['weights_sha256'][:12]}…",
            fix="name the place where they lie now with --weights FILE or --run RUN, or search with --row N",
        )
    return WeightsSource(path, **options)


def _check_digest(sha256: str, metadata: dict[str, Any], source: WeightsSource) -> None:
    if sha256 != metadata["weights_sha256"]:
        raise EvalError(
            f"weights {source.path}",
            got=f"sha256 {sha256[:12]}…",
            expected=f"the weights of the features, sha256 {metadata['weights_sha256'][:12]}…",
            fix="name them with --weights FILE or --run RUN --step N, or write the features again",
        )


def _find_image(source: ImageSource, embeddings: Embeddings, row: int) -> int:
    """The number of the image of a row in the source. Raises ``DataError``."""
    key = embeddings.keys[row]
    number = source.find(key, int(embeddings.index[row]))
    if number is None:
        raise DataError(
            f"images {source.root}",
            got=f"no image {key}",
            expected="the images of the features",
            fix="name the folder where they lie now with --images",
        )
    return number


def _decode(body: bytes, name: str) -> npt.NDArray[np.uint8]:
    try:
        return decode(body)
    except DamagedImageError as error:  # it was changed since its features were computed
        raise DataError(f"image {name}", got=str(error), expected="an image", fix="write the features again") from error


def _base(key: str) -> str:
    return shorten(key.rsplit("/", 1)[-1], 18)


def _weights_name(metadata: dict[str, Any]) -> str:
    step = "" if metadata["step"] is None else f", step {metadata['step']}"
    return f"{metadata['recipe'] or metadata['method'] or Path(metadata['weights']).name}{step}"
