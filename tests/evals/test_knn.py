"""k-NN: votes and neighbors compared with scikit-learn and literal loops, on any number of ranks."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from hpcssl.config import load
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals.common.features import Features
from hpcssl.evals.frozen import knn
from hpcssl.evals.frozen.knn_options import PROTOCOLS, KnnOptions

SINGLE = World.single_process()


def draw_features(samples, width, classes, seed, parts=1):
    """Features in noisy clusters, cut into parts."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (samples,), generator=draw)
    rows = centers[labels] + 1.6 * torch.randn(samples, width, generator=draw)
    return Features(list(rows.tensor_split(parts)), labels.numpy())


def whole(features):
    return torch.cat(features.parts).numpy()


@pytest.mark.parametrize("parts", [1, 7])
def test_majority_vote_equals_scikit_learns(parts, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK_BYTES", 4 * 24 * 100)  # several blocks of the bank
    bank, queries = draw_features(500, 24, 6, 0, parts), draw_features(200, 24, 6, 1)
    ours = knn.classify(bank, queries, KnnOptions(k=[1, 3, 20], weighted_k=[], one_label_draws=0), SINGLE)
    unit = [F.normalize(torch.cat(x.parts), dim=1).double().numpy() for x in (bank, queries)]
    y = queries.labels.numpy()
    for k in (1, 3, 20):
        theirs = KNeighborsClassifier(k, algorithm="brute").fit(unit[0], bank.labels.numpy())
        share = theirs.predict_proba(unit[1])
        clear = np.sort(share, 1)[:, -1] > np.sort(share, 1)[:, -2]  # ties: theirs take the lowest class
        near = theirs.kneighbors(unit[1], return_distance=False)
        right = [
            theirs.predict(unit[1])[i] == y[i] if clear[i] else literal(bank.labels[near[i]].tolist()) == y[i]
            for i in range(len(y))
        ]
        assert ours[f"knn{k}"] == pytest.approx(100 * np.mean(right), abs=1e-12)
    assert 30 < ours["knn20"] < 99 and "knn3_top5" not in ours


def literal(labels):
    """Return MSF's vote over neighbors, nearest first. Of equal votes the class of the nearest neighbor wins."""
    votes = Counter(labels)
    most = max(votes.values())
    return next(label for label in labels if votes[label] == most)


def test_ranked_classes_equal_literal_loops():
    draw = torch.Generator().manual_seed(5)
    similarity = torch.rand(300, 20, generator=draw, dtype=torch.float64).sort(1, descending=True).values
    labels = torch.randint(9, (300, 20), generator=draw)
    for tau in (None, 0.07, 0.5):
        ranked = knn.rank_classes(similarity, labels, tau)
        for i in range(300):
            votes = {}
            for s, label in zip(similarity[i].tolist(), labels[i].tolist(), strict=True):
                votes[label] = votes.get(label, 0.0) + (1 if tau is None else math.exp(s / tau))
            order = sorted(votes, key=lambda c: (-votes[c], labels[i].tolist().index(c)))
            assert ranked[i].tolist() == (order + [-1] * 5)[:5]


def test_ties_go_to_the_class_with_the_nearest_neighbor():
    labels = torch.tensor([[3, 1, 1, 3, 2], [2, 2, 0, 0, 1]])
    assert knn.rank_classes(torch.zeros(2, 5), labels, None).tolist() == [[3, 1, 2, -1, -1], [2, 0, 1, -1, -1]]


def test_weighted_votes_and_top5_equal_literal_loops():
    bank, queries = draw_features(300, 16, 12, 2, 3), draw_features(80, 16, 12, 3)
    ours = knn.classify(
        bank, queries, KnnOptions(k=[20], weighted_k=[20, 200], temperature=0.1, one_label_draws=0), SINGLE
    )
    a, b = (F.normalize(torch.cat(x.parts), dim=1).double() for x in (queries, bank))
    for k in (20, 200):
        top = (a @ b.T).topk(k)
        first = five = 0
        for s, index, y in zip(top.values, top.indices, queries.labels.tolist(), strict=True):
            votes = Counter()
            for value, j in zip(s.tolist(), index.tolist(), strict=True):
                votes[int(bank.labels[j])] += math.exp(value / 0.1)
            best = [c for c, _ in votes.most_common(5)]
            first, five = first + (best[0] == y), five + (y in best)
        assert ours[f"knn{k}_weighted"] == pytest.approx(100 * first / 80)
        assert ours[f"knn{k}_weighted_top5"] == pytest.approx(100 * five / 80)


@pytest.mark.parametrize(
    "name, names",
    [
        ("cmsf_semi", ["knn1", "knn5", "knn5_top5", "knn10", "knn10_top5", "knn20", "knn20_top5"]),
        ("dino", [f"knn{k}_weighted{top}" for k in (10, 20, 100, 200) for top in ("", "_top5")]),
        ("lightly", ["knn200_weighted", "knn200_weighted_top5"]),
    ],
)
def test_a_protocol_equals_its_values_given_as_options(name, names):
    bank, queries = draw_features(300, 16, 12, 2), draw_features(80, 16, 12, 3)
    ours = knn.classify(bank, queries, KnnOptions(protocol=name, one_label_draws=0), SINGLE)
    assert list(ours) == names
    named = PROTOCOLS[name]
    explicit = KnnOptions(
        k=list(named.k),
        weighted_k=list(named.weighted_k),
        temperature=named.temperature if named.weighted_k else None,
        one_label_draws=0,
    )
    assert knn.classify(bank, queries, explicit, SINGLE) == ours


def test_half_precision_features_change_at_most_two_of_200_votes():
    bank, queries = draw_features(500, 24, 6, 0, 3), draw_features(200, 24, 6, 1)
    half = Features([part.half() for part in bank.parts], bank.labels.numpy())
    assert half.rows(torch.tensor([400, 3])).dtype == torch.float32
    assert torch.equal(half.rows(torch.tensor([400, 3])), bank.rows(torch.tensor([400, 3])).half().float())
    full, ours = (knn.classify(b, queries, KnnOptions(one_label_draws=0), SINGLE) for b in (bank, half))
    assert all(abs(ours[name] - full[name]) <= 1.0 for name in full)  # two of 200 queries


def test_blocks_of_the_bank_reuse_one_buffer(monkeypatch):
    monkeypatch.setattr(knn, "BLOCK_BYTES", 4 * 8 * 250)
    rows, places = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)), set()
    for start, block in knn._bank_blocks(Features(list(rows.split(70)), np.zeros(1000))):
        assert torch.equal(block, F.normalize(rows[start : start + len(block)], dim=1)) and len(block) <= 250
        places.add(block.data_ptr())
    assert len(places) == 1 and start + len(block) == 1000


