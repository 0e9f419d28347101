"""K-means with rows split over ranks finds the clusters of faiss, and the same ones on any number of ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.distributed.world import World
from hpcssl.methods.cmsf import split_kmeans as module
from hpcssl.methods.cmsf.clusters import ClusterAssignments, kmeans
from hpcssl.methods.cmsf.split_kmeans import split_kmeans


def draw(n, dim, name="rows"):
    return F.normalize(torch.randn(n, dim, generator=rng.generator(rng.key(0, name))), dim=1)


def inertia(rows, cluster):
    """The sum of squared distances of rows to the mean of their cluster."""
    return sum((rows[cluster == c] - rows[cluster == c].mean(0)).square().sum() for c in cluster.unique())


@pytest.mark.parametrize(
    ("rows", "clusters", "iterations"),
    [
        (draw(600, 16), 24, 20),
        (draw(600, 16), 24, 0),  # the rows that faiss starts from
        (draw(12, 8), 12, 20),
        (draw(5, 8), 12, 20),  # fewer rows than clusters
        (draw(20, 8).repeat(10, 1), 40, 5),  # equal rows: clusters become empty and are split
    ],
)
def test_it_finds_the_clusters_of_faiss(rows, clusters, iterations):
    pytest.importorskip("faiss")
    expected = kmeans(rows, clusters, iterations=iterations, seed=7)
    found = split_kmeans(rows, clusters, iterations=iterations, seed=7, world=World.single_process())
    assert found.dtype == torch.int32
    # rounding may move a row between two centers that are equally near; equal rows make all of them so
    if len(rows.unique(dim=0)) == len(rows):
        assert torch.equal(found, expected)
        return
    torch.testing.assert_close(inertia(rows, found), inertia(rows, expected), rtol=0, atol=1e-4)


class Ranks:
    """Ranks in threads of this process."""

    def __init__(self, size):
        self.size, self.barrier, self.values = size, threading.Barrier(size), [None] * size

    def world(self, rank):
        world = World.single_process()
        world.rank, world.size = rank, self.size
        world.all_gather = lambda x: torch.cat(self.exchange(rank, x))
        world.all_reduce_sum = lambda x: torch.stack(self.exchange(rank, x)).sum(0).to(x.dtype)
        return world

    def exchange(self, rank, x):
        self.values[rank] = x
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


def test_the_centers_do_not_depend_on_the_number_of_ranks():
    rows = draw(301, 16)
    expected = split_kmeans(rows, 12, iterations=5, seed=3, world=World.single_process())
    parts = rows.split([100, 1, 200])
    ranks = Ranks(3)
    with ThreadPoolExecutor(3) as pool:
        work = [
            pool.submit(split_kmeans, part, 12, iterations=5, seed=3, world=ranks.world(rank))
            for rank, part in enumerate(parts)
        ]
        found = torch.cat([w.result(30) for w in work])
    assert torch.equal(found, expected)


def test_images_that_are_not_known_have_no_cluster():
    class Table:
        def all_rows(self):
            return draw(6, 4), torch.tensor([True, False, True, True, False, True])

    clusters = ClusterAssignments(6, World.single_process())
    for split in (False, True):
        clusters.update(Table(), lambda rows: torch.arange(len(rows)), split=split)
        assert clusters.cluster_of(torch.arange(6)).tolist() == [0, -1, 1, 2, -1, 3]


def test_an_empty_cluster_takes_half_of_a_large_one():
    centers = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]])
    module._split_empty(centers, [100, 0, 1], 101)
    assert centers[1].tolist() == [1 + 1 / 1024, 1 - 1 / 1024]
    assert centers[0].tolist() == [1 - 1 / 1024, 1 + 1 / 1024] and centers[2].tolist() == [0.5, 0.5]
