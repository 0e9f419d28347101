"""A picture of what an encoder finds similar: random validation images beside their nearest training images.

The features are those of ``hpcssl eval knn``, taken from the run folder or computed and stored there, and the neighbors
are those that vote there. A neighbor with the label of the query has a solid blue frame; any other has a dashed orange
frame and its own label beneath.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from hpcssl import config, files, rng
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals.checks import check_labels
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import are_stored, extract_features
from hpcssl.evals.common.features import Features
from hpcssl.evals.frozen import knn
from hpcssl.evals.resolve import load_options, resolve_evaluation
from hpcssl.nets.run_weights import find_weights
from hpcssl.results.image_grid import MAX_SIDE, ImageGrid, center_square, shorten
from hpcssl.run_dir import RunDir, open_run
from hpcssl.train import main as training
from hpcssl.train.options import MachineOptions

QUERIES, NEIGHBORS = 10, 8
RIGHT, WRONG = ("#0072B2", "-"), ("#D55E00", (0, (3, 2)))


@dataclass(frozen=True)
class NeighborRows:
    """Random validation images and their nearest training images.

    Attributes:
        step: Training step of the encoder.
        sets: The shards, ``train`` and ``val``.
        queries: Indices of the validation images, int64 [Q].
        neighbors: Indices of their nearest training images, the nearest first, int64 [Q, K].
        similarity: Their cosine similarities, [Q, K].
    """

    step: int
    sets: dict[str, ShardSet]
    queries: npt.NDArray[np.int64]
    neighbors: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32]

    @property
    def is_same_label(self) -> npt.NDArray[np.bool_]:
        """Whether a neighbor has the query's label, bool [Q, K]."""
        same: npt.NDArray[np.bool_] = (
            self.sets["train"].labels[self.neighbors] == self.sets["val"].labels[self.queries][:, None]
        )
        return same


@dataclass(frozen=True)
class EncodedSets:
    """The training and validation images of a run as features of its last weights.

    Attributes:
        step: Training step of the encoder.
        sets: The shards, ``train`` and ``val``.
        features: Their features, by the same names.
    """

    step: int
    sets: dict[str, ShardSet]
    features: dict[str, Features]


def encode_sets(run: RunDir, *, compute: bool = True) -> EncodedSets:
    """Read the features of ``hpcssl eval knn`` of the last weights of a run from its folder.

    Args:
        run: The run folder.
        compute: Compute and store features that are missing there.

    Raises:
        EvalError: The run has no weights, the shards have no labels, or features are missing and not to be computed.
        ConfigError: The recipe has no validation shards.
        DataError: The shards cannot be read.
    """
    overrides, sets = resolve_evaluation("knn", config.read_yaml(run.config))
    check_labels(sets["train"], sets["val"])
    world = World.start("auto")
    training.set_up_torch(MachineOptions(devices="auto"), world.device)
    try:
        options = load_options("knn", overrides)
        encoder = FrozenEncoder.open(find_weights(run), world)
        step = encoder.meta["step"]
        if not compute and not all(are_stored(encoder, sets[kind], options, run.features) for kind in sets):
            raise EvalError(
                f"features of {run.root}",
                got=f"none in the run folder for the weights of step {step}",
                expected="stored features, or time to compute them",
                fix="--compute computes and stores them, with a GPU if there is one",
            )
        threads = len(os.sched_getaffinity(0))
        features = {
            kind: extract_features(encoder, sets[kind], options, world, root=run.features, threads=threads)
            for kind in ("train", "val")
        }
    finally:
        world.close()
    return EncodedSets(step, sets, features)


def find_neighbors(encoded: EncodedSets, queries: int, neighbors: int) -> NeighborRows:
    """Compare random validation images with the training images.

    Args:
        encoded: The images.
        queries: Number of validation images.
        neighbors: Neighbors of each.
    """
    bank, images = encoded.features["train"], encoded.features["val"]
    chosen = choose_queries(images.labels.numpy(), queries)
    unit = F.normalize(images.rows(torch.as_tensor(chosen)), dim=1)
    similarity, index = knn.nearest_neighbors(unit, bank, min(neighbors, len(bank)))
    return NeighborRows(encoded.step, encoded.sets, chosen, index.numpy(), similarity.numpy())


def draw_gallery(folder: Path | str, path: Path | str) -> Path:
    """Draw the gallery of the last weights of a run, with the training and validation shards of its recipe.

    Args:
        folder: The run folder.
        path: The .png file to write.

    Returns:
        The path.

    Raises:
        EvalError: The run has no weights, or the shards have no labels.
        ConfigError: The path does not end with .png, or the recipe has no validation shards.
        DataError: The shards cannot be read.
    """
    run, path = open_run(folder), Path(path)
    if path.suffix != ".png":
        raise ConfigError(
            f"--gallery {path}",
            got=f"the suffix {path.suffix!r}",
            expected=".png",
            fix=f"write --gallery {path.with_suffix('.png')}",
        )
    files.atomic_write(path, _draw_picture(run, find_neighbors(encode_sets(run), QUERIES, NEIGHBORS)))
    return path


def choose_queries(labels: npt.NDArray[np.int64], count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Draw images, first one of every class.

    Args:
        labels: Class numbers, [N].
        count: Number of images.
        seed: Seed of the order.

    Returns:
        Indices of the images.
    """
    order = rng.permutation(rng.key(seed, "gallery"), len(labels))
    _, first = np.unique(labels[order], return_index=True)
    first = np.sort(first)
    rest = np.setdiff1d(np.arange(len(order)), first)
    chosen: npt.NDArray[np.int64] = order[np.concatenate([first, rest])[:count]]
    return chosen


def _draw_picture(run: RunDir, rows: NeighborRows) -> bytes:
    sets, same_label = rows.sets, rows.is_same_label
    classes = sets["val"].classes
    grid = ImageGrid(*rows.neighbors.shape)
    grid.draw_titles(
        f"{run.root.name}, step {rows.step}: {int(same_label.sum())} of {same_label.size} "
        f"neighbors have the query's label (solid blue frame); beneath: cosine",
        "query",
        "nearest first",
    )
    with Reader(sets["val"]) as val, Reader(sets["train"]) as train:
        for row, query in enumerate(rows.queries):
            label = classes[sets["val"].labels[query]]
            grid.draw_image(row, 0, read_square(val, int(query)), shorten(label))
            for column, neighbor in enumerate(rows.neighbors[row]):
                same = same_label[row, column]
                caption = f"{rows.similarity[row, column]:.3f}" + (
                    "" if same else f" · {shorten(classes[sets['train'].labels[neighbor]])}"
                )
                image = read_square(train, int(neighbor))
                grid.draw_image(row, column + 1, image, caption, RIGHT if same else WRONG)
    return grid.to_png()


def read_square(reader: Reader, index: int, max_side: int = MAX_SIDE) -> Image.Image:
    """The central square of an image, made smaller where it has more than ``max_side`` pixels a side."""
    _, pixels, _ = reader.read_images(index, 0)
    assert pixels is not None  # read_images was not asked to leave it out
    return center_square(pixels, max_side)
