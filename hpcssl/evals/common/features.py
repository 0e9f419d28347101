"""Feature sets in memory or mapped from files.

Shapes: N samples, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl.data.shards import ShardSet


class Features:
    """Raw features [N, D] on the CPU, as consecutive parts in index order.

    Parts that are files are memory-mapped: the operating system may drop their pages. Parts keep the stored precision
    (``FeatureOptions.feature_dtype``); ``unit_rows`` and ``rows`` return fp32.

    Args:
        parts: Consecutive rows, each [n, D].
        labels: Class number of each row, int [N].
        classes: Names of the classes.
    """

    def __init__(self, parts: Sequence[Tensor], labels: npt.NDArray[Any], classes: Sequence[str] = ()) -> None:
        self.parts = list(parts)
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self.classes = list(classes)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        """Number of features per row, D."""
        return self.parts[0].shape[1]

    def unit_rows(self) -> Iterator[tuple[int, Tensor]]:
        """Iterate over the parts with rows scaled to unit length.

        Yields:
            The index of the part's first row, and its rows, fp32 [n, D].
        """
        for start, part in zip(self.starts, self.parts, strict=False):
            yield int(start), F.normalize(part.float(), dim=1)

    def rows(self, index: Tensor) -> Tensor:
        """Return the raw rows of global indices.

        Args:
            index: int64 [n], in any order, on any device.

        Returns:
            fp32 [n, D] on the CPU.
        """
        index = index.cpu()
        if len(self.parts) == 1:
            return self.parts[0][index].float()
        part = torch.as_tensor(np.searchsorted(self.starts, index.numpy(), side="right") - 1)
        rows = torch.empty(len(index), self.width)
        for i in sorted(set(part.tolist())):
            in_part = part == i
            rows[in_part] = self.parts[i][index[in_part] - int(self.starts[i])].float()
        return rows

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased variance [D] of the unit-length rows, fp32, summed in float64 in index order."""
        total = sum((rows.double().sum(0) for _, rows in self.unit_rows()), torch.zeros((), dtype=torch.float64))
        mean = total / len(self)
        squares = (((rows.double() - mean).square().sum(0)) for _, rows in self.unit_rows())
        variance = sum(squares, torch.zeros((), dtype=torch.float64)) / (len(self) - 1)
        return mean.float(), variance.float()


class ConcatenatedSets:
    """Shard sets one after another, as one set of labeled images.

    Args:
        sets: Shard sets with the same classes.
    """

    def __init__(self, *sets: ShardSet) -> None:
        self.sets = sets
        self.classes: list[str] = sets[0].classes
        self.labels: npt.NDArray[np.int64] = np.concatenate([data.labels for data in sets])

    def __len__(self) -> int:
        return len(self.labels)


LabeledImages = ShardSet | ConcatenatedSets
"""What features can be made of: ``len``, ``labels`` [N] and ``classes``."""
