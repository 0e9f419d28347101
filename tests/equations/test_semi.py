"""Semi-supervised CMSF beside a literal script, and its limits: all labels make it CMSF-sup, no trust makes it MSF."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.memory.pseudo import visible

SIZE, STEPS, K = 48, 24, 4  # 40 images of two classes, 2 steps of 16 per epoch
HEAD = "method.pseudo={labelled: 0.3, threshold: 0.7, hidden: 8, batch: 5, epochs: 6, lr: 0.2, per_epoch: 2}"


class Literal:
    """Forward, guess, push with the guessed class, search all distances, SGD; the head trained on cached embeddings."""

    def __init__(self, made, shards):
        self.t = made.training
        self.online, self.target, self.head = (self.t.pair.online, self.t.pair.target,
                                               self.t.memories["head"].net)
        seen = visible(shards.labels, 0.3, 0)
        self.label = {i: int(shards.labels[i]) for i in np.flatnonzero(seen)}
        self.bank, self.group = list(self.t.bank.everything("key").clone()), [-1] * SIZE
        self.cache, self.pointer, self.moment = {}, 0, {}
        self.guessed = self.unsure = 0

    def train_head(self, step):
        known = sorted(self.cache)
        rows, label = torch.stack([self.cache[i] for i in known]), torch.tensor([self.label[i] for i in known])
        moments = [torch.zeros_like(p) for p in self.head.parameters()]
        self.head.train()
        for epoch in range(6):
            order = rng.permutation(rng.key(0, "pseudo", step, epoch), len(known))
            for first in range(0, len(known), 5):
                some = torch.from_numpy(order[first:first + 5].copy())
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
        if t.step:  # two steps make an epoch, and the head is trained twice in it
            self.train_head(t.step)
        query, target = t.images(batch)
        with torch.no_grad():
            for slow, (name, p) in zip(self.target.parameters(), self.online.named_parameters(), strict=False):
                assert "predictor" not in name
                slow.copy_(0.9 * slow + 0.1 * p)
            z = F.normalize(self.target.projector(self.target.backbone(target)), dim=1)
            sure, guess = self.head(z).softmax(1).max(1)
        group = [self.label.get(i, int(g) if s >= 0.7 else -1) for i, g, s in zip(index, guess, sure, strict=True)]
        self.guessed += sum(g >= 0 and i not in self.label for i, g in zip(index, group, strict=True))
        self.unsure += sum(g < 0 for g in group)
        for row, own in zip(z, group, strict=True):
            self.bank[self.pointer], self.group[self.pointer] = row, own
            self.pointer = (self.pointer + 1) % SIZE
        v = F.normalize(self.online.predictor(self.online.projector(self.online.backbone(query))), dim=1)
        everything, losses = torch.stack(self.bank), []
        for i, own in enumerate(group):
            near = ((z[i] - everything) ** 2).sum(1).argsort().tolist()
            take = [j for j in near if own < 0 or self.group[j] == own][:K]
            losses.append(((v[i] - everything[take]) ** 2).sum(1).mean())
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
    ours, theirs = small_training("digits_cmsf_semi", overrides), Literal(
        small_training("digits_cmsf_semi", overrides), shards)
    for step in range(STEPS):
        batch = ours.batch(step)
        assert float(ours.step(batch).scalars["loss"]) == pytest.approx(theirs.step(batch), abs=1e-8), f"step {step}"
    assert theirs.guessed > 20 and theirs.unsure > 20, "guesses that count, and ones that do not, must both have come"
    for mine, his in zip(ours.training.pair.online.parameters(), theirs.online.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=0, atol=1e-8)
    assert ours.training.bank.everything("group").tolist() == theirs.group
    torch.testing.assert_close(ours.training.bank.everything("key"), torch.stack(theirs.bank), rtol=0, atol=1e-8)
    for mine, his in zip(ours.training.memories["head"].net.parameters(), theirs.head.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=0, atol=1e-8)


def losses(made, steps=6):
    return [float(made.step(made.batch(step)).scalars["loss"]) for step in range(steps)]


def test_all_labels_make_it_cmsf_sup(small_training):
    semi = small_training("digits_cmsf_semi", ["method.k=10", "method.pseudo.labelled=1.0"])
    assert losses(semi) == pytest.approx(losses(small_training("digits_cmsf_sup", ["method.k=10"])), abs=1e-12)


def test_no_trust_and_hardly_a_label_make_it_msf(small_training, monkeypatch):
    semi = small_training("digits_cmsf_semi", ["method.pseudo.threshold=1.0"])
    labelled = semi.training.memories["labelled"]
    monkeypatch.setattr(labelled, "seen", lambda index: torch.zeros_like(index, dtype=torch.bool))
    assert losses(semi) == pytest.approx(losses(small_training("digits_msf", ["method.k=5"])), abs=1e-12)


def test_a_step_that_was_given_up_and_taken_anew_teaches_the_head_once(small_training):
    still, disturbed = (small_training("digits_cmsf_semi", [HEAD]) for _ in range(2))
    for step in range(3):
        still.step(still.batch(step))
        batch = disturbed.batch(step)
        assert disturbed.step(replace(batch, whole=False)).void and disturbed.training.step == step
        for memory in disturbed.training.memories.values():  # as if the run had been stopped there and resumed
            parts, numbers = memory.state()
            kept = {name: part.tensor.clone() for name, part in parts.items()}
            memory.load(numbers, lambda name, start, stop, kept=kept: kept[name][start:stop])
        disturbed.step(batch)
    assert still.training.memories["head"].state()[1] == {"trained": 2}
    theirs = disturbed.snapshot()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in still.snapshot().items())


@pytest.mark.parametrize("share,expected", [(0.1, [5, 3]), (1.0, [50, 30]), (0.001, [1, 1])])
def test_which_labels_may_be_seen(share, expected):
    labels = np.array([0] * 50 + [1] * 30 + [-1] * 20)
    seen = visible(labels, share, 7)
    assert [int((seen & (labels == c)).sum()) for c in (0, 1)] == expected and not seen[labels < 0].any()
    assert (visible(labels, share, 7) == seen).all()
    assert share == 1.0 or (visible(labels, share, 8) != seen).any()
