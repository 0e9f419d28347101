"""k-nearest-neighbour classification on frozen features: exact, and the same on any number of ranks.

    majority vote (MSF, CMSF):            argmax_c  |{ j in kNN(q) : y_j = c }|
    weighted vote (Wu et al. 2018, DINO): argmax_c  sum_{j in kNN(q), y_j = c} exp(q . x_j / tau)

on avgpool features of the centre crop, unit length. DINO's softmax over the neighbours is the same vote, divided by
a number that all classes share. ``PROTOCOLS`` names who takes which k and tau.

Ties: MSF draws among the classes with most votes at random (eval_knn.py: faiss_knn); here the one whose nearest
neighbour is nearest wins, so that a score is a function of the features alone. Equally near neighbours stand in the
order of their index. One more deviation: MSF searches features rounded to fp16, which ``store=fp16`` brings close.

The search is the training bank's (``memory/search.py``: faiss on a CPU, torch on a GPU, decided in arithmetic that
does not round), so the neighbours depend on the features alone, not on chunks, libraries or the number of ranks.

Memory for 1.28 M x 50 k of 2,048 features: the bank lies in files (10.5 GB, mapped: pages that the system may drop)
and passes through one block of ``BYTES`` = 2.1 GB, on a GPU through a second one there; the queries and their
neighbours (k = 200) take 1.7 GB. Measured: 2.6 GB for the whole bank with few queries, 2.2 GB for all queries with a
small bank, 0.4 GB of each being the libraries; so below 5 GB, of RAM and of a GPU's memory, for each process. Without a
run folder to keep them in, the features stay in the memory of each process: 10.9 GB more, half of that with
``store=fp16``.

Letters in shapes: Q queries, B queries of a block, N bank rows, K neighbours, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl import rng
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals.features import FeatureOptions, Features, one_of
from hpcssl.evals.together import Stop, agree, never
from hpcssl.memory import search
from hpcssl.world import World

BLOCK = 256  # queries that vote at once: the same blocks on any number of ranks
QUERIES = 1024  # queries that search at once, which bounds the search's memory
BYTES = 1 << 31  # of the bank in one search: each search ranks its own candidates exactly, which is what costs


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Neighbours of the majority votes, neighbours of the weighted votes, and the temperature of these."""

    k: tuple[int, ...] = ()
    weighted_k: tuple[int, ...] = ()
    tau: float = 0.07


PROTOCOLS = {
    "msf": Protocol(k=(1, 20), weighted_k=(20,)),  # MSF eval_knn.py:459; beside it, ours: the weighted vote
    "cmsf_semi": Protocol(k=(1, 5, 10, 20)),  # CMSF semi_supervised/eval_knn.py:221
    "instdisc": Protocol(weighted_k=(200,)),  # Wu et al. 2018 [mem]
    "dino": Protocol(weighted_k=(10, 20, 100, 200)),  # dinov2 eval/knn.py, defaults of nb_knn and temperature
    "lightly": Protocol(weighted_k=(200,), tau=0.1),  # its three small benchmarks (BenchmarkModule)
    "moco_cifar": Protocol(weighted_k=(200,), tau=0.1),  # MoCo's CIFAR-10 demo
    "solo": Protocol(weighted_k=(20,)),  # solo/utils/knn.py:30-31, cosine
}


@dataclass(frozen=True, kw_only=True)
class KnnOptions(FeatureOptions):
    """``protocol`` names a row of ``PROTOCOLS``; ``k``, ``weighted_k`` and ``tau``, where they are set, replace its
    values. ``one_label``: number of random draws of one labelled training image per class, whose 1-NN scores are
    averaged (0: none), drawn at the address (``seed``, draw, class).
    """

    protocol: str = "msf"
    k: list[int] | None = None
    weighted_k: list[int] | None = None
    tau: float | None = None
    one_label: int = 10
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("protocol", self.protocol, PROTOCOLS)
        for name, values in (("k", self.k), ("weighted_k", self.weighted_k)):
            if any(k < 1 for k in values or ()):
                raise ConfigError(f"evals.knn.{name}", got=list(values), expected="numbers of neighbours from 1",
                                  mend=f"{name}=[1,20]")
        if self.tau is not None and not self.tau > 0:
            raise ConfigError("evals.knn.tau", got=self.tau, expected="a temperature above 0", mend="tau=0.07")

    def resolve(self) -> Protocol:
        given = {"k": self.k, "weighted_k": self.weighted_k, "tau": self.tau}
        return replace(PROTOCOLS[self.protocol], **{name: v for name, v in given.items() if v is not None})


def run(context) -> dict[str, float]:
    """Scores in percent: ``knn{k}``, ``knn{k}_top5`` (k >= 5), ``knn{k}_weighted``, ``…_top5``, ``one_label``."""
    return classify(context.features(context.train), context.features(context.val), context.options,
                    context.world, stop=context.stop)


def classify(bank: Features, queries: Features, options: KnnOptions, world: World, *,
             stop: Stop = never) -> dict[str, float]:
    """Every query classified by its neighbours in the bank; ranks share the queries. A collective."""
    votes = options.resolve()
    largest = max((*votes.k, *votes.weighted_k), default=0)
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
            right.update(_count(rows, near, y, votes))
    supports = [_one_per_class(bank, options.seed, draw) for draw in range(options.one_label)]
    for support in supports:
        _, index_Q1 = nearest(unit_QD, support, 1)
        found = support.labels[index_Q1.cpu()[:, 0]]
        right["one_label"] += int((found == queries.labels[torch.cat(mine)]).sum()) if mine else 0
    agree(world, "k-NN", stop=stop())
    names = _names(votes) + (["one_label"] if supports else [])
    totals = world.sum(torch.tensor([right[name] for name in names], device=world.device)).tolist()
    share = {"one_label": max(1, len(supports))}
    return {name: 100.0 * n / (len(queries) * share.get(name, 1)) for name, n in zip(names, totals, strict=True)}


def _blocks(samples: int, world: World) -> list[Tensor]:
    return list(torch.arange(samples).split(BLOCK))[world.rank::world.size]


def _names(votes: Protocol) -> list[str]:
    names = []
    for ks, kind in ((votes.k, ""), (votes.weighted_k, "_weighted")):
        for k in ks:
            names += [f"knn{k}{kind}"] + ([f"knn{k}{kind}_top5"] if k >= 5 else [])
    return names


def _count(similarity_BK: Tensor, labels_BK: Tensor, y_B: Tensor, votes: Protocol) -> Counter[str]:
    right: Counter[str] = Counter()
    for ks, kind in ((votes.k, ""), (votes.weighted_k, "_weighted")):
        for k in ks:
            near, tau = similarity_BK[:, :k], votes.tau if kind else None
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
        del rows  # on a GPU, before the next block comes beside it
    return best_QK, index_QK


def _large_blocks(bank: Features) -> Iterator[tuple[int, Tensor]]:
    """The bank's unit rows in blocks of about ``BYTES``, whole parts each. All lie in the same memory: a block holds
    until the next one is asked for."""
    most = max(BYTES // (4 * bank.width), *map(len, bank.parts))
    held, filled = torch.empty(min(most, len(bank)), bank.width), 0
    for start, rows in bank.unit():
        if filled + len(rows) > len(held):
            yield start - filled, held[:filled]
            filled = 0
        held[filled:filled + len(rows)] = rows
        filled += len(rows)
    yield len(bank) - filled, held[:filled]
