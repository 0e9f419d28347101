"""K-means on the device, with the rows split over the ranks: what ``clusters.kmeans`` computes with faiss on one CPU.

It starts from the same rows as faiss, takes as many iterations, and fills empty clusters in the same way. The
differences are of rounding: distances are products of this device, and the sums of a cluster's rows are exact. They are
sums of integers, multiples of 2^-30, so that neither the order of adding nor the number of ranks changes a bit of a
center. A row that is equally near to two centers, up to rounding, may go to either of them.

    n rows of all ranks, m rows of this rank, D entries per row, k clusters
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl.distributed.world import World

_GRID = 2.0**30
_PRODUCTS = 2**26  # entries of a block of distances: 256 MiB of float32
_NUDGE = 1 / 1024  # faiss: EPS in Clustering.cpp
_SPLIT_SEED = 1234  # faiss: the seed of every split_clusters


def split_kmeans(rows: Tensor, clusters: int, *, iterations: int, seed: int, world: World) -> Tensor:
    """Cluster the rows of all ranks by Lloyd's iterations. A collective.

    Args:
        rows: This rank's rows, float [m, D] with entries of at most 1 in magnitude.
        clusters: Number of clusters; with fewer rows than clusters, each row is a cluster.
        iterations: Number of Lloyd's iterations.
        seed: Seed of the rows that the iterations start from.
        world: The ranks. Their rows count in the order of the ranks.

    Returns:
        int32 [m], the cluster of each of this rank's rows.
    """
    counts = world.all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    first, total = sum(counts[: world.rank]), sum(counts)
    if total == 0:
        return torch.zeros(0, dtype=torch.int32, device=rows.device)
    x, k = rows.float(), min(clusters, total)
    with torch.autocast(x.device.type, enabled=False):
        centers = _start(x, _draw_rows(total, k, seed & 0x7FFFFFFF) - first, world)
        for _ in range(iterations if total > k else 0):
            world.set_phase("cluster", computing=True)
            centers = _update(x, _nearest(x, centers), centers, total, world)
        return _nearest(x, centers).to(torch.int32)


def _draw_rows(total: int, k: int, seed: int) -> npt.NDArray[np.int64]:
    """The k rows that faiss starts from: the first of its permutation of all rows (``rand_perm``, seed + 1)."""
    if k == total:
        return np.arange(total)
    random = _words(seed + 1, k)
    order = np.arange(total)
    for place, word in enumerate(random):
        other = place + int(word) % (total - place)
        order[place], order[other] = order[other], order[place]
    return order[:k]


def _words(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """The first words of C++'s ``std::mt19937(seed)``."""
    bits = np.random.MT19937()
    bits._legacy_seeding(seed)
    return bits.random_raw(count)


def _start(x: Tensor, at: npt.NDArray[np.int64], world: World) -> Tensor:
    """Gather the rows at these places [k], counted from this rank's first row, as [k, D] on every rank."""
    here = np.flatnonzero((at >= 0) & (at < len(x)))
    centers = x.new_zeros(len(at), x.shape[1])
    centers[torch.from_numpy(here).to(x.device)] = x[torch.from_numpy(at[here]).to(x.device)]
    return world.all_reduce_sum(centers)  # each row is zero on all ranks but one


def _nearest(x: Tensor, centers: Tensor) -> Tensor:
    """The nearest center of each row, int64 [m]."""
    half_norm = centers.square().sum(1) / 2
    step = max(1, _PRODUCTS // len(centers))
    parts = [torch.addmm(half_norm, part, centers.T, alpha=-1).argmin(1) for part in torch.split(x, step)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)


def _update(x: Tensor, nearest: Tensor, centers: Tensor, total: int, world: World) -> Tensor:
    """The means of the rows of each cluster; empty clusters take half of another one."""
    sums = torch.zeros_like(centers, dtype=torch.int64)
    for part, cluster in zip(torch.split(x, 2**16), torch.split(nearest, 2**16), strict=True):
        sums.index_add_(0, cluster, part.double().mul_(_GRID).round_().to(torch.int64))
    count = torch.zeros(len(centers), dtype=torch.int64, device=x.device)
    count.index_add_(0, nearest, torch.ones_like(nearest))
    sums, count = world.all_reduce_sum(sums), world.all_reduce_sum(count)
    means = (sums.double() / _GRID / count.clamp(min=1)[:, None]).float()
    _split_empty(means, count.tolist(), total)
    return means


def _split_empty(centers: Tensor, count: list[int], total: int) -> None:
    """Give each empty cluster half of a large one, drawn as ``split_clusters`` of faiss draws it."""
    size, k = np.array(count, np.float64), len(count)
    empty, used = np.flatnonzero(size == 0), 0
    factor = torch.where(torch.arange(centers.shape[1], device=centers.device) % 2 == 0, 1 + _NUDGE, 1 - _NUDGE)
    words = _words(_SPLIT_SEED, 0)
    for new in empty.tolist():
        source = -1
        while source < 0:  # clusters are offered in turn, each with its share of the rows as the probability
            if used + k > len(words):
                words = _words(_SPLIT_SEED, 2 * (used + k))
            draws = (words[used : used + k] / 2**32).astype(np.float32)
            accepted = np.flatnonzero(draws < ((size - 1) / (total - k)).astype(np.float32))
            source = int(accepted[0]) if len(accepted) else -1
            used += source + 1 if source >= 0 else k
        centers[new] = centers[source] * factor
        centers[source] *= 2 - factor
        size[new] = size[source] / 2
        size[source] -= size[new]
