"""Semi-supervised CMSF against a literal script, and in its limits: CMSF-sup with all labels, MSF without any."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.methods.cmsf.pseudo_labels import choose_visible_labels
from tests.tolerances import of_step

SIZE, STEPS, K = 48, 24, 4  # 40 images of two classes, 2 steps of 16 per epoch
HEAD = (
    "method.pseudo_labels={labeled_fraction: 0.3, threshold: 0.7, hidden: 8, batch: 5, epochs: 6, lr: 0.2, "
    "fits_per_epoch: 2}"
)


class LiteralSemiSupervised:
    """Forward, pseudo-labels, push with their classes, search all distances, SGD; the head fits cached embeddings."""

    def __init__(self, run, shards):
        self.t = run.training
        self.online, self.target, self.head = (self.t.pair.online, self.t.pair.target, self.t.memories["head"].net)
        visible = choose_visible_labels(shards.labels, 0.3, 0)
        self.label = {i: int(shards.labels[i]) for i in np.flatnonzero(visible)}
        self.bank, self.group = list(self.t.bank.all_rows("key").clone()), [-1] * SIZE
        self.cache, self.pointer, self.moment = {}, 0, {}
        self.predicted = self.uncertain = 0

    def train_head(self, step):
        known = sorted(self.cache)
        rows, label = torch.stack([self.cache[i] for i in known]), torch.tensor([self.label[i] for i in known])
        moments = [torch.zeros_like(p) for p in self.head.parameters()]
        self.head.train()
        for epoch in range(6):
            order = rng.permutation(rng.key(0, "pseudo", step, epoch), len(known))
            for first in range(0, len(known), 5):
                some = torch.from_numpy(order[first : first + 5].copy())
                if len(some) < 2:
                    continue
                self.head.zero_grad()
                F.cross_entropy(self.head(rows[some]), label[some]).backward()
                with torch.no_grad():
                    for p, m in zip(self.head.parameters(), moments, strict=True):
                        m.mul_(0.9).add_(p.grad + 1e-4 * p)
                        p -= 0.2 * m
        self.head.eval()

    def step(self, batch):
        t, index = self.t, batch.index.tolist()
        if t.step:  # an epoch has two steps, and the head is fitted twice in it
            self.train_head(t.step)
        query, target = t.images(batch)
        with torch.no_grad():
            for slow, (name, p) in zip(self.target.parameters(), self.online.named_parameters(), strict=False):
                assert "predictor" not in name
                slow.copy_(0.9 * slow + 0.1 * p)
            z = F.normalize(self.target.projector(self.target.backbone(target)), dim=1)
            confidence, label = self.head(z).softmax(1).max(1)
        group = [
            self.label.get(i, int(g) if s >= 0.7 else -1) for i, g, s in zip(index, label, confidence, strict=True)
        ]
        self.predicted += sum(g >= 0 and i not in self.label for i, g in zip(index, group, strict=True))
        self.uncertain += sum(g < 0 for g in group)
        for row, own in zip(z, group, strict=True):
            self.bank[self.pointer], self.group[self.pointer] = row, own
            self.pointer = (self.pointer + 1) % SIZE
        v = F.normalize(self.online.predictor(self.online.projector(self.online.backbone(query))), dim=1)
        everything, losses = torch.stack(self.bank), []
        for i, own in enumerate(group):
            near = ((z[i] - everything) ** 2).sum(1).argsort().tolist()
            chosen = [j for j in near if own < 0 or self.group[j] == own][:K]
            losses.append(((v[i] - everything[chosen]) ** 2).sum(1).mean())
        for i, row in zip(index, z, strict=True):
            if i in self.label:
                self.cache[i] = row
        loss = torch.stack(losses).mean()
        self.online.zero_grad()
        loss.backward()
        lr, _ = t.set_rates()
        t.step += 1
        with torch.no_grad():
            for name, p in self.online.named_parameters():
                self.moment[name] = 0.9 * self.moment.get(name, 0) + p.grad + 1e-4 * p
                p -= lr * self.moment[name]
        for layer in t.norms:
            layer.pending.clear()
        return float(loss.detach())


def test_step_by_step_against_a_literal_script(small_training, shards):
    overrides = [f"method.k={K}", HEAD]
    ours, theirs = (
        small_training("digits_cmsf_semi", overrides),
        LiteralSemiSupervised(small_training("digits_cmsf_semi", overrides), shards),
    )
    for step in range(STEPS):
        batch = ours.batch(step)
        loss = float(ours.step(batch).scalars["loss"])
        assert loss == pytest.approx(theirs.step(batch), abs=of_step(step + 1)), f"step {step}"
    assert theirs.predicted > 20 and theirs.uncertain > 20, "too few pseudo-labels above or below the threshold"
    for actual, expected in zip(ours.training.pair.online.parameters(), theirs.online.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=of_step(STEPS))
    assert ours.training.bank.all_rows("group").tolist() == theirs.group
    torch.testing.assert_close(
        ours.training.bank.all_rows("key"), torch.stack(theirs.bank), rtol=0, atol=of_step(STEPS)
    )
    for actual, expected in zip(ours.training.memories["head"].net.parameters(), theirs.head.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=of_step(STEPS))


def take_losses(run, steps=6):
    return [float(run.step(run.batch(step)).scalars["loss"]) for step in range(steps)]


def test_with_all_labels_it_is_cmsf_sup(small_training):
    semi = small_training("digits_cmsf_semi", ["method.k=10", "method.pseudo_labels.labeled_fraction=1.0"])
    assert take_losses(semi) == pytest.approx(
        take_losses(small_training("digits_cmsf_sup", ["method.k=10"])), abs=of_step(6)
    )


def test_without_labels_and_pseudo_labels_it_is_msf(small_training, monkeypatch):
    semi = small_training("digits_cmsf_semi", ["method.pseudo_labels.threshold=1.0"])
    labeled = semi.training.memories["labeled"]
    monkeypatch.setattr(labeled, "is_visible", lambda index: torch.zeros_like(index, dtype=torch.bool))
    assert take_losses(semi) == pytest.approx(take_losses(small_training("digits_msf", ["method.k=5"])), abs=of_step(6))


def test_a_repeated_step_fits_the_head_once(small_training):
    steady, disturbed = (small_training("digits_cmsf_semi", [HEAD]) for _ in range(2))
    for step in range(3):
        steady.step(steady.batch(step))
        batch = disturbed.batch(step)
        assert disturbed.step(replace(batch, complete=False)).abandoned and disturbed.training.step == step
        for memory in disturbed.training.memories.values():  # as if the run had stopped here and resumed
            parts, numbers = memory.state()
            kept = {name: part.tensor.clone() for name, part in parts.items()}
            memory.load(numbers, lambda name, start, stop, kept=kept: kept[name][start:stop])
        disturbed.step(batch)
    assert steady.training.memories["head"].state()[1] == {"trained": 2}
    repeated = disturbed.snapshot()
    assert all(torch.equal(tensor, repeated[name]) for name, tensor in steady.snapshot().items())


@pytest.mark.parametrize("share,expected", [(0.1, [5, 3]), (1.0, [50, 30]), (0.001, [1, 1])])
def test_visible_labels_are_a_share_of_every_class(share, expected):
    labels = np.array([0] * 50 + [1] * 30 + [-1] * 20)
    visible = choose_visible_labels(labels, share, 7)
    assert [int((visible & (labels == c)).sum()) for c in (0, 1)] == expected and not visible[labels < 0].any()
    assert (choose_visible_labels(labels, share, 7) == visible).all()
    assert share == 1.0 or (choose_visible_labels(labels, share, 8) != visible).any()
