"""SimSiam, MoCo v2, SimCLR, NNCLR and NNSiam against plain scripts, step by step in float64.

Each script follows the official code or pseudo-code: forward passes, the bank as a list, losses on whole matrices, SGD
by hand; 20 steps with batches of 16.
"""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.memory.bank import Bank
from hpcssl.train import recipe
from tests.tolerances import of_step, rounding

STEPS = 20


class Script:
    """Common parts of the scripts: networks, the bank as a list of rows, SGD with momentum and weight decay."""

    def __init__(self, run, constant=False, ema=None):
        self.t, self.constant, self.ema = run.training, constant, ema
        self.f, self.slow = self.t.pair.online, self.t.pair.target
        self.bank, self.pointer = list(self.t.bank.all_rows("key").clone()) if self.t.bank else [], 0
        self.moment = {name: torch.zeros_like(p) for name, p in self.f.named_parameters()}

    def raw(self, x):
        """Projection and prediction, not normalized."""
        z = self.f.projector(self.f.backbone(x))
        return z, self.f.predictor(z) if self.f.predictor is not None else z

    def keys(self, x):
        with torch.no_grad():
            return F.normalize(self.slow.projector(self.slow.backbone(x)), dim=1)

    def nearest(self, z):
        """The row of the bank with the smallest distance, by the whole matrix of distances."""
        everything = torch.stack(self.bank)
        return everything[torch.cdist(F.normalize(z.detach(), dim=1), everything).argmin(1)]

    def enqueue(self, rows):
        for row in rows:
            self.bank[self.pointer] = row
            self.pointer = (self.pointer + 1) % len(self.bank)

    def step(self, batch):
        if (
            self.ema is not None
        ):  # official order: the target is updated first, with the weights after the previous step
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


class SimclrScript(Script):
    """The official objective: logits of view a against b, and of a against a minus a large number on the diagonal."""

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
    """NT-Xent between nn and p: every one of the 2n rows against all others, as in lightly."""

    def one(self, nn, p):
        rows = F.normalize(torch.cat((nn, p)), dim=1)
        logits = (rows @ rows.T / 0.2).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(rows)).roll(len(nn)))


