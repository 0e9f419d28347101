"""CMSF against literal scripts in float64, which write out every distance, constraint and list."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.methods.cmsf.clusters import kmeans
from hpcssl.train import recipe
from tests.tolerances import of_step

SIZE, STEPS = 48, 24  # 40 images, 2 steps of 16 per epoch: 12 epochs


class LiteralCmsf:
    """The order of the official scripts: EMA, target forward, push, search over all distances, loss, SGD.

    ``constrained(t, index, label)`` gives, for each query, the slots that may be neighbors, or None for all.
    """

    def __init__(self, run, k, share):
        self.k, self.share, self.t = k, share, run.training
        self.online, self.target = self.t.pair.online, self.t.pair.target
        slots = torch.arange(SIZE)
        self.bank = list(self.t.bank.get("key", slots).clone())
        self.index, self.label, self.previous = [-1] * SIZE, [-1] * SIZE, [None] * SIZE
        self.pool, self.pointer, self.momentum, self.fill = {}, 0, {}, False

    def step(self, batch, constrained):
        t = self.t
        query, target = t.images(batch)
        with torch.no_grad():
            pairs = dict(self.target.named_parameters())
            for name, p in self.online.named_parameters():
                if name in pairs:
                    pairs[name].copy_(0.9 * pairs[name] + 0.1 * p)
            z = F.normalize(self.target.projector(self.target.backbone(target)), dim=1)
        index, label = batch.index.tolist(), batch.label.tolist()
        for i, row in enumerate(z):
            at = self.pointer
            self.bank[at], self.index[at], self.label[at] = row, index[i], label[i]
            self.previous[at] = self.pool.get(index[i])
            self.pointer = (at + 1) % SIZE
        v = F.normalize(self.online.predictor(self.online.projector(self.online.backbone(query))), dim=1)
        everything, losses = torch.stack(self.bank), []
        of_target, of_query = (((a[:, None] - everything) ** 2).sum(2) for a in (z, v))
        for i in range(len(z)):
            near = sorted(range(SIZE), key=of_target[i].tolist().__getitem__)
            unconstrained = of_query[i, near[: self.k]].sum() / self.k
            allowed = constrained(self, index[i], label[i])
            if allowed is None:
                losses.append(unconstrained)
                continue
            chosen = [j for j in near if j in allowed][: self.k]
            if self.fill:  # all of them have "distance 5.0": the lowest slots are taken
                chosen += [j for j in range(SIZE) if j not in allowed][: self.k - len(chosen)]
            losses.append(self.share * of_query[i, chosen].sum() / len(chosen) + (1 - self.share) * unconstrained)
        for i, row in zip(index, z, strict=True):
            self.pool[i] = row
        loss = sum(losses) / len(losses)
        self._descend(loss)
        return float(loss.detach())

    def _descend(self, loss):
        self.online.zero_grad()
        loss.backward()
        lr, _ = self.t.set_rates()
        self.t.step += 1
        with torch.no_grad():
            for name, p in self.online.named_parameters():
                g = p.grad + 1e-4 * p
                self.momentum[name] = 0.9 * self.momentum[name] + g if name in self.momentum else g
                p -= lr * self.momentum[name]
        for layer in self.t.norms:
            layer.pending.clear()


def compare_with_script(
    small_training, name, overrides, share, k, constrained, *, fill=False, before=lambda ours, theirs: None
):
    """Run both for STEPS steps and compare losses, parameters and the keys of the bank.

    Returns:
        The training and the script, for further comparisons.
    """
    ours = small_training(name, overrides)
    theirs = LiteralCmsf(small_training(name, overrides), k, share)
    theirs.fill = fill
    for step in range(STEPS):
        before(ours, theirs)
        batch = ours.batch(step)
        loss = float(ours.step(batch).scalars["loss"])
        assert loss == pytest.approx(theirs.step(batch, constrained), abs=of_step(step + 1)), f"step {step}"
    for actual, expected in zip(ours.training.pair.online.parameters(), theirs.online.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=of_step(STEPS))
    torch.testing.assert_close(
        ours.training.bank.get("key", torch.arange(SIZE)), torch.stack(theirs.bank), rtol=0, atol=of_step(STEPS)
    )
    return ours, theirs


def compare_embedding_tables(ours, theirs):
    z, known = ours.training.memories["embedding_table"].all_rows()
    assert sorted(theirs.pool) == known.nonzero()[:, 0].tolist()
    for i, row in theirs.pool.items():
        torch.testing.assert_close(z[i], row, rtol=0, atol=of_step(STEPS))


@pytest.mark.parametrize("k,k_constraint", [(3, 3), (3, 9)])
def test_2q_against_a_literal_script(small_training, k, k_constraint):
    """Allowed: the k' rows whose own embedding of the previous epoch is nearest to that of the query."""
    has_previous = []

    def constrained(script, index, _label):
        own = script.pool.get(index)
        has_previous.append(own is not None)
        if own is None:
            return None
        filled = [j for j in range(SIZE) if script.previous[j] is not None]
        distance = ((own - torch.stack([script.previous[j] for j in filled])) ** 2).sum(1)
        return [filled[j] for j in distance.argsort()[:k_constraint]]

    ours, theirs = compare_with_script(
        small_training, "digits_cmsf_2q", [f"method.k={k}", f"method.k_constraint={k_constraint}"], 0.5, k, constrained
    )
    assert any(has_previous) and not all(has_previous)
    compare_embedding_tables(ours, theirs)
    actual = ours.training.bank.get("previous_epoch", torch.arange(SIZE))
    known = ours.training.bank.get("group", torch.arange(SIZE))
    for j, row in enumerate(theirs.previous):
        assert (row is not None) == (int(known[j]) == 0)
        if row is not None:
            torch.testing.assert_close(actual[j], row, rtol=0, atol=of_step(STEPS))


