"""SimSiam, MoCo v2, SimCLR, NNCLR and NNSiam step by step beside plain scripts, each written from its official code or
pseudo-code: forward passes, bank as a list, losses on whole matrices, SGD by hand. Float64, 20 steps, batches of 16."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.train import recipe

STEPS = 20


class Script:
    """What the scripts share: networks, the bank as a list of rows, SGD with momentum and weight decay."""

    def __init__(self, made, constant=False, ema=None):
        self.t, self.constant, self.ema = made.training, constant, ema
        self.f, self.slow = self.t.pair.online, self.t.pair.target
        self.bank, self.pointer = list(self.t.bank.everything("key").clone()) if self.t.bank else [], 0
        self.moment = {name: torch.zeros_like(p) for name, p in self.f.named_parameters()}

    def raw(self, x):
        """Projection and prediction as the heads give them, of any length."""
        z = self.f.projector(self.f.backbone(x))
        return z, self.f.predictor(z) if self.f.predictor is not None else z

    def keys(self, x):
        with torch.no_grad():
            return F.normalize(self.slow.projector(self.slow.backbone(x)), dim=1)

    def nearest(self, z):
        """The row of the bank at the least distance, by the whole matrix of distances."""
        everything = torch.stack(self.bank)
        return everything[torch.cdist(F.normalize(z.detach(), dim=1), everything).argmin(1)]

    def enqueue(self, rows):
        for row in rows:
            self.bank[self.pointer] = row
            self.pointer = (self.pointer + 1) % len(self.bank)

    def step(self, batch):
        if self.ema is not None:  # official order: the slow network moves first, by the weights of the step before
            with torch.no_grad():
                for slow, p in zip(self.slow.parameters(), self.f.parameters(), strict=False):
                    slow.copy_(self.ema * slow + (1 - self.ema) * p)
        loss, fresh = self.loss(*self.t.images(batch))
        self.f.zero_grad()
        loss.backward()
        lr, _ = self.t.set_rates()
        self.t.step += 1
        with torch.no_grad():
            for name, p in self.f.named_parameters():
                if p.grad is None:
                    continue
                self.moment[name] = 0.9 * self.moment[name] + p.grad + 1e-4 * p
                p -= (0.1 if self.constant and name.startswith("predictor.") else lr) * self.moment[name]
        self.enqueue(fresh)
        for layer in self.t.norms:
            layer.pending.clear()
        return float(loss.detach())


class SimSiamScript(Script):
    def loss(self, x1, x2):
        (z1, p1), (z2, p2) = self.raw(x1), self.raw(x2)
        return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) * 0.5, []


class NnsiamScript(Script):
    def loss(self, x1, x2):
        (z1, p1), (z2, p2) = self.raw(x1), self.raw(x2)
        loss = -F.cosine_similarity(p1, self.nearest(z2)).mean() / 2
        return loss - F.cosine_similarity(p2, self.nearest(z1)).mean() / 2, F.normalize(z1.detach(), dim=1)


class MocoScript(Script):
    def one(self, q, k):
        logits = torch.cat(((q * k).sum(1, keepdim=True), q @ torch.stack(self.bank).T), 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))

    def loss(self, query, key):
        k = self.keys(key)
        return self.one(F.normalize(self.raw(query)[0], dim=1), k), k


class MocoSymmetricScript(MocoScript):
    def loss(self, x1, x2):
        k1, k2 = self.keys(x1), self.keys(x2)
        q1, q2 = (F.normalize(self.raw(x)[0], dim=1) for x in (x1, x2))
        return self.one(q1, k2) + self.one(q2, k1), torch.cat((k1, k2))


class SimClrScript(Script):
    """The official objective: logits of view a against b and against a itself less a large number on the diagonal."""

    def loss(self, x1, x2):
        a, b = (F.normalize(self.raw(x)[0], dim=1) for x in (x1, x2))
        own, label = 1e9 * torch.eye(len(a), dtype=a.dtype), torch.arange(len(a))
        loss_a = F.cross_entropy(torch.cat((a @ b.T, a @ a.T - own), 1) / 0.2, label)
        loss_b = F.cross_entropy(torch.cat((b @ a.T, b @ b.T - own), 1) / 0.2, label)
        return loss_a + loss_b, []


class NnclrScript(Script):
    """Algorithm 1 of the paper, line by line."""

    def one(self, nn, p):
        logits = F.normalize(nn, dim=1) @ F.normalize(p, dim=1).T / 0.2
        return F.cross_entropy(logits, torch.arange(len(p)))

    def loss(self, x1, x2):
        (z1, p1), (z2, p2) = self.raw(x1), self.raw(x2)
        nn1, nn2 = self.nearest(z1), self.nearest(z2)
        return self.one(nn1, p2) / 2 + self.one(nn2, p1) / 2, F.normalize(z1.detach(), dim=1)


class NnclrTextScript(NnclrScript):
    """Section 3.2: one direction, and the softmax over the columns of the same matrix added."""

    def loss(self, x1, x2):
        (_, p1), (z2, _) = self.raw(x1), self.raw(x2)
        logits = self.nearest(z2) @ F.normalize(p1, dim=1).T / 0.2
        label = torch.arange(len(p1))
        return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)), F.normalize(z2.detach(), dim=1)


class NnclrMomentumScript(NnclrScript):
    def loss(self, x1, x2):
        k1, k2 = self.keys(x1), self.keys(x2)
        return self.one(self.nearest(k1), self.raw(x2)[1]) / 2 + self.one(self.nearest(k2), self.raw(x1)[1]) / 2, k1


class NnclrBothNegativesScript(NnclrScript):
    """NT-Xent between nn and p: every row of the 2n against all others, as lightly has it."""

    def one(self, nn, p):
        rows = F.normalize(torch.cat((nn, p)), dim=1)
        logits = (rows @ rows.T / 0.2).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(rows)).roll(len(nn)))


EMA = "method.ema={momentum: 0.9, shape: constant}"
RANDOM = "bank.start=random"
SCRIPTS = {
    "simsiam": ("digits_simsiam", [], lambda m: SimSiamScript(m, constant=True)),
    "simsiam-one-rate": ("digits_simsiam", ["method.fix_predictor_lr=false"], SimSiamScript),
    "nnsiam": ("digits_nnsiam", [], lambda m: NnsiamScript(m, constant=True)),
    "moco": ("digits_moco_v2", [RANDOM, EMA], lambda m: MocoScript(m, ema=0.9)),
    "moco-symmetric": ("digits_moco_v2", [RANDOM, EMA, "method.symmetric=true"],
                       lambda m: MocoSymmetricScript(m, ema=0.9)),
    "simclr": ("digits_simclr", ["method.reduction=sum"], SimClrScript),
    "nnclr": ("digits_nnclr", [], NnclrScript),
    "nnclr-text": ("digits_nnclr", ["method.contrast=columns", "method.symmetric=false"], NnclrTextScript),
    "nnclr-momentum": ("digits_nnclr", ["method.momentum_encoder=true", EMA],
                       lambda m: NnclrMomentumScript(m, ema=0.9)),
    "nnclr-nt_xent": ("digits_nnclr", ["method.contrast=nt_xent", "method.predictor=false"], NnclrBothNegativesScript),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_step_by_step_against_a_plain_script(small_training, case):
    name, overrides, script = SCRIPTS[case]
    overrides = ["views.size=8", *overrides]
    ours, theirs = small_training(name, overrides), script(small_training(name, overrides))
    losses = []
    for step in range(STEPS):
        batch = ours.batch(step)
        losses.append(float(ours.step(batch).scalars["loss"]))
        assert losses[-1] == pytest.approx(theirs.step(batch), abs=1e-9)
    assert max(losses) - min(losses) > 0.05, "a run that does not move proves nothing"
    for mine, his in zip(ours.training.pair.online.parameters(), theirs.f.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=0, atol=1e-8)
    if ours.training.bank is not None:
        assert ours.training.bank.pointer == theirs.pointer
        torch.testing.assert_close(ours.training.bank.everything("key"), torch.stack(theirs.bank), rtol=0, atol=1e-8)


def same(small_training, one, other, steps=10):
    """Both runs, after the same batches, with equal losses and equal online networks."""
    first, second = small_training(*one), small_training(*other)
    for step in range(steps):
        batch = first.batch(step)
        assert float(first.step(batch).scalars["loss"]) == pytest.approx(float(second.step(batch).scalars["loss"]),
                                                                         abs=1e-12)
    for a, b in zip(first.training.pair.online.parameters(), second.training.pair.online.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    return first, second


def test_nnsiam_towards_the_view_itself_is_simsiam(small_training):
    made, _ = same(small_training, ("digits_nnsiam", ["method.neighbours.rule=self"]), ("digits_simsiam", []))
    assert made.training.bank is None


def test_the_mean_over_views_is_half_their_sum(small_training):
    added, mean = (small_training("digits_simclr", [f"method.reduction={r}"]) for r in ("sum", "mean"))
    batch = added.batch(0)
    assert float(added.step(batch).scalars["loss"]) == pytest.approx(2 * float(mean.step(batch).scalars["loss"]))


@pytest.mark.parametrize("name", ["moco_v2", "simsiam", "nnsiam"])
def test_micro_batches_are_the_whole_batch(small_training, name):
    """Also where targets come from the queries' own pass."""
    ghost = ["model.norm=ghost", "model.norm_group=4"]
    same(small_training, (f"digits_{name}", ghost), (f"digits_{name}", [*ghost, "machine.accumulate=2"]), steps=5)


@pytest.mark.parametrize("name", [name for name in recipe.names() if name.startswith("digits_")
                                  and not name.endswith("bsim")])
def test_bf16_stays_beside_fp32(small_training, name):
    """At a small rate, so that rounding is not amplified: what is compared is the arithmetic, not two trajectories."""
    runs = [small_training(name, ["views.size=8", "optim.lr=0.001", f"optim.precision={p}"]) for p in ("fp32", "bf16")]
    precise, coarse = torch.tensor([[float(made.step(made.batch(step)).scalars["loss"]) for step in range(50)]
                                    for made in runs])
    difference = precise - coarse
    losses = 2 if name == "digits_cmsf_cross" else 1  # one of each modality, added
    assert difference[0].abs() < 0.03 and difference.abs().max() < 0.4 * losses
    assert difference[-10:].mean().abs() < 0.05 * losses
    assert (difference != 0).any(), "autocast did nothing"
    assert all(p.dtype == torch.float32 for p in runs[1].training.pair.online.parameters())
