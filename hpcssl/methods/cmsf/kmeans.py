"""Which bank rows may be neighbors in CMSF-KM.

C(u) = the rows of the bank in u's cluster; clusters of the last embeddings of all images, by k-means at each epoch
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor

from hpcssl import rng
from hpcssl.memory.checkpointed import CheckpointedMemory
from hpcssl.methods.base import Embedding, MemoryContext, StepContext
from hpcssl.methods.cmsf.clusters import ClusterAssignments, kmeans, require_faiss
from hpcssl.methods.cmsf.constraint import ConstrainedNeighbors, find_constrained
from hpcssl.methods.cmsf.options import CmsfOptions
from hpcssl.methods.cmsf.split_kmeans import split_kmeans

_IMAGES_PER_CLUSTER = 25.6  # 50,000 clusters for the 1,281,167 images of ImageNet


class KMeansRule:
    """CMSF-KM: images of the query's cluster.

    The embedding table is clustered at the start of each epoch, and the rows of the bank get the new clusters. An image
    that the table does not know has no cluster.

    Args:
        options: options of CMSF.
    """

    vectors: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ("group",)
    heeds_taken = True

    def __init__(self, options: CmsfOptions):
        self.options = options

    def build_memories(self, context: MemoryContext) -> dict[str, CheckpointedMemory]:
        """Keep the last embedding and the cluster of each image. Raises ``ConfigError`` without faiss."""
        require_faiss("method.rule=kmeans")
        clusters = ClusterAssignments(len(context.labels), context.world)
        return {"embedding_table": context.embedding_table(), "clusters": clusters}

    def before_step(self, ctx: StepContext) -> None:
        """Cluster again at the first step of an epoch."""
        if ctx.step % ctx.steps_per_epoch:
            return
        assignments = ctx.memories["clusters"]
        number = self.options.num_clusters or max(1, round(assignments.images / _IMAGES_PER_CLUSTER))
        seed = rng.key(ctx.seed, "kmeans", ctx.step)
        on_gpu = ctx.world.device.type == "cuda"
        compute = partial(split_kmeans, world=ctx.world) if on_gpu else kmeans
        cluster = partial(compute, clusters=number, iterations=self.options.kmeans_iterations, seed=seed)
        assignments.update(ctx.memories["embedding_table"], cluster, split=on_gpu)
        ctx.bank.rewrite("group", "index", assignments.cluster_of)

    def bank_columns(self, target: Embedding, ctx: StepContext) -> dict[str, Tensor]:
        """Return the cluster of each image."""
        return {"group": ctx.memories["clusters"].cluster_of(ctx.index_B)}

    def after_step(self, targets: dict[int, Embedding], ctx: StepContext) -> None:
        """Keep the embeddings for the next clustering."""
        ctx.memories["embedding_table"].write(ctx.index_B, targets[1].z, ctx.taken)

    def neighbors(self, target: Embedding, ctx: StepContext) -> ConstrainedNeighbors:
        """Find the nearest rows of the query's cluster."""
        return find_constrained(
            ctx.bank,
            target.z,
            ("group", self.bank_columns(target, ctx)["group"]),
            self.options.k,
            all_allowed=self.options.all_allowed,
            legacy_fill=self.options.legacy_fill,
        )