@pytest.mark.parametrize("fill", [False, True], ids=["valid", "legacy"])
def test_km_against_a_literal_script(small_training, fill):
    """Allowed: bank rows whose image is in the cluster of the query. Few clusters have k = 5 rows in the bank."""
    groups = {}

    def before(ours, theirs):
        if theirs.t.step % 2 == 0:
            known = sorted(theirs.pool)
            rows = torch.stack([theirs.pool[i] for i in known]) if known else None
            seed = rng.key(0, "kmeans", theirs.t.step)
            clusters = kmeans(rows, 12, iterations=20, seed=seed).tolist() if known else []
            groups.clear()
            groups.update(zip(known, clusters, strict=True))

    def constrained(script, index, _label):
        own = groups.get(index)
        return None if own is None else {j for j in range(SIZE) if groups.get(script.index[j]) == own}

    ours, theirs = compare_with_script(
        small_training,
        "digits_cmsf_km",
        ["method.k=5", "method.num_clusters=12", f"method.legacy_fill={str(fill).lower()}"],
        0.5,
        5,
        constrained,
        fill=fill,
        before=before,
    )
    compare_embedding_tables(ours, theirs)
    actual = ours.training.memories["clusters"].cluster_of(torch.arange(40)).tolist()
    assert actual == [groups.get(i, -1) for i in range(40)]
    assert ours.training.bank.get("group", torch.arange(SIZE)).tolist() == [actual[i] for i in theirs.index]
    sizes = [sum(actual[i] == actual[j] for i in theirs.index) for j in theirs.index]
    assert min(sizes) < 5, "every query had enough allowed neighbors"


@pytest.mark.parametrize("every", [False, True], ids=["top-10", "top-all"])
def test_sup_against_a_literal_script(small_training, every):
    """Allowed: bank rows of the same label, and only the constrained sum; with ``every`` all such rows."""

    def constrained(script, _index, label):
        return {j for j in range(SIZE) if script.label[j] == label}

    compare_with_script(
        small_training,
        "digits_cmsf_sup",
        ["method.k=10", f"method.all_allowed={str(every).lower()}"],
        1.0,
        SIZE if every else 10,
        constrained,
    )


def compare_loss(one, other, batch):
    expected = float(other.step(batch).scalars["loss"])
    assert float(one.step(batch).scalars["loss"]) == pytest.approx(expected, abs=of_step(one.training.step))


