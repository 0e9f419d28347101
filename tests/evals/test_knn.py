import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from hpcssl.config import load
from hpcssl.errors import ConfigError, EvalError
from hpcssl.evals import knn
from hpcssl.evals.features import Features
from hpcssl.evals.knn import KnnOptions
from hpcssl.world import World

ALONE = World.alone()


def drawn(samples, width, classes, seed, parts=1):
    """Features in noisy clusters, cut into parts."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (samples,), generator=draw)
    rows = centres[labels] + 1.6 * torch.randn(samples, width, generator=draw)
    return Features(list(rows.tensor_split(parts)), labels.numpy())


def whole(features):
    return torch.cat(features.parts).numpy()


@pytest.mark.parametrize("parts", [1, 7])
def test_majority_vote_agrees_with_scikit_learn(parts, monkeypatch):
    monkeypatch.setattr(knn, "BYTES", 4 * 24 * 100)  # several blocks of the bank
    bank, queries = drawn(500, 24, 6, 0, parts), drawn(200, 24, 6, 1)
    ours = knn.classify(bank, queries, KnnOptions(k=[1, 3, 20], weighted_k=[], one_label=0), ALONE)
    unit = [F.normalize(torch.cat(x.parts), dim=1).double().numpy() for x in (bank, queries)]
    y = queries.labels.numpy()
    for k in (1, 3, 20):
        theirs = KNeighborsClassifier(k, algorithm="brute").fit(unit[0], bank.labels.numpy())
        share = theirs.predict_proba(unit[1])
        clear = np.sort(share, 1)[:, -1] > np.sort(share, 1)[:, -2]  # ties: theirs take the lowest class
        near = theirs.kneighbors(unit[1], return_distance=False)
        right = [theirs.predict(unit[1])[i] == y[i] if clear[i] else literal(bank.labels[near[i]].tolist()) == y[i]
                 for i in range(len(y))]
        assert ours[f"knn{k}"] == pytest.approx(100 * np.mean(right), abs=1e-12)
    assert 30 < ours["knn20"] < 99 and "knn3_top5" not in ours


def literal(labels):
    """MSF's vote over neighbours, nearest first, with our rule for ties."""
    votes = Counter(labels)
    most = max(votes.values())
    return next(label for label in labels if votes[label] == most)


def test_votes_agree_with_literal_loops():
    draw = torch.Generator().manual_seed(5)
    similarity = torch.rand(300, 20, generator=draw, dtype=torch.float64).sort(1, descending=True).values
    labels = torch.randint(9, (300, 20), generator=draw)
    for tau in (None, 0.07, 0.5):
        ranked = knn.vote(similarity, labels, tau)
        for i in range(300):
            votes = {}
            for s, label in zip(similarity[i].tolist(), labels[i].tolist(), strict=True):
                votes[label] = votes.get(label, 0.0) + (1 if tau is None else math.exp(s / tau))
            order = sorted(votes, key=lambda c: (-votes[c], labels[i].tolist().index(c)))
            assert ranked[i].tolist() == (order + [-1] * 5)[:5]


def test_ties_go_to_the_class_with_the_nearest_neighbour():
    labels = torch.tensor([[3, 1, 1, 3, 2], [2, 2, 0, 0, 1]])
    assert knn.vote(torch.zeros(2, 5), labels, None).tolist() == [[3, 1, 2, -1, -1], [2, 0, 1, -1, -1]]


def test_weighted_vote_and_top5_by_loops_over_everything():
    bank, queries = drawn(300, 16, 12, 2, 3), drawn(80, 16, 12, 3)
    ours = knn.classify(bank, queries, KnnOptions(k=[20], weighted_k=[20, 200], tau=0.1, one_label=0), ALONE)
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


@pytest.mark.parametrize("name, names", [
    ("cmsf_semi", ["knn1", "knn5", "knn5_top5", "knn10", "knn10_top5", "knn20", "knn20_top5"]),
    ("dino", [f"knn{k}_weighted{top}" for k in (10, 20, 100, 200) for top in ("", "_top5")]),
    ("lightly", ["knn200_weighted", "knn200_weighted_top5"])])
def test_protocols_by_name_and_their_values_can_be_replaced(name, names):
    bank, queries = drawn(300, 16, 12, 2), drawn(80, 16, 12, 3)
    ours = knn.classify(bank, queries, KnnOptions(protocol=name, one_label=0), ALONE)
    assert list(ours) == names
    named = knn.PROTOCOLS[name]
    spelt = KnnOptions(k=list(named.k), weighted_k=list(named.weighted_k), tau=named.tau, one_label=0)
    assert knn.classify(bank, queries, spelt, ALONE) == ours


