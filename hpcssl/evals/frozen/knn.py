"""k-nearest-neighbor classification on frozen features: exact, and the same on any number of ranks.

    majority vote (MSF, CMSF):            argmax_c  |{ j in kNN(q) : y_j = c }|
    weighted vote (Wu et al. 2018, DINO): argmax_c  sum_{j in kNN(q), y_j = c} exp(q . x_j / tau)

on avgpool features of the center crop, scaled to unit length. DINO's softmax over the neighbors is the same vote,
divided by a number that all classes share. ``knn_options.PROTOCOLS`` lists k and temperature tau of each source.

DINO's top-5 sorts the votes of all classes, so that where fewer than five have votes, classes without votes fill the
places in an order that torch does not specify. Here only classes with votes count. Top-1 is the same.

Ties: MSF draws among the classes with most votes at random (eval_knn.py: ``faiss_knn``); here the one whose nearest
neighbor is nearest wins, so that a score is a function of the features alone. Equally near neighbors are ordered by
their index. One more deviation: MSF searches features rounded to fp16, which ``feature_dtype=fp16`` comes close to.

The search is that of the training bank (``memory/search.py``: faiss on a CPU, torch on a GPU, decided in arithmetic
that does not round), so the neighbors depend on the features alone, not on chunks, libraries or the number of ranks.

Memory for 1.28 M x 50 k images and 2,048 features: the bank is in files (10.5 GB, memory-mapped: pages that the system
may drop) and passes through one block of ``BLOCK_BYTES`` = 2.1 GB, on a GPU through a second one there; the queries
and their neighbors (k = 200) take 1.7 GB. Measured: 2.6 GB for the whole bank with few queries, 2.2 GB for all queries
with a small bank, 0.4 GB of each for the libraries; so below 5 GB, of RAM and of GPU memory, per process. Without a run
folder to keep them in, the features stay in the memory of each process: 10.9 GB more, half of that with
``feature_dtype=fp16``.

Shapes: Q queries, B queries of a block, N bank rows, K neighbors, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl import rng
from hpcssl.distributed.world import World
from hpcssl.evals.common.features import Features
from hpcssl.evals.common.sync import StopCheck, never_stop, raise_on_any_rank
from hpcssl.evals.context import EvalContext
from hpcssl.evals.frozen.knn_options import KnnOptions, KnnProtocol, check_number_of_neighbors
from hpcssl.memory import search

VOTE_BLOCK = 256
"""Queries that vote at once: the same blocks on any number of ranks."""
SEARCH_BLOCK = 1024
"""Queries that search at once, which bounds the memory of the search."""
BLOCK_BYTES = 1 << 31
"""Bytes of the bank in one search. Each search ranks its own candidates exactly, so few large blocks are fastest."""


def run(context: EvalContext[KnnOptions]) -> dict[str, float]:
    """k-NN classification: accuracy in percent on the validation set. A collective.

    Returns:
        ``knn{k}`` for the majority vote of k neighbors, ``knn{k}_weighted`` for the weighted vote, each with a suffix
        ``_top5`` where k is at least 5; and ``one_label``, the mean 1-NN accuracy with one labeled image per class.
    """
    return classify(
        context.extract_features(context.train),
        context.extract_features(context.val),
        context.options,
        context.world,
        stop=context.stop,
    )


def classify(
    bank: Features, queries: Features, options: KnnOptions, world: World, *, stop: StopCheck = never_stop
) -> dict[str, float]:
    """Classify every query by its neighbors in the bank; the ranks share the queries. A collective.

    Args:
        bank: Features of the training images, with labels.
        queries: Features of the images to classify, with labels.
        options: Votes and draws.
        world: The processes that share the work.
        stop: Whether this process was asked to stop.

    Returns:
        The metrics of ``run``.

    Raises:
        EvalError: The bank has fewer than k images.
        Stopped: After a request to stop.
    """
    protocol = options.resolve()
    largest = check_number_of_neighbors(options, len(bank))
    correct: Counter[str] = Counter()
    mine = _local_blocks(len(queries), world)
    unit_QD = torch.cat([torch.empty(0, queries.width), *(F.normalize(queries.rows(i), dim=1) for i in mine)])
    unit_QD = unit_QD.to(world.device)
    if largest:
        similarity_QK, index_QK = nearest_neighbors(unit_QD, bank, largest, stop=stop)
        raise_on_any_rank(world, "k-NN", stop=stop())
        labels_QK = bank.labels[index_QK.cpu()]
        for similarity, labels, y in zip(
            torch.split(similarity_QK.cpu(), VOTE_BLOCK),
            torch.split(labels_QK, VOTE_BLOCK),
            (queries.labels[block] for block in mine),
            strict=False,
        ):
            correct.update(_count_correct(similarity, labels, y, protocol))
    supports = [_draw_one_per_class(bank, options.seed, draw) for draw in range(options.one_label_draws)]
    for support in supports:
        _, index_Q1 = nearest_neighbors(unit_QD, support, 1)
        labels_Q = support.labels[index_Q1.cpu()[:, 0]]
        correct["one_label"] += int((labels_Q == queries.labels[torch.cat(mine)]).sum()) if mine else 0
    raise_on_any_rank(world, "k-NN", stop=stop())
    names = metric_names(protocol) + (["one_label"] if supports else [])
    totals = world.all_reduce_sum(torch.tensor([correct[name] for name in names], device=world.device)).tolist()
    draws = {"one_label": max(1, len(supports))}
    return {name: 100.0 * n / (len(queries) * draws.get(name, 1)) for name, n in zip(names, totals, strict=True)}


def _local_blocks(samples: int, world: World) -> list[Tensor]:
    """Indices of the queries of this rank, in the blocks that vote at once."""
    return list(torch.split(torch.arange(samples), VOTE_BLOCK))[world.rank :: world.size]


def metric_names(protocol: KnnProtocol) -> list[str]:
    """Return the names of the scores of a protocol, those of ``one_label`` left out."""
    names = []
    for ks, suffix in ((protocol.k, ""), (protocol.weighted_k, "_weighted")):
        for k in ks:
            names += [f"knn{k}{suffix}"] + ([f"knn{k}{suffix}_top5"] if k >= 5 else [])
    return names


def _count_correct(similarity_BK: Tensor, labels_BK: Tensor, y_B: Tensor, protocol: KnnProtocol) -> Counter[str]:
    """Numbers of correct queries of a block, by metric."""
    correct: Counter[str] = Counter()
    for ks, suffix in ((protocol.k, ""), (protocol.weighted_k, "_weighted")):
        for k in ks:
            temperature = protocol.temperature if suffix else None
            hit_B5 = rank_classes(similarity_BK[:, :k], labels_BK[:, :k], temperature) == y_B[:, None]
            correct[f"knn{k}{suffix}"] += int(hit_B5[:, 0].sum())
            correct[f"knn{k}{suffix}_top5"] += int(hit_B5.any(1).sum())
    return correct


def rank_classes(similarity_BK: Tensor, labels_BK: Tensor, temperature: float | None) -> Tensor:
    """Return the five classes with most votes of each query, best first.

    Args:
        similarity_BK: Cosine similarity of each neighbor, nearest first, float64 [B, K].
        labels_BK: Label of each neighbor, int64 [B, K].
        temperature: None for one vote per neighbor, else each votes with weight exp(similarity / temperature).

    Returns:
        int64 [B, 5]; -1 where the neighbors have fewer classes.
    """
    same_BKK = labels_BK[:, :, None] == labels_BK[:, None, :]
    if temperature is None:
        weight_BK = torch.ones_like(similarity_BK, dtype=torch.float64)
    else:  # relative to the nearest one, which cancels in the comparison and cannot overflow
        weight_BK = ((similarity_BK - similarity_BK[:, :1]) / temperature).exp()
    votes_BK = (same_BKK * weight_BK[:, None, :]).sum(2)
    repeated_BK = same_BKK.tril(-1).any(2)  # a class counts once, at its nearest neighbor
    votes_BK = votes_BK.masked_fill(repeated_BK, -1.0)
    best_BK, place_BK = votes_BK.sort(dim=1, descending=True, stable=True)
    ranked = labels_BK.gather(1, place_BK).masked_fill(best_BK < 0, -1)
    return F.pad(ranked, (0, 5), value=-1)[:, :5]


def _draw_one_per_class(bank: Features, seed: int, draw: int) -> Features:
    """The features of one randomly drawn image per class."""
    labels, chosen = bank.labels.numpy(), []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        chosen.append(members[int(rng.uniform(rng.key(seed, "one_label", draw, int(c)), 1)[0] * len(members))])
    index = torch.as_tensor(np.array(chosen))
    return Features([bank.rows(index)], bank.labels[index].numpy())


def nearest_neighbors(
    query_QD: Tensor, bank: Features, k: int, *, stop: StopCheck = never_stop
) -> tuple[Tensor, Tensor]:
    """Find the k bank rows of largest cosine similarity of each query. Not a collective.

    Args:
        query_QD: Queries of unit length, fp32 [Q, D], on the device that searches.
        bank: The bank; its rows are scaled to unit length.
        k: Number of neighbors, K.
        stop: Whether this process was asked to stop. The result is then incomplete, and the caller must raise.

    Returns:
        Similarities, float64 [Q, K], falling; and indices of the rows, int64 [Q, K].
    """
    best_QK = query_QD.new_empty(len(query_QD), 0, dtype=torch.float64)
    index_QK = torch.empty_like(best_QK, dtype=torch.int64)
    for start, rows in _bank_blocks(bank):
        if stop():
            break
        rows = rows.to(query_QD.device)
        results = [search.nearest(q, rows, min(k, len(rows)), exact=True) for q in torch.split(query_QD, SEARCH_BLOCK)]
        score, slot = (torch.cat(column) for column in zip(*results, strict=True))
        best_QK, index_QK = search.merge(torch.cat((best_QK, score), 1), torch.cat((index_QK, slot + start), 1), k)
        del rows  # frees the memory of a GPU before the next block is copied there
    return best_QK, index_QK


def _bank_blocks(bank: Features) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the bank's unit rows in blocks of about ``BLOCK_BYTES``, of whole parts.

    Yields:
        The index of the first row, and the rows, [n, D]. All blocks use the same memory: a block is valid until the
        next one is taken.
    """
    most = max(BLOCK_BYTES // (4 * bank.width), *map(len, bank.parts))
    buffer, filled = torch.empty(min(most, len(bank)), bank.width), 0
    for start, rows in bank.unit_rows():
        if filled + len(rows) > len(buffer):
            yield start - filled, buffer[:filled]
            filled = 0
        buffer[filled : filled + len(rows)] = rows
        filled += len(rows)
    yield len(bank) - filled, buffer[:filled]
