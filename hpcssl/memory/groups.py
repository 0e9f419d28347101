"""Which images of the data set belong together, and k-means to find it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hpcssl.errors import ConfigError, ResumeError
from hpcssl.memory.bank import Bank, Hits
from hpcssl.memory.ledger import Ledger
from hpcssl.memory.rows import Part
from hpcssl.world import World

try:
    import faiss
except ImportError:  # an extra; `need_faiss` says so before the first step
    faiss = None


class Groups:
    """The group of each of ``images``, int32 [N] on every rank, or -1 where it has none. Saved in W blocks."""

    def __init__(self, images: int, world: World):
        self.images, self.world = images, world
        self._of = torch.full((images,), -1, dtype=torch.int32, device=world.device)
        share = -(-images // world.size)
        self._block = (min(images, world.rank * share), min(images, (world.rank + 1) * share))

    def of(self, index: Tensor) -> Tensor:
        """Groups of images, int64, in the shape of ``index``; -1 for a number below 0. No collective."""
        return torch.where(index < 0, -1, self._of[index.clamp(min=0)].to(torch.int64))

    def cluster(self, ledger: Ledger, found: Callable[[Tensor], Tensor]) -> None:
        """Group the known images of the ledger by ``found`` ([n, D] to [n] int32); the others have no group.

        Rank 0 looks and tells the others: its arithmetic is the only one that counts.
        """
        rows, known = ledger.everything()
        groups = torch.full_like(self._of, -1)
        if self.world.main and known.any():
            self.world.mark("cluster", patient=True)
            groups[known] = found(rows[known]).to(groups)
        self._of = self.world.sum(groups if self.world.main else groups.zero_())

    def state(self) -> tuple[dict[str, Part], dict[str, int]]:
        first, last = self._block
        return {"of": Part(self._of[first:last], first, self.images)}, {"images": self.images}

    def replicas(self) -> dict[str, Tensor]:
        return {"of": self._of}

    def load(self, numbers: Mapping[str, int], read: Callable[[str, int, int], Tensor]) -> None:
        """Raises ``ResumeError`` if the saved groups are those of another number of images."""
        if numbers.get("images") != self.images:
            raise ResumeError("the saved groups", got=f"{numbers.get('images')} images",
                              expected=f"{self.images} images", mend="resume with the data set of the run")
        self._of.copy_(read("of", 0, self.images))


def need_faiss(what: str) -> None:
    """Raise ``ConfigError`` where faiss is not installed."""
    if faiss is None:
        raise ConfigError(what, got="no faiss in this environment", expected="faiss, which finds the clusters",
                          mend="install hpcssl[cpu] or hpcssl[gpu]")


def kmeans(rows: Tensor, clusters: int, *, iterations: int, seed: int) -> Tensor:
    """The cluster of each of ``rows`` [n, D], int32 [n]: Lloyd's iterations by faiss from rows drawn at ``seed``.

    The same for the same rows, seed and thread count; on a GPU where faiss was built for one. Fewer rows than
    clusters make as many clusters as rows.
    """
    x = rows.float().cpu().contiguous().numpy()
    if faiss.omp_get_max_threads() != torch.get_num_threads():
        faiss.omp_set_num_threads(torch.get_num_threads())
    gpu = rows.device.type == "cuda" and getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    # every row counts, as in the official code; faiss would draw 256 per cluster, and complain of fewer than 39
    found = faiss.Kmeans(x.shape[1], min(clusters, len(x)), niter=iterations, seed=seed & 0x7FFFFFFF, gpu=gpu,
                         min_points_per_centroid=1, max_points_per_centroid=10**7)
    found.train(x)
    return torch.from_numpy(found.index.search(x, 1)[1][:, 0].astype("int32"))


class Near(NamedTuple):
    """Allowed neighbours [b, K, D] and which are ``valid`` [b, K], or their mean as one; ``count`` [b] of them; and
    whether the query's group is ``known`` [b]."""

    rows: Tensor
    valid: Tensor
    count: Tensor
    known: Tensor


def near(bank: Bank, query: Tensor, among: tuple[str, Tensor], k: int, *, every: bool, legacy_fill: bool) -> Near:
    """The k nearest of the bank's rows that are of the query's group (``Bank.nearest``'s ``among``), or with ``every``
    the mean of them all. ``legacy_fill``: forbidden rows where fewer than k are allowed, as in CMSF's code."""
    if every:
        mean, count = bank.mean(among)
        return Near(mean[:, None], (count > 0)[:, None], count, among[1] >= 0)
    hits = bank.nearest(query, k, among=among)
    count = hits.valid.sum(1)
    if legacy_fill:
        hits = _filled_up(query, hits, bank, among)
    return Near(hits.rows, hits.valid, count, among[1] >= 0)


@torch.no_grad()
def _filled_up(query: Tensor, hits: Hits, bank: Bank, among: tuple[str, Tensor]) -> Hits:
    """``hits`` [b, k] of ``bank.nearest(query, k, among=among)``, with forbidden rows where fewer than k are allowed.

    Those of the lowest slots: a query that lacks some has fewer than k allowed rows, so that among the first 2k slots
    there are enough.
    """
    b, k = hits.slot.shape
    slot = torch.arange(min(2 * k, bank.filled), device=hits.slot.device).expand(b, -1)
    allowed = bank.get(among[0], slot.contiguous()) == among[1][:, None]
    slot = slot.gather(1, allowed.long().sort(dim=1, stable=True).indices)  # forbidden ones first
    place = torch.arange(k, device=slot.device) - hits.valid.sum(1, keepdim=True)
    spare = slot.gather(1, place.clamp(min=0, max=slot.shape[1] - 1))
    return bank.best(query, torch.where(hits.valid, hits.slot, spare), k)