def test_half_precision_features_are_kept_as_such_and_vote_nearly_the_same():
    bank, queries = drawn(500, 24, 6, 0, 3), drawn(200, 24, 6, 1)
    half = Features([part.half() for part in bank.parts], bank.labels.numpy())
    assert half.rows(torch.tensor([400, 3])).dtype == torch.float32
    assert torch.equal(half.rows(torch.tensor([400, 3])), bank.rows(torch.tensor([400, 3])).half().float())
    full, ours = (knn.classify(b, queries, KnnOptions(one_label=0), ALONE) for b in (bank, half))
    assert all(abs(ours[name] - full[name]) <= 1.0 for name in full)  # two of 200 queries


def test_the_bank_passes_through_one_block_of_memory(monkeypatch):
    monkeypatch.setattr(knn, "BYTES", 4 * 8 * 250)
    rows, places = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)), set()
    for start, block in knn._large_blocks(Features(list(rows.split(70)), np.zeros(1000))):
        assert torch.equal(block, F.normalize(rows[start:start + len(block)], dim=1)) and len(block) <= 250
        places.add(block.data_ptr())
    assert len(places) == 1 and start + len(block) == 1000


def test_neighbours_do_not_depend_on_parts_or_blocks(monkeypatch):
    """Half of the bank stands in it twice and a third is one and the same row: only indices tell equals apart."""
    rows = torch.cat(drawn(200, 32, 4, 4).parts)
    rows = torch.cat((rows, rows, rows[:1].expand(200, -1)))
    labels = np.arange(600) % 4
    query = F.normalize(torch.cat((rows[:50], rows[0:1].expand(10, -1))), dim=1)
    found = []
    for parts, block in ((1, 2**31), (5, 1), (3, 4 * 32 * 256)):
        monkeypatch.setattr(knn, "BYTES", block)
        found.append(knn.nearest(query, Features(list(rows.tensor_split(parts)), labels), 25))
    for similarity, index in found:
        assert torch.equal(index, found[0][1]) and torch.equal(similarity, found[0][0])
    assert found[0][1][55].tolist() == [0, 200, *range(400, 423)]


def test_a_collapsed_encoder_still_has_an_answer():
    bank = Features([torch.ones(5000, 8)], np.arange(5000) % 10)
    queries = Features([torch.ones(30, 8)], np.arange(30) % 10)
    scores = knn.classify(bank, queries, KnnOptions(k=[1, 20], one_label=3), ALONE)
    assert scores["knn1"] == scores["knn20"] == scores["one_label"] == 10.0  # always class 0


def test_one_label_per_class_is_the_mean_of_its_draws():
    bank, queries = drawn(60, 16, 5, 6), drawn(70, 16, 5, 7)
    support = [knn._one_per_class(bank, 0, draw) for draw in range(4)]
    assert all(sorted(s.labels.tolist()) == list(range(5)) for s in support)
    assert len({tuple(whole(s).ravel()) for s in support}) == 4
    shares = [KNeighborsClassifier(1, metric="cosine").fit(whole(s), s.labels).score(whole(queries), queries.labels)
              for s in support]
    ours = knn.classify(bank, queries, KnnOptions(k=[], weighted_k=[], one_label=4), ALONE)
    assert ours == {"one_label": pytest.approx(100 * np.mean(shares))}


def test_worlds_of_1_2_and_4_count_the_same(ranks, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", 32)  # ten blocks, dealt out unevenly
    bank, queries = drawn(400, 16, 6, 8, 5), drawn(310, 16, 6, 9)
    options = KnnOptions(weighted_k=[20, 200], one_label=2)
    alone = knn.classify(bank, queries, options, ALONE)
    for size in (2, 4):
        assert ranks(size, classify, bank, queries, options) == [alone] * size


def classify(world, bank, queries, options):
    return knn.classify(bank, queries, options, world)


def test_a_world_with_more_ranks_than_blocks(ranks):
    bank, queries = drawn(40, 8, 3, 8), drawn(30, 8, 3, 9)
    alone = knn.classify(bank, queries, KnnOptions(), ALONE)
    assert ranks(2, classify, bank, queries, KnnOptions()) == [alone] * 2


def test_wrong_options_are_refused():
    with pytest.raises(EvalError, match="k = 20 with 10 training images"):
        knn.classify(drawn(10, 8, 3, 0), drawn(5, 8, 3, 1), KnnOptions(), ALONE)
    for wrong, told in (({"protocol": "dyno"}, "did you mean 'dino'"), ({"store": "fp8"}, "store"),
                        ({"interpolation": "cubic"}, "interpolation"),
                        ({"k": [0]}, "evals.knn.k"), ({"tau": 0}, "evals.knn.tau"), ({"taw": 1}, "did you mean 'tau'"),
                        ({"precision": "fp8"}, "precision"), ({"view": "weak"}, "view"), ({"batch": 0}, "batch")):
        with pytest.raises(ConfigError, match=told):
            load(KnnOptions, wrong, where="options of knn")