def compare_losses(one, other, steps):
    for step in range(steps):
        compare_loss(one, other, one.batch(step))


def test_one_cluster_is_msf(small_training):
    """All images in one cluster, and an embedding table that has them all from the start: every row is allowed."""
    km = small_training("digits_cmsf_km", ["method.num_clusters=1", "bank.init=empty"])
    msf = small_training("digits_msf", ["bank.init=empty"])
    km.training.memories["embedding_table"].write(torch.arange(40), F.normalize(torch.ones(40, 64).double(), dim=1))
    compare_losses(km, msf, 12)


def test_first_epoch_is_msf(small_training):
    for name in ("digits_cmsf_2q", "digits_cmsf_km"):
        compare_losses(small_training(name, []), small_training("digits_msf", []), 2)


def test_k_constraint_of_the_whole_bank_is_msf(small_training):
    """k' as large as the bank, and a previous embedding for every row: every row is allowed."""
    two, msf = (
        small_training("digits_cmsf_2q", ["method.k_constraint=48", "bank.init=empty"]),
        small_training("digits_msf", ["bank.init=empty"]),
    )
    two.training.memories["embedding_table"].write(torch.arange(40), F.normalize(torch.ones(40, 64).double(), dim=1))
    compare_losses(two, msf, 12)


def test_one_label_per_image_is_byol(small_training):
    """A bank of one batch in which each image has a label of its own: its only allowed neighbor is the image itself."""
    ema = "method.ema={momentum: 0.9, shape: constant}"
    sup = small_training("digits_cmsf_sup", ["bank.size=16", ema])
    byol = small_training("digits_byol", ["method.symmetric=false", ema])
    for step in range(8):
        batch = sup.batch(step)
        batch.label[:] = batch.index
        compare_loss(sup, byol, batch)


def test_images_without_a_label_are_unconstrained(small_training):
    sup, msf = small_training("digits_cmsf_sup", ["method.k=5"]), small_training("digits_msf", ["method.k=5"])
    for step in range(3):
        batch = sup.batch(step)
        batch.label[:] = -1
        compare_loss(sup, msf, batch)


@pytest.mark.parametrize("name", ["digits_cmsf_2q", "digits_cmsf_km"])
def test_a_skipped_step_changes_nothing(small_training, name):
    run = small_training(name, [])
    for step in range(3):
        run.step(run.batch(step))
    before, images = run.snapshot(), run.training.images
    run.training.images = lambda batch: [x * float("nan") for x in images(batch)]
    assert not run.step(run.batch(3)).taken
    after = run.snapshot()
    assert {"embedding_table.z", "embedding_table.known"} <= before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key


def test_constrained_neighbors_differ(small_training):
    """From the second epoch on the constraint has an effect, so no test above compares MSF with itself."""
    for name in ("digits_cmsf_2q", "digits_cmsf_km"):
        cmsf, msf = small_training(name, []), small_training("digits_msf", [])
        losses = [[float(m.step(m.batch(step)).scalars["loss"]) for step in range(4)] for m in (cmsf, msf)]
        assert np.abs(np.diff(losses, axis=0))[0, 2:].max() > 1e-4


@pytest.mark.parametrize(
    ("key", "value", "got"),
    [
        ("rule", "cluster", "'cluster'"),
        ("k_constraint", "4", "4"),
        ("all_allowed", "true", "True"),
        ("k", "0", "0"),
        ("legacy_fill", "true", "True"),
        ("num_clusters", "-1", "-1"),
        ("num_clusters", "7", "7 with rule two_queues"),
        ("kmeans_iterations", "3", "3 with rule two_queues"),
    ],
)
def test_invalid_options_are_refused(key, value, got):
    with pytest.raises(ConfigError) as caught:
        recipe.compose("digits_cmsf_2q", [f"method.{key}={value}"])
    assert (caught.value.what, str(caught.value.got)) == (f"method.{key}", got)


def test_options_of_pseudo_labels_need_their_rule():
    with pytest.raises(ConfigError) as caught:
        recipe.compose("digits_cmsf_2q", ["method.pseudo_labels.threshold=0.5"])
    assert caught.value.what == "method.pseudo_labels" and "two_queues" in caught.value.got
