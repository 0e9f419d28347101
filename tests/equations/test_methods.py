"""MSF and BYOL against slow literal versions, and against each other where the papers say that they are equal."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.methods import equations
from tests.tolerances import of_step, rounding


def unit(*shape, at):
    return F.normalize(torch.randn(shape, generator=rng.generator(rng.key(0, at)), dtype=torch.float64), dim=-1)


def test_squared_distance_is_the_squared_distance_of_unit_vectors():
    u, v = unit(7, 5, at="u"), unit(7, 5, at="v")
    literal = [sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(u, v, strict=True)]
    np.testing.assert_allclose(
        equations.squared_distance(u, v).numpy(), literal, rtol=0, atol=rounding(torch.float64, 10, scale=4)
    )


def test_mean_shift_is_the_mean_over_valid_neighbors():
    u, z = unit(4, 5, at="u"), unit(4, 3, 5, at="z")
    valid = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    for row, loss in enumerate(equations.mean_shift(u, z, valid)):
        distances = [float(((u[row] - z[row, j]) ** 2).sum()) for j in range(3) if valid[row, j]]
        assert float(loss) == pytest.approx(
            np.mean(distances) if distances else 0.0, abs=rounding(torch.float64, 20, scale=4)
        )


def test_mean_shift_pulls_towards_the_mean_of_the_neighbors():
    """The gradient of the loss at u is −2 times the mean of the valid rows: closed form."""
    u, z = unit(4, 5, at="u").requires_grad_(), unit(4, 3, 5, at="z")
    valid = torch.ones(4, 3, dtype=torch.bool)
    equations.mean_shift(u, z, valid).sum().backward()
    torch.testing.assert_close(u.grad, -2 * z.mean(1), rtol=0, atol=rounding(torch.float64, 10, scale=2))


@pytest.mark.parametrize("k", [1, 5])
def test_msf_step_by_step_against_a_literal_script(small_training, k):
    """50 steps of train_step against a plain script: forward, bank as a list, full distance matrix, SGD, EMA."""
    ours = small_training("digits_msf", [f"method.k={k}", "bank.size=48"])
    theirs = LiteralMsf(small_training("digits_msf", [f"method.k={k}", "bank.size=48"]), k)
    for step in range(50):
        batch = ours.batch(step)
        loss = ours.step(batch).scalars["loss"]
        assert float(loss) == pytest.approx(theirs.step(batch), abs=of_step(step + 1))
    for actual, expected in zip(ours.training.pair.online.parameters(), theirs.online.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=of_step(50))
    torch.testing.assert_close(
        ours.training.bank.get("key", torch.arange(48)), torch.stack(theirs.bank), rtol=0, atol=of_step(50)
    )


class LiteralMsf:
    """The order of the official script, written out: EMA first, push, then search over all rows."""

    def __init__(self, run, k):
        self.k, self.t = k, run.training
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


def test_msf_with_one_neighbor_is_asymmetric_byol(small_training):
    """k = 1 and the row of the image itself in the bank: the same losses and the same parameters."""
    ema = "method.ema={momentum: 0.9, shape: constant}"
    msf = small_training("digits_msf", ["method.k=1", ema])
    byol = small_training("digits_byol", ["method.symmetric=false", ema])
    for step in range(20):
        batch = msf.batch(step)
        assert float(msf.step(batch).scalars["loss"]) == pytest.approx(
            float(byol.step(batch).scalars["loss"]), abs=of_step(step + 1)
        )
    for one, other in zip(msf.training.pair.parameters(), byol.training.pair.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=of_step(20))


def test_msf_with_more_neighbors_has_another_loss(small_training):
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
    assert float(both.step(both.batch(0)).scalars["loss"]) == pytest.approx(float(literal.detach()), abs=of_step(1))


def test_micro_batches_equal_the_whole_batch(small_training):
    """Groups of 4 in micro-batches of 8: the same statistics, gradients and bank as one batch of 16.

    Statistics over 4 samples amplify: a relative perturbation of the parameters before the first step changed the
    parameters by up to 2,000 times its size within 6 steps. Hence the larger amplification.
    """
    sensitive = 1e4
    ghost = ["model.norm=ghost", "model.norm_group_size=4"]
    whole = small_training("digits_msf", ghost)
    parts = small_training("digits_msf", [*ghost, "machine.accumulation_steps=2"])
    for step in range(5):
        batch = whole.batch(step)
        assert float(whole.step(batch).scalars["loss"]) == pytest.approx(
            float(parts.step(batch).scalars["loss"]), abs=of_step(step + 1, sensitive)
        )
    actual, expected = parts.snapshot(), whole.snapshot()
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=of_step(5, sensitive), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nonfinite_step_changes_nothing(small_training, what):
    """Parameters, target, bank, momentum and statistics keep their bits, and the next batch is trained on."""
    run = small_training("digits_msf", [])
    run.step(run.batch(0))
    before = run.snapshot()
    images = run.training.images
    if what == "loss":
        run.training.images = lambda batch: [x * float("nan") for x in images(batch)]
    else:
        hook = next(run.training.pair.online.parameters()).register_hook(lambda grad: grad * float("inf"))
    report = run.step(run.batch(1))
    assert not report.taken and run.training.skipped_in_a_row == 1
    assert report.reason == (
        "the loss or a target was not finite on rank 0"
        if what == "loss"
        else "a gradient was not finite, with a finite loss"
    )
    after = run.snapshot()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    run.training.images = images
    if what == "gradient":
        hook.remove()
    report = run.step(run.batch(2))
    assert report.taken and run.training.skipped_in_a_row == 0


def test_bf16_learns_like_fp32(small_training):
    """The first losses are equal up to rounding (see ``test_scripts.py``), and the loss falls in 50 steps."""
    precise = small_training("digits_msf", ["optim.precision=fp32"])
    coarse = small_training("digits_msf", ["optim.precision=bf16"])
    pairs = [
        (float(precise.step(b).scalars["loss"]), float(coarse.step(b).scalars["loss"]))
        for b in map(precise.batch, range(50))
    ]
    assert all(p.dtype == torch.float32 for p in coarse.training.pair.parameters())
    a, b = np.array(pairs).T
    first = rounding(torch.bfloat16, 40, scale=4 / (16 * 64) ** 0.5)
    assert np.isfinite(b).all() and abs(a[0] - b[0]) < first  # later on rounding changes neighbors
    # from 2.03 to 1.20 in fp32 and 1.11 in bf16 (measured); a network that does not learn stays at 2
    assert b[-10:].mean() < b[0] - 0.5
    assert (a != b).any(), "autocast did nothing"


def test_purity_counts_other_images_of_the_same_label(small_training):
    run = small_training("digits_msf", ["method.k=3", "bank.init=empty", "bank.size=64"])
    scalars = [run.step(run.batch(step)).scalars for step in range(4)]
    bank, t = run.training.bank, run.training
    batch = run.batch(3)
    label = torch.as_tensor(batch.label)
    keys, labels, index = (bank.get(name, torch.arange(bank.size)) for name in ("key", "label", "index"))
    own = torch.stack([keys[(index == i).nonzero()[-1, 0]] for i in batch.index.tolist()])
    # the bank right after the push of step 3 is the bank now
    nearest = (own @ keys.T).masked_fill(labels < 0, -9).topk(3).indices
    same = other = with_self = 0
    for row in range(len(label)):
        for j in nearest[row].tolist():
            with_self += int(labels[j] == label[row])
            if index[j] != int(batch.index[row]):
                other += 1
                same += int(labels[j] == label[row])
    assert t.has_labels
    assert float(scalars[3]["purity"]) == pytest.approx(same / other, abs=rounding(torch.float32, 2))
    expected = with_self / (3 * len(label))
    assert float(scalars[3]["purity_with_self"]) == pytest.approx(expected, abs=rounding(torch.float32, 2))


def test_a_gradient_that_is_not_finite_is_found_wherever_it_is(small_training):
    training = small_training("digits_byol", []).training
    parameters = [p for p in training.pair.online.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.finfo(parameter.dtype).max)
    assert training.gradients_are_finite()
    for parameter in (parameters[0], parameters[len(parameters) // 2], parameters[-1]):
        for bad in (torch.nan, torch.inf, -torch.inf):
            good = parameter.grad.clone()
            parameter.grad[(-1,) * parameter.dim()] = bad
            assert not training.gradients_are_finite()
            parameter.grad = good
    assert training.gradients_are_finite()
