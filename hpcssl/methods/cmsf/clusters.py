"""The cluster of each image of the data set, and the k-means that finds it (CMSF-KM).

N images of the data set, W ranks, D entries per embedding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, ResumeError
from hpcssl.memory.checkpointed import RowReader
from hpcssl.memory.embedding_table import EmbeddingTable
from hpcssl.memory.slots import block_of

try:
    import faiss
except ImportError:  # an optional dependency; `require_faiss` reports it before the first step
    faiss = None  # type: ignore[assignment]  # a module, where it is installed


class ClusterAssignments:
    """The cluster of each image, int32 [N] on every rank; -1 for none. Each rank saves its block of images.

    Args:
        images: number of images, N.
        world: the ranks that train together.
    """

    def __init__(self, images: int, world: World):
        self.images, self.world = images, world
        self._cluster_N = torch.full((images,), -1, dtype=torch.int32, device=world.device)

    def cluster_of(self, index: Tensor) -> Tensor:
        """Return the clusters of images, int64 in the shape of ``index``; -1 for numbers below 0. Not a collective."""
        return torch.where(index < 0, -1, self._cluster_N[index.clamp(min=0)].to(torch.int64))

    def update(self, table: EmbeddingTable, cluster: Callable[[Tensor], Tensor], *, split: bool = False) -> None:
        """Cluster the known images of the table; the others have no cluster. A collective.

        Args:
            table: the last embedding of each image.
            cluster: maps embeddings [n, D] to clusters [n] int32.
            split: each rank clusters its block of images, and ``cluster`` is a collective. Otherwise rank 0 computes
                and sends the result, since other machines could round differently.
        """
        rows, known = table.all_rows()
        first, last = block_of(self.world, self.images) if split else (0, self.images if self.world.is_main else 0)
        cluster_N = torch.zeros_like(self._cluster_N)
        cluster_N[first:last] = -1
        own = known[first:last].nonzero()[:, 0] + first
        if split or len(own):
            self.world.set_phase("cluster", computing=True)
            cluster_N[own] = cluster(rows[own]).to(cluster_N)
        self._cluster_N = self.world.all_reduce_sum(cluster_N)

    def state(self) -> tuple[dict[str, TensorShard], dict[str, int]]:
        """See ``CheckpointedMemory.state``."""
        first, last = block_of(self.world, self.images)
        return {"cluster": TensorShard(self._cluster_N[first:last], first, self.images)}, {"images": self.images}

    def replicas(self) -> dict[str, Tensor]:
        """See ``CheckpointedMemory.replicas``."""
        return {"cluster": self._cluster_N}

    def load(self, numbers: Mapping[str, int], read: RowReader) -> None:
        """See ``CheckpointedMemory.load``. Raises ``ResumeError`` for another number of images."""
        if numbers.get("images") != self.images:
            raise ResumeError(
                "the saved clusters",
                got=f"{numbers.get('images')} images",
                expected=f"{self.images} images",
                fix="resume with the data set of the run",
            )
        self._cluster_N.copy_(read("cluster", 0, self.images))


def require_faiss(what: str) -> None:
    """Raise ``ConfigError`` if faiss is not installed. ``what`` is the recipe key that needs it."""
    if faiss is None:
        raise ConfigError(
            what,
            got="no faiss in this environment",
            expected="faiss, which computes the clusters",
            fix="install hpcssl[cpu] or hpcssl[gpu]",
        )


def kmeans(rows: Tensor, clusters: int, *, iterations: int, seed: int) -> Tensor:
    """Cluster rows by Lloyd's iterations with faiss on the CPU. ``split_kmeans`` does the same on GPUs.

    Equal rows, seed and thread count give equal clusters.

    Args:
        rows: [n, D].
        clusters: number of clusters; with fewer rows than clusters, each row is a cluster.
        iterations: number of Lloyd's iterations.
        seed: seed of the rows that the iterations start from.

    Returns:
        [n] int32, the cluster of each row.
    """
    x = rows.float().cpu().contiguous().numpy()
    if faiss.omp_get_max_threads() != torch.get_num_threads():
        faiss.omp_set_num_threads(torch.get_num_threads())
    # train on every row, as the official code does; faiss would draw 256 per cluster, and warn of fewer than 39
    model = faiss.Kmeans(
        x.shape[1],
        min(clusters, len(x)),
        niter=iterations,
        seed=seed & 0x7FFFFFFF,
        min_points_per_centroid=1,
        max_points_per_centroid=10**7,
    )
    model.train(x)
    return torch.from_numpy(model.index.search(x, 1)[1][:, 0].astype("int32"))
