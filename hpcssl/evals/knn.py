"""k-nearest-neighbour classification on frozen features: exact, and the same on any number of ranks.

    majority vote (MSF, eval_knn.py):     argmax_c  |{ j in kNN(q) : y_j = c }|
    weighted vote (Wu et al. 2018, DINO): argmax_c  sum_{j in kNN(q), y_j = c} exp(q . x_j / tau)

on avgpool features of the centre crop, unit length. Ties: MSF draws among the classes with most votes at random;
here the one whose nearest neighbour is nearest wins, so that a score is a function of the features alone. Equally
near neighbours stand in the order of their index.

The search is the training bank's (``memory/search.py``: faiss where there is one, decided in arithmetic that does
not round), so the neighbours depend on the features alone, not on chunks, libraries or the number of ranks.

Letters in shapes: Q queries, B queries of a block, N bank rows, K neighbours, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl import rng
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals.features import FeatureOptions, Features
from hpcssl.evals.together import Stop, agree, never
from hpcssl.memory import search
from hpcssl.world import World

BLOCK = 256  # queries that vote at once: the same blocks on any number of ranks
QUERIES = 1024  # queries that search at once, which bounds the search's memory
BYTES = 1 << 31  # of the bank in one search: each search ranks its own candidates exactly, which is what costs


@dataclass(frozen=True, kw_only=True)
class KnnOptions(FeatureOptions):
    """``k``: neighbours of the majority votes; ``weighted_k`` and ``tau``: neighbours and temperature of the weighted
    ones. ``one_label``: number of random draws of one labelled training image per class, whose 1-NN scores are
    averaged (0: none), drawn at the address (``seed``, draw, class).
    """

    k: list[int] = field(default_factory=lambda: [1, 20])
    weighted_k: list[int] = field(default_factory=lambda: [20])
    tau: float = 0.07
    one_label: int = 10
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name, values in (("k", self.k), ("weighted_k", self.weighted_k)):
            if any(k < 1 for k in values):
                raise ConfigError(f"evals.knn.{name}", got=list(values), expected="numbers of neighbours from 1",
                                  mend=f"{name}=[1,20]")
        if not self.tau > 0:
            raise ConfigError("evals.knn.tau", got=self.tau, expected="a temperature above 0", mend="tau=0.07")


def run(context) -> dict[str, float]:
    """Scores in percent: ``knn{k}``, ``knn{k}_top5`` (k >= 5), ``knn{k}_weighted``, ``…_top5``, ``one_label``."""
    return classify(context.features(context.train), context.features(context.val), context.options,
                    context.world, stop=context.stop)


def classify(bank: Features, queries: Features, options: KnnOptions, world: World, *,
             stop: Stop = never) -> dict[str, float]:
    """Every query classified by its neighbours in the bank; ranks share the queries. A collective."""
    largest = max((*options.k, *options.weighted_k), default=0)
    if largest > len(bank):
        raise EvalError("k-NN", got=f"k = {largest} with {len(bank)} training images",
                        expected="at least k training images", mend=f"take k up to {len(bank)}")
    right: Counter[str] = Counter()
    mine = _blocks(len(queries), world)
    unit_QD = torch.cat([torch.empty(0, queries.width), *(F.normalize(queries.rows(i), dim=1) for i in mine)])
    unit_QD = unit_QD.to(world.device)
    if largest:
        similarity_QK, index_QK = nearest(unit_QD, bank, largest, stop=stop)
        agree(world, "k-NN", stop=stop())
        labels_QK = bank.labels[index_QK.cpu()]
        for rows, near, y in zip(similarity_QK.cpu().split(BLOCK), labels_QK.split(BLOCK),
                                 (queries.labels[block] for block in mine), strict=False):
            right.update(_count(rows, near, y, options))
    supports = [_one_per_class(bank, options.seed, draw) for draw in range(options.one_label)]
    for support in supports:
        _, index_Q1 = nearest(unit_QD, support, 1)
        found = support.labels[index_Q1.cpu()[:, 0]]
        right["one_label"] += int((found == queries.labels[torch.cat(mine)]).sum()) if mine else 0
    agree(world, "k-NN", stop=stop())
    names = _names(options)
    totals = world.sum(torch.tensor([right[name] for name in names], device=world.device)).tolist()
    share = {"one_label": max(1, len(supports))}
    return {name: 100.0 * n / (len(queries) * share.get(name, 1)) for name, n in zip(names, totals, strict=True)}


def _blocks(samples: int, world: World) -> list[Tensor]:
    return list(torch.arange(samples).split(BLOCK))[world.rank::world.size]


def _names(options: KnnOptions) -> list[str]:
    names = []
    for ks, kind in ((options.k, ""), (options.weighted_k, "_weighted")):
        for k in ks:
            names += [f"knn{k}{kind}"] + ([f"knn{k}{kind}_top5"] if k >= 5 else [])
    return names + (["one_label"] if options.one_label else [])


def _count(similarity_BK: Tensor, labels_BK: Tensor, y_B: Tensor, options: KnnOptions) -> Counter[str]:
    right: Counter[str] = Counter()
    for ks, kind in ((options.k, ""), (options.weighted_k, "_weighted")):
        for k in ks:
            near, tau = similarity_BK[:, :k], options.tau if kind else None
            hit_B5 = vote(near, labels_BK[:, :k], tau) == y_B[:, None]
            right[f"knn{k}{kind}"] += int(hit_B5[:, 0].sum())
            right[f"knn{k}{kind}_top5"] += int(hit_B5.any(1).sum())
    return right


def vote(similarity_BK: Tensor, labels_BK: Tensor, tau: float | None) -> Tensor:
    """The five classes with most votes, best first, int64 [B, 5]; -1 where the neighbours have fewer classes.

    Neighbours stand nearest first. ``tau``: None for one vote each, else exp(similarity / tau).
    """
    same_BKK = labels_BK[:, :, None] == labels_BK[:, None, :]
    if tau is None:
        weight_BK = torch.ones_like(similarity_BK, dtype=torch.float64)
    else:  # relative to the nearest one, which cancels in the comparison and cannot overflow
        weight_BK = ((similarity_BK - similarity_BK[:, :1]) / tau).exp()
    votes_BK = (same_BKK * weight_BK[:, None, :]).sum(2)
    earlier_BK = same_BKK.tril(-1).any(2)  # a class counts once, where its nearest neighbour stands
    votes_BK = votes_BK.masked_fill(earlier_BK, -1.0)
    best_BK, place_BK = votes_BK.sort(dim=1, descending=True, stable=True)
    ranked = labels_BK.gather(1, place_BK).masked_fill(best_BK < 0, -1)
    return F.pad(ranked, (0, 5), value=-1)[:, :5]


def _one_per_class(bank: Features, seed: int, draw: int) -> Features:
    labels, chosen = bank.labels.numpy(), []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        chosen.append(members[int(rng.uniform(rng.key(seed, "one_label", draw, int(c)), 1)[0] * len(members))])
    index = torch.as_tensor(np.array(chosen))
    return Features([bank.rows(index)], bank.labels[index].numpy())


def nearest(query_QD: Tensor, bank: Features, k: int, *, stop: Stop = never) -> tuple[Tensor, Tensor]:
    """The k bank rows of largest cosine: float64 [Q, k] falling, and their indices, int64 [Q, k]. No collective.

    query_QD: unit length, on the device that shall search. After a request to stop the answer is incomplete: the
    caller raises at its next ``agree``.
    """
    best_QK = query_QD.new_empty(len(query_QD), 0, dtype=torch.float64)
    index_QK = torch.empty_like(best_QK, dtype=torch.int64)
    for start, rows in _large_blocks(bank):
        if stop():
            break
        rows = rows.to(query_QD.device)
        found = [search.nearest(q, rows, min(k, len(rows)), exact=True) for q in query_QD.split(QUERIES)]
        score, slot = (torch.cat(column) for column in zip(*found, strict=True))
        best_QK, index_QK = search.merge(torch.cat((best_QK, score), 1),
                                         torch.cat((index_QK, slot + start), 1), k)
    return best_QK, index_QK


def _large_blocks(bank: Features) -> Iterator[tuple[int, Tensor]]:
    """The bank's unit rows, neighbouring parts joined up to ``BYTES``."""
    held: list[Tensor] = []
    for start, rows in bank.unit():
        held.append(rows)
        end = start + len(rows)
        if 4 * bank.width * sum(map(len, held)) >= BYTES or end == len(bank):
            whole = torch.cat(held)
            yield end - len(whole), whole
            held.clear()
