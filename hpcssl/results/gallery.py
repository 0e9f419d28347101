"""What an encoder takes for alike: validation images, drawn by lot, beside their nearest training images.

The features are those of ``hpcssl eval knn`` (taken from the run folder where they are kept, else made and kept there),
the neighbours those that vote there. A neighbour with the query's label has a solid blue frame, another one a dashed
orange frame and its own label beneath.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hpcssl import config, files, rng
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError
from hpcssl.evals import knn
from hpcssl.evals import run as evals
from hpcssl.evals.features import Encoder, Features, extract
from hpcssl.files import RunDir
from hpcssl.results.records import open_run
from hpcssl.train import main as training
from hpcssl.train.recipe import MachineOptions
from hpcssl.world import World

QUERIES, NEIGHBOURS = 10, 8
RIGHT, WRONG = ("#0072B2", "-"), ("#D55E00", (0, (3, 2)))
GAP, WORDS, HEAD = 0.08, 0.27, 0.75  # between images, beneath one, above all: in widths of an image
_SIDE = 160  # pixels of a drawn image
_LETTERS = 15


def draw(run: Path | str, path: Path | str) -> Path:
    """Write the gallery of a run's last weights, between the recipe's training and validation shards, as a PNG.

    Raises ``EvalError`` (no weights, no labels), ``ConfigError`` (no .png, no validation shards) and ``DataError``.
    """
    run, path = open_run(run), Path(path)
    if path.suffix != ".png":
        raise ConfigError(f"--gallery {path}", got=f"the ending {path.suffix!r}", expected=".png",
                          mend=f"--gallery {path.with_suffix('.png')}")
    training.prepare(MachineOptions(devices="auto"))
    given, sets = evals.question("knn", config.read_yaml(run.config))
    evals.check_labels(sets["train"], sets["val"])
    world = World.start("auto")
    try:
        options = config.load(knn.KnnOptions, given, where="options of knn")
        encoder = Encoder.open(evals.weights_of(run), world)
        threads = len(os.sched_getaffinity(0))
        bank, queries = (extract(encoder, sets[kind], options, world, root=run.features, threads=threads)
                         for kind in ("train", "val"))
        chosen = drawn(queries.labels.numpy(), QUERIES)
        unit = F.normalize(queries.rows(torch.as_tensor(chosen)), dim=1).to(world.device)
        similarity, index = knn.nearest(unit, bank, min(NEIGHBOURS, len(bank)))
    finally:
        world.close()
    files.atomic_write(path, _picture(run, encoder, sets, bank, chosen, similarity.cpu().numpy(), index.cpu().numpy()))
    return path


def drawn(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Indices of ``count`` images in an order drawn at (seed, "gallery"), of another class each while there are any."""
    order = rng.permutation(rng.key(seed, "gallery"), len(labels))
    _, first = np.unique(labels[order], return_index=True)
    first = np.sort(first)
    rest = np.setdiff1d(np.arange(len(order)), first)
    return order[np.concatenate([first, rest])[:count]]


def _picture(run: RunDir, encoder: Encoder, sets: dict[str, ShardSet], bank: Features, chosen: Sequence[int],
             similarity: np.ndarray, index: np.ndarray) -> bytes:
    from matplotlib.figure import Figure

    rows, columns = index.shape
    classes, wanted = sets["val"].classes, sets["val"].labels[chosen]
    found = bank.labels.numpy()[index]
    # one pair of axes whose unit is an image: a panel for each would take a minute to lay out
    width, height = _left(columns) + 1 + GAP, rows * (1 + WORDS) + HEAD
    figure = Figure(figsize=(1.2 * width, 1.2 * height), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(GAP, 0.25, f"{run.root.name}, step {encoder.meta['step']}: {int((found == wanted[:, None]).sum())} of "
              f"{found.size} neighbours have the query's label (solid blue frame); beneath: cosine", va="center")
    for column, words in enumerate(("query", "nearest first")):
        axes.text(_left(column), HEAD - 0.08, words, fontsize="small", va="bottom")
    with Reader(sets["val"]) as val, Reader(sets["train"]) as train:
        for row, at in enumerate(chosen):
            _image(axes, row, 0, val, int(at), _short(classes[wanted[row]]), None)
            for column, near in enumerate(index[row]):
                same = found[row, column] == wanted[row]
                words = f"{similarity[row, column]:.3f}" + ("" if same else f" · {_short(classes[found[row, column]])}")
                _image(axes, row, column + 1, train, int(near), words, RIGHT if same else WRONG)
    axes.set(xlim=(0, width), ylim=(height, 0))  # each image has moved them
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _left(column: int) -> float:
    return GAP + column * (1 + GAP) + (GAP if column else 0)


def _image(axes, row: int, column: int, reader: Reader, index: int, words: str, frame: tuple | None) -> None:
    from matplotlib.patches import Rectangle

    _, pixels, _ = reader.images(index, 0)
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side > _SIDE:
        image = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    x, y = _left(column), HEAD + row * (1 + WORDS)
    axes.imshow(np.asarray(image), extent=(x, x + 1, y + 1, y), interpolation="nearest", aspect="auto")
    axes.text(x + 0.5, y + 1.05, words, fontsize="x-small", ha="center", va="top")
    if frame is not None:
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, linewidth=3, capstyle="butt", edgecolor=frame[0],
                                 linestyle=frame[1]))


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else name[:_LETTERS - 1] + "…"
