"""MSF and BYOL against slow literal versions, and against each other where the papers say that they meet."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.methods import equations


def unit(*shape, at):
    return F.normalize(torch.randn(shape, generator=rng.generator(rng.key(0, at)), dtype=torch.float64), dim=-1)


def test_regression_is_the_squared_distance_of_unit_vectors():
    u, v = unit(7, 5, at="u"), unit(7, 5, at="v")
    literal = [sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(u, v, strict=True)]
    np.testing.assert_allclose(equations.regression(u, v).numpy(), literal, atol=1e-14)


def test_mean_shift_is_the_mean_over_valid_neighbours():
    u, z = unit(4, 5, at="u"), unit(4, 3, 5, at="z")
    valid = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    for row, loss in enumerate(equations.mean_shift(u, z, valid)):
        distances = [float(((u[row] - z[row, j]) ** 2).sum()) for j in range(3) if valid[row, j]]
        assert float(loss) == pytest.approx(np.mean(distances) if distances else 0.0, abs=1e-14)


def test_mean_shift_pulls_towards_the_mean_of_the_neighbours():
    """The gradient of the loss at u is −2 times the mean of the valid rows: closed form."""
    u, z = unit(4, 5, at="u").requires_grad_(), unit(4, 3, 5, at="z")
    valid = torch.ones(4, 3, dtype=torch.bool)
    equations.mean_shift(u, z, valid).sum().backward()
    torch.testing.assert_close(u.grad, -2 * z.mean(1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [1, 5])
def test_msf_step_by_step_against_a_literal_script(small_training, k):
    """50 steps of train_step beside a plain script: forward, bank as a list, full distance matrix, SGD, EMA."""
    ours = small_training("digits_msf", [f"method.k={k}", "bank.size=48"])
    theirs = LiteralMsf(small_training("digits_msf", [f"method.k={k}", "bank.size=48"]), k)
    for step in range(50):
        batch = ours.batch(step)
        loss = ours.step(batch).scalars["loss"]
        assert float(loss) == pytest.approx(theirs.step(batch), abs=1e-10)
    for mine, his in zip(ours.training.pair.online.parameters(), theirs.online.parameters(), strict=True):
        torch.testing.assert_close(mine, his, rtol=0, atol=1e-8)
    torch.testing.assert_close(ours.training.bank.get("key", torch.arange(48)), torch.stack(theirs.bank), rtol=0,
                               atol=1e-8)


class LiteralMsf:
    """The official script's order of things, written out: EMA first, push, then search over everything."""

    def __init__(self, made, k):
        self.k, self.t = k, made.training
        self.online, self.target = self.t.pair.online, self.t.pair.target
        self.bank = list(self.t.bank.get("key", torch.arange(48)).clone())
        self.pointer = 0
        self.momentum = {name: None for name, _ in self.online.named_parameters()}

    def step(self, batch):
        t, pairs = self.t, dict(self.target.named_parameters())
        query, target = t.images(batch)
        with torch.no_grad():
            for name, p in self.online.named_parameters():
                if name in pairs:
                    pairs[name].copy_(0.9 * pairs[name] + (1 - 0.9) * p)
            z = F.normalize(self.target.projector(self.target.backbone(target)), dim=1)
        for row in z:
            self.bank[self.pointer] = row
            self.pointer = (self.pointer + 1) % 48
        everything = torch.stack(self.bank)
        v = F.normalize(self.online.predictor(self.online.projector(self.online.backbone(query))), dim=1)
        distance_t, distance_q = 2 - 2 * z @ everything.T, 2 - 2 * v @ everything.T
        nearest = distance_t.topk(self.k, dim=1, largest=False).indices
        loss = distance_q.gather(1, nearest).sum(1).mean() / self.k
        self.online.zero_grad()
        loss.backward()
        lr, _ = t.set_rates()
        t.step += 1
        with torch.no_grad():
            for name, p in self.online.named_parameters():
                g = p.grad + 1e-4 * p
                self.momentum[name] = g if self.momentum[name] is None else 0.9 * self.momentum[name] + g
                p -= lr * self.momentum[name]
        for layer in t.norms:
            layer.pending.clear()
        return float(loss.detach())