EMA = "method.ema={momentum: 0.9, shape: constant}"
RANDOM = "bank.init=random"
SCRIPTS = {
    "simsiam": ("digits_simsiam", [], lambda m: SimSiamScript(m, constant=True)),
    "simsiam-one-rate": ("digits_simsiam", ["method.fix_predictor_lr=false"], SimSiamScript),
    "nnsiam": ("digits_nnsiam", [], lambda m: NnsiamScript(m, constant=True)),
    "moco": ("digits_moco_v2", [RANDOM, EMA], lambda m: MocoScript(m, ema=0.9)),
    "moco-symmetric": (
        "digits_moco_v2",
        [RANDOM, EMA, "method.symmetric=true"],
        lambda m: MocoSymmetricScript(m, ema=0.9),
    ),
    "simclr": ("digits_simclr", ["method.reduction=sum"], SimclrScript),
    "nnclr": ("digits_nnclr", [], NnclrScript),
    "nnclr-text": ("digits_nnclr", ["method.contrast=columns", "method.symmetric=false"], NnclrTextScript),
    "nnclr-momentum": (
        "digits_nnclr",
        ["method.momentum_encoder=true", EMA],
        lambda m: NnclrMomentumScript(m, ema=0.9),
    ),
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
        expected = theirs.step(batch)
        assert losses[-1] == pytest.approx(expected, abs=of_step(step + 1, scale=max(1, abs(expected))))
    assert max(losses) - min(losses) > 0.05, "the loss does not change, so equal losses prove nothing"
    for actual, expected in zip(ours.training.pair.online.parameters(), theirs.f.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=of_step(STEPS))
    if ours.training.bank is not None:
        assert ours.training.bank.pointer == theirs.pointer
        torch.testing.assert_close(
            ours.training.bank.all_rows("key"), torch.stack(theirs.bank), rtol=0, atol=of_step(STEPS)
        )


def compare_runs(small_training, one, other, steps=10):
    """Train two recipes on the same batches and compare their losses and online networks.

    Returns:
        Both runs.
    """
    first, second = small_training(*one), small_training(*other)
    for step in range(steps):
        batch = first.batch(step)
        expected = float(second.step(batch).scalars["loss"])
        assert float(first.step(batch).scalars["loss"]) == pytest.approx(expected, abs=of_step(step + 1))
    for a, b in zip(first.training.pair.online.parameters(), second.training.pair.online.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=of_step(steps))
    return first, second


def test_nnsiam_with_the_view_itself_as_neighbor_is_simsiam(small_training):
    run, _ = compare_runs(small_training, ("digits_nnsiam", ["method.neighbors.rule=self"]), ("digits_simsiam", []))
    assert run.training.bank is None


def test_the_mean_over_views_is_half_their_sum(small_training):
    added, mean = (small_training("digits_simclr", [f"method.reduction={r}"]) for r in ("sum", "mean"))
    batch = added.batch(0)
    assert float(added.step(batch).scalars["loss"]) == pytest.approx(
        2 * float(mean.step(batch).scalars["loss"]), abs=of_step(1)
    )


@pytest.mark.parametrize("name", ["moco_v2", "simsiam", "nnsiam"])
def test_micro_batches_equal_the_whole_batch(small_training, name):
    """This holds also for methods whose targets come from the forward pass of the queries.

    The groups have 8 samples, a whole micro-batch. Statistics over 4 samples make the network so sensitive that a
    relative perturbation of the parameters changes the loss of NNSiam's sixth step by 30,000 times its size (with 8
    samples: 5 times), and rounding with it. ``test_methods.py`` covers several groups in a micro-batch.
    """
    ghost = ["model.norm=ghost", "model.norm_group_size=8"]
    compare_runs(
        small_training, (f"digits_{name}", ghost), (f"digits_{name}", [*ghost, "machine.accumulation_steps=2"]), steps=5
    )


class RecordedSearches:
    """Record the slots that all searches of banks return during a test."""

    def __init__(self, monkeypatch):
        self.slots = []
        for name in ("nearest", "rerank"):
            monkeypatch.setattr(Bank, name, self._recorded(getattr(Bank, name)))

    def _recorded(self, search):
        def call(*arguments, **options):
            neighbors = search(*arguments, **options)
            self.slots.append(neighbors.slot.sort(1).values)
            return neighbors

        return call

    def take(self):
        """Return the slots since the last call."""
        slots, self.slots = self.slots, []
        return slots


@pytest.mark.parametrize(
    "name", [name for name in recipe.names() if name.startswith("digits_") and not name.endswith("bsim")]
)
def test_bf16_stays_close_to_fp32(small_training, monkeypatch, name):
    """Each step starts from one state, so that the test compares the arithmetic and not two diverged trajectories.

    The bound scales with the range of the loss: 4 for squared distances and 2 for cosines of unit vectors, 2 / tau for
    logarithms of a softmax, each times the number of losses that are added. About 40 roundings to bfloat16 lie on the
    path to an embedding: the inputs, weights and results of 14 matrix products. The error of an inner product of two
    unit vectors of 64 numbers averages over these numbers, and that of the loss over the 16 rows, which leaves 1 / 32.

    A row for which rounding changes the neighbors may change its share of the loss, 1 / 16, by up to the whole range.
    """
    precise, coarse = (small_training(name, ["views.size=8", f"optim.precision={p}"]) for p in ("fp32", "bf16"))
    scale, searches, differences = loss_range(precise.training), RecordedSearches(monkeypatch), []
    for step in range(20):
        state = precise.training.state().tensors
        for key, shard in coarse.training.state().tensors.items():
            shard.tensor.copy_(state[key].tensor)
        batch = precise.batch(step)
        losses, slots = [], []
        for run in (precise, coarse):
            losses.append(float(run.step(batch).scalars["loss"]))
            slots.append(searches.take())
        moved = [(one != other).any(1) for one, other in zip(*slots, strict=True)]
        changed = int(torch.stack(moved).any(0).sum()) if moved else 0
        differences.append(losses[0] - losses[1])
        bound = rounding(torch.bfloat16, 40, scale=scale / (16 * 64) ** 0.5) + scale * changed / 16
        assert abs(differences[-1]) < bound, f"step {step}, {changed} rows with other neighbors"
    assert any(differences), "autocast did nothing"
    assert all(p.dtype == torch.float32 for p in coarse.training.pair.online.parameters())


def loss_range(training):
    """Return by how much the loss of a method can vary at most, given unit vectors."""
    options = training.recipe.method
    if options.name in ("simsiam", "nnsiam"):
        return 2.0
    if options.name in ("moco", "simclr", "nnclr", "swav"):
        return 2 / options.temperature
    shares = sum(term.share for term in training.plan.terms)  # BYOL adds both directions, CMSF-cross both modalities
    return 4.0 * shares
