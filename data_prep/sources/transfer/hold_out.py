"""Hold out images of the training part for validation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_prep.sources.transfer.data_sets import DataSetFacts
from data_prep.sources.transfer.layout import Item


def hold_out_val(items: list[Item], facts: DataSetFacts, name: str, seed: int, complete: bool) -> list[Item]:
    """Draw the val images out of train, per class. Of an incomplete set the same share, but never a whole class.

    Args:
        items: The images of all parts.
        facts: The facts of the data set.
        name: Its name.
        seed: Seed of the draw.
        complete: Whether no image is missing.

    Returns:
        The images in the same order; the drawn ones have the part ``val``.
    """
    from hpcssl import rng

    train = sorted((n for n, item in enumerate(items) if item.part == "train"), key=lambda n: items[n].source)
    labels = np.array([items[n].label for n in train], int)
    counts = np.bincount(labels, minlength=1)
    if complete and facts.val != "share":
        quotas = np.full_like(counts, int(facts.val))
    else:
        total = round(len(train) * facts.sizes[1] / (facts.sizes[0] + facts.sizes[1]))
        quotas = np.minimum(split_by_share(counts, max(total, 1)), np.maximum(counts - 1, 0))
    out = list(items)
    for label in np.flatnonzero(quotas):
        members = np.flatnonzero(labels == label)
        order = rng.permutation(rng.key(seed, "transfer", name, "val", int(label)), len(members))
        for n in members[order[: quotas[label]]]:
            out[train[n]] = items[train[n]]._replace(part="val")
    return out


def split_by_share(counts: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Distribute ``total`` over the classes in proportion to ``counts``, by the method of largest remainders."""
    exact = counts * (total / max(counts.sum(), 1))
    quotas: npt.NDArray[np.int64] = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]] += 1
    return quotas