def test_msf_with_one_neighbour_is_asymmetric_byol(small_training):
    """k = 1 and the image's own row in the bank: the same losses and the same parameters, bit for bit."""
    ema = "method.ema={momentum: 0.9, shape: constant}"
    msf = small_training("digits_msf", ["method.k=1", ema])
    byol = small_training("digits_byol", ["method.symmetric=false", ema])
    for step in range(20):
        batch = msf.batch(step)
        assert float(msf.step(batch).scalars["loss"]) == pytest.approx(
            float(byol.step(batch).scalars["loss"]), abs=1e-12)
    for one, other in zip(msf.training.pair.parameters(), byol.training.pair.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_msf_with_more_neighbours_is_another_method(small_training):
    msf, five = small_training("digits_msf", ["method.k=1"]), small_training("digits_msf", ["method.k=5"])
    batch = msf.batch(0)
    assert abs(float(five.step(batch).scalars["loss"]) - float(msf.step(batch).scalars["loss"])) > 1e-3


def test_byol_is_the_sum_of_both_directions(small_training):
    """The symmetric loss of a step is the sum of the two one-way losses of the same networks."""
    both = small_training("digits_byol", [])
    pair = both.training.pair
    first, second = both.training.images(both.batch(0))
    (_, u1), (_, u2) = pair.embed([first, second])
    z1, z2 = pair.embed_target([first, second])
    literal = ((u1 - z2) ** 2).sum(1).mean() + ((u2 - z1) ** 2).sum(1).mean()
    assert float(both.step(both.batch(0)).scalars["loss"]) == pytest.approx(float(literal.detach()), abs=1e-12)


def test_accumulation_is_the_whole_batch(small_training):
    """Groups of 4 in micro-batches of 8: the same statistics, gradients and bank as one batch of 16."""
    ghost = ["model.norm=ghost", "model.norm_group=4"]
    whole = small_training("digits_msf", ghost)
    parts = small_training("digits_msf", [*ghost, "machine.accumulate=2"])
    for step in range(5):
        batch = whole.batch(step)
        assert float(whole.step(batch).scalars["loss"]) == pytest.approx(
            float(parts.step(batch).scalars["loss"]), abs=1e-11)
    ours, theirs = parts.snapshot(), whole.snapshot()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_leaves_no_trace(small_training, what):
    """Parameters, target, bank, momentum and statistics stay bit for bit; the run goes on with the next batch."""
    made = small_training("digits_msf", [])
    made.step(made.batch(0))
    before = made.snapshot()
    images = made.training.images
    if what == "loss":
        made.training.images = lambda batch: [x * float("nan") for x in images(batch)]
    else:
        hook = next(made.training.pair.online.parameters()).register_hook(lambda grad: grad * float("inf"))
    report = made.step(made.batch(1))
    assert not report.taken and made.training.skipped_in_a_row == 1
    assert report.why == ("the loss or a target was not finite on rank 0" if what == "loss" else
                          "a gradient was not finite, with a finite loss")
    after = made.snapshot()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    made.training.images = images
    if what == "gradient":
        hook.remove()
    report = made.step(made.batch(2))
    assert report.taken and made.training.skipped_in_a_row == 0


def test_bf16_stays_beside_fp32(small_training):
    precise = small_training("digits_msf", ["optim.precision=fp32"])
    coarse = small_training("digits_msf", ["optim.precision=bf16"])
    pairs = [(float(precise.step(b).scalars["loss"]), float(coarse.step(b).scalars["loss"]))
             for b in map(precise.batch, range(50))]
    assert all(p.dtype == torch.float32 for p in coarse.training.pair.parameters())
    a, b = np.array(pairs).T
    assert np.isfinite(b).all() and np.abs(a - b)[:10].max() < 0.1  # later on rounding changes neighbours
    assert b[-10:].mean() < b[0] - 0.5
    assert (a != b).any(), "autocast did nothing"


def test_purity_counts_other_images_of_the_same_label(small_training):
    made = small_training("digits_msf", ["method.k=3", "bank.start=empty", "bank.size=64"])
    scalars = [made.step(made.batch(step)).scalars for step in range(4)]
    bank, t = made.training.bank, made.training
    batch = made.batch(3)
    label = torch.as_tensor(batch.label)
    keys, labels, index = (bank.get(name, torch.arange(bank.size)) for name in ("key", "label", "index"))
    own = torch.stack([keys[(index == i).nonzero()[-1, 0]] for i in batch.index.tolist()])
    # the bank right after the push of step 3 is the bank now
    nearest = (own @ keys.T).masked_fill(labels < 0, -9).topk(3).indices
    same = other = 0
    for row in range(len(label)):
        for j in nearest[row].tolist():
            if index[j] != int(batch.index[row]):
                other += 1
                same += int(labels[j] == label[row])
    assert t.labelled
    assert float(scalars[3]["purity"]) == pytest.approx(same / other, abs=1e-6)
