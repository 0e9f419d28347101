"""CMSF against literal scripts: every distance, every constraint and every list written out, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.memory.groups import kmeans

SIZE, STEPS = 48, 24  # 40 images, 2 steps of 16 per epoch: 12 epochs


class Literal:
    """The official scripts' order of things: target forward, push, search over all distances, loss, SGD, EMA first.

    ``constrained(t, index, label)`` gives, for each query, the slots that may be neighbours, or None for all.
    """

    def __init__(self, made, k, share):
        self.k, self.share, self.t = k, share, made.training
        self.online, self.target = self.t.pair.online, self.t.pair.target
        slots = torch.arange(SIZE)
        self.bank = list(self.t.bank.get("key", slots).clone())
        self.index, self.label, self.twin = [-1] * SIZE, [-1] * SIZE, [None] * SIZE
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
            self.twin[at] = self.pool.get(index[i])
            self.pointer = (at + 1) % SIZE
        v = F.normalize(self.online.predictor(self.online.projector(self.online.backbone(query))), dim=1)
        everything, losses = torch.stack(self.bank), []
        of_target, of_query = (((a[:, None] - everything) ** 2).sum(2) for a in (z, v))
        for i in range(len(z)):
            near = sorted(range(SIZE), key=of_target[i].tolist().__getitem__)
            free = of_query[i, near[:self.k]].sum() / self.k
            allowed = constrained(self, index[i], label[i])
            if allowed is None:
                losses.append(free)
                continue
            take = [j for j in near if j in allowed][:self.k]
            if self.fill:  # all at "distance 5.0": the lowest slots stand for "some"
                take += [j for j in range(SIZE) if j not in allowed][:self.k - len(take)]
            losses.append(self.share * of_query[i, take].sum() / len(take) + (1 - self.share) * free)
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


def beside(small_training, recipe, overrides, share, k, constrained, *, fill=False, before=lambda ours, theirs: None):
    """Both for STEPS steps: losses, parameters and the bank's keys. Returns them for more."""
    ours = small_training(recipe, overrides)
    theirs = Literal(small_training(recipe, overrides), k, share)
    theirs.fill = fill
    for step in range(STEPS):
        before(ours, theirs)
        batch = ours.batch(step)
        loss = float(ours.step(batch).scalars["loss"])
        assert loss == pytest.approx(theirs.step(batch, constrained), abs=1e-8), f"step {step}"
    for mine, his in zip(ours.training.pair.online.parameters(), theirs.online.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=0, atol=1e-8)
    torch.testing.assert_close(ours.training.bank.get("key", torch.arange(SIZE)), torch.stack(theirs.bank), rtol=0,
                               atol=1e-8)
    return ours, theirs


def ledgers_agree(ours, theirs):
    z, known = ours.training.memories["ledger"].everything()
    assert sorted(theirs.pool) == known.nonzero()[:, 0].tolist()
    for i, row in theirs.pool.items():
        torch.testing.assert_close(z[i], row, rtol=0, atol=1e-8)


@pytest.mark.parametrize("k,twins", [(3, 3), (3, 9)])
def test_2q_against_a_literal_script(small_training, k, twins):
    """C: the k' rows whose own embedding of the epoch before is nearest to the query's."""
    met = []

    def constrained(script, index, _label):
        own = script.pool.get(index)
        met.append(own is not None)
        if own is None:
            return None
        have = [j for j in range(SIZE) if script.twin[j] is not None]
        distance = ((own - torch.stack([script.twin[j] for j in have])) ** 2).sum(1)
        return [have[j] for j in distance.argsort()[:twins]]

    ours, theirs = beside(small_training, "digits_cmsf_2q", [f"method.k={k}", f"method.twins={twins}"], 0.5, k,
                          constrained)
    assert any(met) and not all(met)
    ledgers_agree(ours, theirs)
    mine = ours.training.bank.get("twin", torch.arange(SIZE))
    known = ours.training.bank.get("group", torch.arange(SIZE))
    for j, row in enumerate(theirs.twin):
        assert (row is not None) == (int(known[j]) == 0)
        if row is not None:
            torch.testing.assert_close(mine[j], row, rtol=0, atol=1e-8)


