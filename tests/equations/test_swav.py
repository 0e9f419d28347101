"""SwAV beside a plain script in the order of its official code, and Sinkhorn-Knopp in closed form and in its limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcssl.methods import equations
from hpcssl.nets import norm

STEPS = 24  # 2 steps per epoch: the queue of two batches begins after epoch 2 and is used two steps later


def alone(x):
    return x


def literal_codes(score, epsilon=0.05, rounds=3):
    q = np.exp(score / epsilon).T  # [C, N]
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


class Literal:
    """Norms over the crops of one size together and over all crops in the head; the queue as two lists."""

    def __init__(self, made, queue_epoch, freeze, larc):
        self.t, self.queue_epoch, self.freeze, self.larc = made.training, queue_epoch, freeze, larc
        self.f = self.t.pair.online
        self.queue = [[], []]
        self.moment = {name: torch.zeros_like(p) for name, p in self.f.named_parameters()}
        for layer in norm.norms_of([self.f]):  # one group, whatever the rows
            layer.group = 10**9
            layer._spanning = lambda x, _group, of=layer: of._one_group(x)[0]

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
                code = torch.from_numpy(literal_codes(torch.cat((queued, scores[assign])).numpy()))[-len(z[0]):]
            others = [v for v in range(len(crops)) if v != assign]
            loss += sum(-(code * F.log_softmax(scores[v] / 0.1, 1)).sum(1).mean() for v in others) / len(others) / 2
            if self.t.step >= self.queue_epoch * 2:
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
    overrides = ["bank.size=32", "bank.start=empty", "method.queue_epoch=2", "method.freeze_steps=3",
                 "method.prototypes=12", "views.crops.number=2", "views.crops.size=8",
                 *(["optim.name=larc", "optim.lr=5"] if larc else [])]
    ours = small_training("digits_swav", overrides)
    theirs = Literal(small_training("digits_swav", overrides), 2, 3, larc)
    losses = []
    for step in range(STEPS):
        batch = ours.batch(step)
        losses.append(float(ours.step(batch).scalars["loss"]))
        assert losses[-1] == pytest.approx(theirs.step(batch), abs=1e-8), f"step {step}"
        for view, column in enumerate(("key", "other")):
            kept = ours.training.bank.everything(column)[-len(theirs.queue[view]):]
            if theirs.queue[view] and ours.training.bank.pointer == 0:
                torch.testing.assert_close(kept, torch.stack(theirs.queue[view]), rtol=0, atol=1e-8)
    assert max(losses) - min(losses) > 0.05, "a run that does not move proves nothing"
    mine, his = ours.training.pair.online, theirs.f
    with torch.no_grad():
        his.predictor.settle()
    for (name, one), other in zip(mine.named_parameters(), his.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_prototypes_rest_at_first_and_keep_unit_length(small_training):
    made = small_training("digits_swav", ["method.freeze_steps=2"])
    vectors = made.training.pair.online.predictor.vectors.weight
    start = vectors.detach().clone()
    for step, moved in ((0, False), (1, False), (2, True)):
        made.step(made.batch(step))
        assert torch.equal(vectors, start) != moved
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(64, dtype=torch.float64))


def test_codes_are_the_literal_ones_and_sum_to_one():
    score = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tanh()
    code = equations.sinkhorn(score, 0.05, 3, 24, alone)
    np.testing.assert_allclose(code.numpy(), literal_codes(score.numpy()), atol=1e-12)
    torch.testing.assert_close(code.sum(1), torch.ones(24, dtype=torch.float64))


def test_many_rounds_share_the_rows_out_evenly():
    score = torch.randn(24, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tanh()
    torch.testing.assert_close(equations.sinkhorn(score, 0.5, 500, 24, alone).sum(0),
                               torch.full((6,), 4.0, dtype=torch.float64))


def test_equal_scores_give_equal_codes_and_the_entropy_as_loss():
    code = equations.sinkhorn(torch.zeros(8, 5), 0.05, 3, 8, alone)
    torch.testing.assert_close(code, torch.full((8, 5), 0.2))
    torch.testing.assert_close(equations.swapped_prediction(torch.zeros(8, 5), code, 0.1),
                               torch.full((8,), float(np.log(5))))


def test_one_block_of_prototypes_per_class_gives_hard_codes():
    """Rows on orthogonal prototypes at a low temperature: each row's code is its own prototype."""
    code = equations.sinkhorn(torch.eye(4, dtype=torch.float64).repeat(3, 1), 0.02, 3, 12, alone)
    torch.testing.assert_close(code, torch.eye(4, dtype=torch.float64).repeat(3, 1), rtol=0, atol=1e-12)