def test_neighbors_do_not_depend_on_parts_or_blocks(monkeypatch):
    """The bank holds 199 rows twice and one row 202 times: equal similarities are ordered by index."""
    rows = torch.cat(draw_features(200, 32, 4, 4).parts)
    rows = torch.cat((rows, rows, rows[:1].expand(200, -1)))
    labels = np.arange(600) % 4
    query = F.normalize(torch.cat((rows[:50], rows[0:1].expand(10, -1))), dim=1)
    results = []
    for parts, block in ((1, 2**31), (5, 1), (3, 4 * 32 * 256)):
        monkeypatch.setattr(knn, "BLOCK_BYTES", block)
        results.append(knn.nearest_neighbors(query, Features(list(rows.tensor_split(parts)), labels), 25))
    for similarity, index in results:
        assert torch.equal(index, results[0][1]) and torch.equal(similarity, results[0][0])
    assert results[0][1][55].tolist() == [0, 200, *range(400, 423)]


def test_a_collapsed_encoder_scores_chance():
    bank = Features([torch.ones(5000, 8)], np.arange(5000) % 10)
    queries = Features([torch.ones(30, 8)], np.arange(30) % 10)
    scores = knn.classify(bank, queries, KnnOptions(k=[1, 20], one_label_draws=3), SINGLE)
    assert scores["knn1"] == scores["knn20"] == scores["one_label"] == 10.0  # always class 0


