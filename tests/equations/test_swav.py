"""SwAV against a plain script in the order of its official code, and Sinkhorn-Knopp in closed form and in limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl.methods import equations
from hpcssl.nets import norm
from tests.tolerances import of_step, rounding

STEPS = 24  # 2 steps per epoch: the queue of two batches starts after epoch 2 and is full two steps later


def sum_over_ranks(x):
    """The sum over the ranks of a world of one."""
    return x


def literal_codes(score, epsilon=0.05, rounds=3):
    q = np.exp(score / epsilon).T  # [C, N]
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


class LiteralSwav:
    """Norms over all crops of one size, and over all crops in the head; the queue as two lists."""

    def __init__(self, run, queue_start_epoch, freeze, larc):
        self.t, self.queue_start_epoch, self.freeze, self.larc = run.training, queue_start_epoch, freeze, larc
        self.f = self.t.pair.online
        self.queue = [[], []]
        self.moment = {name: torch.zeros_like(p) for name, p in self.f.named_parameters()}
        for layer in norm.find_norms([self.f]):  # one group, whatever the rows
            layer.group = 10**9
            layer._spanning = lambda x, _group, of=layer: of._one_group(x)

    def step(self, batch):
        crops, weight = self.t.images(batch), self.f.predictor.vectors.weight
        with torch.no_grad():
            weight.copy_(F.normalize(weight, dim=1))
        large, small = self.f.backbone(torch.cat(crops[:2])), self.f.backbone(torch.cat(crops[2:]))
        z = F.normalize(self.f.projector(torch.cat((large, small))), dim=1).split(len(crops[0]))
        scores = [rows @ weight.T for rows in z]
        loss, full = 0.0, len(self.queue[0]) == 32
        for assign in (0, 1):
            with torch.no_grad():
                queued = torch.stack(self.queue[assign]) @ weight.T if full else scores[0][:0]
                code = torch.from_numpy(literal_codes(torch.cat((queued, scores[assign])).numpy()))[-len(z[0]) :]
            others = [v for v in range(len(crops)) if v != assign]
            loss += sum(-(code * F.log_softmax(scores[v] / 0.1, 1)).sum(1).mean() for v in others) / len(others) / 2
            if self.t.step >= self.queue_start_epoch * 2:
                self.queue[assign] = (self.queue[assign] + list(z[assign].detach()))[-32:]
        self._descend(loss)
        return float(loss.detach())

    def _descend(self, loss):
        self.f.zero_grad()
        loss.backward()
        if self.t.step < self.freeze:
            self.f.predictor.zero_grad()
        lr, _ = self.t.set_rates()
        self.t.step += 1
        with torch.no_grad():
            for name, p in self.f.named_parameters():
                if p.grad is None:
                    continue
                g = p.grad + 1e-4 * p
                if self.larc:
                    g *= 1e-3 * p.norm() / (p.grad.norm() + 1e-4 * p.norm() + 1e-8)
                    g = g if p.norm() > 0 else p.grad
                self.moment[name] = 0.9 * self.moment[name] + g
                p -= lr * self.moment[name]


@pytest.mark.parametrize("larc", [False, True], ids=["sgd", "larc"])
def test_step_by_step_against_a_plain_script(small_training, larc):
    overrides = [
        "bank.size=32",
        "bank.init=empty",
        "method.queue_start_epoch=2",
        "method.freeze_steps=3",
        "method.prototypes=12",
        "method.temperature=0.1",
        "views.crops.count=2",
        "views.crops.size=8",
        *(["optim.name=larc", "optim.lr=5"] if larc else []),
    ]
    ours = small_training("digits_swav", overrides)
    theirs = LiteralSwav(small_training("digits_swav", overrides), 2, 3, larc)
    losses = []
    for step in range(STEPS):
        batch = ours.batch(step)
        losses.append(float(ours.step(batch).scalars["loss"]))
        assert losses[-1] == pytest.approx(theirs.step(batch), abs=of_step(step + 1)), f"step {step}"
        for view, column in enumerate(("key", "second_view")):
            rows = ours.training.bank.all_rows(column)[-len(theirs.queue[view]) :]
            if theirs.queue[view] and ours.training.bank.pointer == 0:
                torch.testing.assert_close(rows, torch.stack(theirs.queue[view]), rtol=0, atol=of_step(STEPS))
    assert max(losses) - min(losses) > 0.05, "the loss does not change, so equal losses prove nothing"
    actual, expected = ours.training.pair.online, theirs.f
    with torch.no_grad():
        expected.predictor.normalize_prototypes()
    for (name, one), other in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=of_step(STEPS), msg=lambda m, n=name: f"{n}: {m}")


def test_prototypes_are_frozen_at_first_and_keep_unit_length(small_training):
    run = small_training("digits_swav", ["method.freeze_steps=2"])
    vectors = run.training.pair.online.predictor.vectors.weight
    start = vectors.detach().clone()
    for step, moved in ((0, False), (1, False), (2, True)):
        run.step(run.batch(step))
        assert torch.equal(vectors, start) != moved
        ones = torch.ones(64, dtype=torch.float64)
        torch.testing.assert_close(vectors.norm(dim=1), ones, rtol=0, atol=rounding(torch.float64, 3 * 64))


def test_codes_equal_the_literal_ones_and_sum_to_one():
    score = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tanh()
    code = equations.sinkhorn(score, 0.05, 3, 24, sum_over_ranks)
    np.testing.assert_allclose(
        code.numpy(), literal_codes(score.numpy()), rtol=0, atol=rounding(torch.float64, 200, scale=1 / 0.05)
    )
    ones = torch.ones(24, dtype=torch.float64)
    torch.testing.assert_close(code.sum(1), ones, rtol=0, atol=rounding(torch.float64, 20))


def test_many_iterations_assign_equal_shares_to_all_prototypes():
    score = torch.randn(24, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tanh()
    shares = equations.sinkhorn(score, 0.5, 500, 24, sum_over_ranks).sum(0)
    # the last of 500 rounds adds 24 numbers and then 6; the distance of the shares to 4 has fallen below that long ago
    four = torch.full((6,), 4.0, dtype=torch.float64)
    torch.testing.assert_close(shares, four, rtol=0, atol=rounding(torch.float64, 60, scale=4))


def test_equal_scores_give_equal_codes_and_the_entropy_as_loss():
    code = equations.sinkhorn(torch.zeros(8, 5), 0.05, 3, 8, sum_over_ranks)
    # three rounds that add 8 numbers and then 5, and divide twice
    torch.testing.assert_close(code, torch.full((8, 5), 0.2), rtol=0, atol=rounding(torch.float32, 45, scale=0.2))
    torch.testing.assert_close(
        equations.swapped_prediction(torch.zeros(8, 5), code, 0.1),
        torch.full((8,), float(np.log(5))),
        rtol=0,
        atol=rounding(torch.float32, 60, scale=float(np.log(5))),
    )


def test_orthogonal_prototypes_give_hard_codes():
    """Rows equal to orthogonal prototypes, at a low temperature: the code of a row is its prototype."""
    code = equations.sinkhorn(torch.eye(4, dtype=torch.float64).repeat(3, 1), 0.02, 3, 12, sum_over_ranks)
    torch.testing.assert_close(
        code, torch.eye(4, dtype=torch.float64).repeat(3, 1), rtol=0, atol=rounding(torch.float64, 100, scale=1 / 0.02)
    )