@pytest.mark.parametrize("fill", [False, True], ids=["valid", "legacy"])
def test_km_against_a_literal_script(small_training, fill):
    """C: bank rows whose image is in the query's cluster, the clusters given; few clusters' rows reach k = 5."""
    groups = {}

    def before(ours, theirs):
        if theirs.t.step % 2 == 0:
            known = sorted(theirs.pool)
            rows = torch.stack([theirs.pool[i] for i in known]) if known else None
            seed = rng.key(0, "kmeans", theirs.t.step)
            found = kmeans(rows, 12, iterations=20, seed=seed).tolist() if known else []
            groups.clear()
            groups.update(zip(known, found, strict=True))

    def constrained(script, index, _label):
        own = groups.get(index)
        return None if own is None else {j for j in range(SIZE) if groups.get(script.index[j]) == own}

    ours, theirs = beside(small_training, "digits_cmsf_km", ["method.k=5", "method.clusters=12",
                                                             f"method.legacy_fill={str(fill).lower()}"], 0.5, 5,
                          constrained, fill=fill, before=before)
    ledgers_agree(ours, theirs)
    mine = ours.training.memories["groups"].of(torch.arange(40)).tolist()
    assert mine == [groups.get(i, -1) for i in range(40)]
    assert ours.training.bank.get("group", torch.arange(SIZE)).tolist() == [mine[i] for i in theirs.index]
    sizes = [sum(mine[i] == mine[j] for i in theirs.index) for j in theirs.index]
    assert min(sizes) < 5, "no query ever lacked a neighbour"


@pytest.mark.parametrize("every", [False, True], ids=["top-10", "top-all"])
def test_sup_against_a_literal_script(small_training, every):
    """C: bank rows of the same label, the constrained sum alone; with ``every`` all of them."""
    def constrained(script, _index, label):
        return {j for j in range(SIZE) if script.label[j] == label}

    beside(small_training, "digits_cmsf_sup", ["method.k=10", f"method.every={str(every).lower()}"], 1.0,
           SIZE if every else 10, constrained)


def same_loss(one, other, batch):
    assert float(one.step(batch).scalars["loss"]) == pytest.approx(float(other.step(batch).scalars["loss"]), abs=1e-12)


def same_losses(one, other, steps):
    for step in range(steps):
        same_loss(one, other, one.batch(step))


def test_one_cluster_is_msf(small_training):
    """All images in one cluster and a ledger that knows them all from the start: nothing is forbidden."""
    km = small_training("digits_cmsf_km", ["method.clusters=1", "bank.start=empty"])
    msf = small_training("digits_msf", ["bank.start=empty"])
    km.training.memories["ledger"].write(torch.arange(40), F.normalize(torch.ones(40, 64).double(), dim=1))
    same_losses(km, msf, 12)


def test_first_epoch_is_msf(small_training):
    for name in ("digits_cmsf_2q", "digits_cmsf_km"):
        same_losses(small_training(name, []), small_training("digits_msf", []), 2)


def test_every_twin_is_msf(small_training):
    """k' as large as the bank, of which every row has a twin: nothing is forbidden."""
    two, msf = small_training("digits_cmsf_2q", ["method.twins=48", "bank.start=empty"]), small_training(
        "digits_msf", ["bank.start=empty"])
    two.training.memories["ledger"].write(torch.arange(40), F.normalize(torch.ones(40, 64).double(), dim=1))
    same_losses(two, msf, 12)


def test_labels_of_one_image_each_are_byol(small_training):
    """A bank of one batch, each image its own label: the only allowed neighbour is the image itself."""
    ema = "method.ema={momentum: 0.9, shape: constant}"
    sup = small_training("digits_cmsf_sup", ["bank.size=16", ema])
    byol = small_training("digits_byol", ["method.symmetric=false", ema])
    for step in range(8):
        batch = sup.batch(step)
        batch.label[:] = batch.index
        same_loss(sup, byol, batch)


def test_images_without_a_label_are_unconstrained(small_training):
    sup, msf = small_training("digits_cmsf_sup", ["method.k=5"]), small_training("digits_msf", ["method.k=5"])
    for step in range(3):
        batch = sup.batch(step)
        batch.label[:] = -1
        same_loss(sup, msf, batch)


@pytest.mark.parametrize("name", ["digits_cmsf_2q", "digits_cmsf_km"])
def test_a_refused_step_leaves_no_trace(small_training, name):
    made = small_training(name, [])
    for step in range(3):
        made.step(made.batch(step))
    before, images = made.snapshot(), made.training.images
    made.training.images = lambda batch: [x * float("nan") for x in images(batch)]
    assert not made.step(made.batch(3)).taken
    after = made.snapshot()
    assert {"ledger.z", "ledger.known"} <= before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key


def test_constrained_neighbours_differ(small_training):
    """From the second epoch on the constraint is another than none: no test above compares MSF with itself."""
    for name in ("digits_cmsf_2q", "digits_cmsf_km"):
        cmsf, msf = small_training(name, []), small_training("digits_msf", [])
        losses = [[float(m.step(m.batch(step)).scalars["loss"]) for step in range(4)] for m in (cmsf, msf)]
        assert np.abs(np.diff(losses, axis=0))[0, 2:].max() > 1e-4


@pytest.mark.parametrize("bad", ["rule=cluster", "twins=4", "every=true", "k=0", "legacy_fill=true", "clusters=-1",
                                 "clusters=7", "iterations=3", "pseudo.threshold=0.5"])
def test_options_that_cannot_be_meant(bad):
    from hpcssl.train import recipe

    with pytest.raises(ConfigError, match="method"):
        recipe.compose("digits_cmsf_2q", [f"method.{bad}"])