def test_one_label_is_the_mean_accuracy_of_its_draws():
    bank, queries = draw_features(60, 16, 5, 6), draw_features(70, 16, 5, 7)
    support = [knn._draw_one_per_class(bank, 0, draw) for draw in range(4)]
    assert all(sorted(s.labels.tolist()) == list(range(5)) for s in support)
    assert len({tuple(whole(s).ravel()) for s in support}) == 4
    shares = [
        KNeighborsClassifier(1, metric="cosine").fit(whole(s), s.labels).score(whole(queries), queries.labels)
        for s in support
    ]
    ours = knn.classify(bank, queries, KnnOptions(k=[], weighted_k=[], one_label_draws=4), SINGLE)
    assert ours == {"one_label": pytest.approx(100 * np.mean(shares))}


def test_scores_of_1_2_and_4_ranks_are_equal(run_ranks, monkeypatch):
    monkeypatch.setattr(knn, "VOTE_BLOCK", 32)  # ten blocks, not a multiple of 4
    bank, queries = draw_features(400, 16, 6, 8, 5), draw_features(310, 16, 6, 9)
    options = KnnOptions(weighted_k=[20, 200], one_label_draws=2)
    reference = knn.classify(bank, queries, options, SINGLE)
    for size in (2, 4):
        assert run_ranks(size, classify, bank, queries, options) == [reference] * size


def classify(world, bank, queries, options):
    return knn.classify(bank, queries, options, world)


def test_more_ranks_than_blocks_give_the_same_scores(run_ranks):
    bank, queries = draw_features(40, 8, 3, 8), draw_features(30, 8, 3, 9)
    reference = knn.classify(bank, queries, KnnOptions(), SINGLE)
    assert run_ranks(2, classify, bank, queries, KnnOptions()) == [reference] * 2


def test_more_neighbors_than_training_images_are_refused():
    with pytest.raises(EvalError) as caught:
        knn.classify(draw_features(10, 8, 3, 0), draw_features(5, 8, 3, 1), KnnOptions(), SINGLE)
    assert "20" in caught.value.got and "10 " in caught.value.got
    possible = dict(word.split("=") for word in caught.value.fix.split() if "=" in word)
    assert possible == {"k": "[1]", "weighted_k": "[10]"}, "both lists are named, with numbers that are possible"


@pytest.mark.parametrize(
    "options, what, hint",
    [
        ({"protocol": "dyno"}, "evals.knn.protocol", "'dino'"),
        ({"feature_dtype": "fp8"}, "evaluation option feature_dtype", "fp16"),
        ({"interpolation": "cubic"}, "evaluation option interpolation", "bicubic"),
        ({"k": [0]}, "evals.knn.k", "k=[1,20]"),
        ({"k": [5, 1, 5]}, "evals.knn.k", "k=[5,1]"),
        ({"weighted_k": [20, 20]}, "evals.knn.weighted_k", "weighted_k=[20]"),
        ({"one_label_draws": -1}, "evals.knn.one_label_draws", "one_label_draws=0"),
        ({"k": [], "weighted_k": [], "one_label_draws": 0}, "evals.knn", "k=[20]"),
        ({"temperature": 0}, "evals.knn.temperature", "above 0"),
        ({"protocol": "cmsf_semi", "temperature": 0.1}, "evals.knn.temperature", "weighted_k=[20]"),
        ({"weighted_k": [], "temperature": 0.1}, "evals.knn.temperature", "weighted_k=[20]"),
        ({"temprature": 1}, "options of knn, key temprature", "'temperature'"),
        ({"precision": "fp8"}, "evaluation option precision", "bf16"),
        ({"view": "weak"}, "evaluation option view", "auto"),
        ({"forward_batch": 0}, "evaluation option forward_batch", "at least 1"),
    ],
)
def test_invalid_options_are_refused(options, what, hint):
    with pytest.raises(ConfigError) as caught:
        load(KnnOptions, options, where="options of knn")
    assert caught.value.what == what and hint in caught.value.expected + caught.value.fix
    assert "recipe" not in caught.value.expected, "options of an evaluation are no recipe"
