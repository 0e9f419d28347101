"""The look-up of NNCLR and NNSiam by rule, on a bank filled by hand; what is pushed, and where."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.memory.bank import Bank, ColumnSpec
from hpcssl.methods import equations
from hpcssl.methods.base import Context, Emb
from hpcssl.methods.neighbours import NeighbourOptions, look_up
from hpcssl.world import World

B, N, D = 8, 40, 6


def unit(*shape, at):
    return F.normalize(torch.randn(shape, generator=rng.generator(rng.key(0, at)), dtype=torch.float64), dim=-1)


def scene(step=0, start="empty", labels=3, filled=True):
    """A full bank whose row i has label i % labels, and a context of B images with labels 0 … B-1."""
    bank = Bank(N, {"key": ColumnSpec(D), "index": ColumnSpec(), "label": ColumnSpec()}, World.alone(), key=1,
                start=start, dtype=torch.float64)
    rows = unit(N, D, at="bank")
    if filled:
        bank.push(key=rows, index=torch.arange(N) + 100, label=torch.arange(N) % labels)
    bank.world.deal(B, 1)
    return rows, Context(step=step, epoch_steps=10, seed=0, world=bank.world, bank=bank, index_B=torch.arange(B),
                         label_B=torch.arange(B), pos_B=torch.arange(B), predict=None, watch_labels=True)


def test_nearest_is_the_least_distance():
    z, (rows, ctx) = unit(B, D, at="z"), scene()
    literal = torch.stack([rows[((rows - row) ** 2).sum(1).argmin()] for row in z])
    assert torch.equal(look_up(Emb(z), ctx, NeighbourOptions()), literal)


def test_oracle_keeps_to_the_label_and_falls_back():
    z, (rows, ctx) = unit(B, D, at="z"), scene(labels=3)
    found = look_up(Emb(z), ctx, NeighbourOptions(rule="oracle"))
    for i in range(B):
        allowed = torch.arange(i, N, 3) if i < 3 else torch.arange(N)  # the bank holds labels 0, 1 and 2
        assert torch.equal(found[i], rows[allowed[(rows[allowed] @ z[i]).argmax()]])


@pytest.mark.parametrize("rule", ["nearest", "oracle"])
def test_one_of_the_k_nearest_each_as_likely(rule):
    z, options = unit(B, D, at="z"), NeighbourOptions(k=4, rule=rule)
    ranks = torch.zeros(4)
    for step in range(100):
        rows, ctx = scene(step, labels=1 if rule == "oracle" else 3)
        found = look_up(Emb(z, view=1), ctx, options)
        assert torch.equal(found, look_up(Emb(z, view=1), scene(step, labels=1 if rule == "oracle" else 3)[1], options))
        order = (z @ rows.T).argsort(1, descending=True)[:, :4]
        chosen = (rows[order] == found[:, None]).all(2)
        assert (chosen.sum(1) == 1).all()
        ranks += chosen.sum(0)
    assert ((ranks / ranks.sum() - 0.25).abs() < 0.06).all()  # 800 draws: four standard deviations


def test_views_and_steps_draw_apart():
    z, options = unit(B, D, at="z"), NeighbourOptions(k=8)
    first, view, step = (look_up(Emb(z, view=v), scene(s)[1], options) for v, s in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(first, view) and not torch.equal(first, step)


def test_fewer_rows_than_k_are_all_there_is():
    _, ctx = scene(filled=False)
    two = unit(2, D, at="two")
    ctx.bank.push(key=two, index=torch.arange(2), label=torch.arange(2))
    found = look_up(Emb(unit(B, D, at="z")), ctx, NeighbourOptions(k=5))
    assert all(any(torch.equal(row, r) for r in two) for row in found)


@pytest.mark.parametrize("rule", ["nearest", "oracle", "soft", "self"])
def test_an_empty_bank_points_at_the_view_itself(rule):
    z = unit(B, D, at="z")
    assert torch.equal(look_up(Emb(z), scene(filled=False)[1], NeighbourOptions(rule=rule)), z)


def test_soft_is_the_formula_over_the_whole_bank():
    z, (rows, ctx) = unit(B, D, at="z").requires_grad_(), scene()
    found = look_up(Emb(z), ctx, NeighbourOptions(rule="soft", tau=0.2))
    torch.testing.assert_close(found, equations.soft_neighbour(z.detach(), rows, 0.2), rtol=0, atol=1e-14)
    assert not found.requires_grad


def test_rows_enter_at_random_slots_and_can_be_taken_back():
    bank = scene()[1].bank
    before = bank.everything("key").clone()
    slots = bank.slots_at(7, B)
    assert torch.equal(slots, bank.slots_at(7, B)) and not torch.equal(slots, bank.slots_at(8, B))
    assert len(set(slots.tolist())) == B and set(slots.tolist()) <= set(range(N))
    fresh, pointer = unit(B, D, at="fresh"), bank.pointer
    ticket = bank.push(slots, key=fresh, index=torch.arange(B), label=torch.arange(B))
    assert torch.equal(bank.everything("key")[slots], fresh) and bank.pointer == pointer
    assert torch.equal(bank.everything("index")[slots], torch.arange(B))
    untouched = [i for i in range(N) if i not in slots.tolist()]
    assert torch.equal(bank.everything("key")[untouched], before[untouched])
    bank.take_back(ticket)
    assert torch.equal(bank.everything("key"), before)
    assert scene(filled=False)[1].bank.slots_at(7, B) is None, "an unfilled bank is filled in order first"


def test_what_enters_the_bank_and_when(small_training):
    """Not before the step's look-up, view 1 alone or both, in order or at random."""
    one = small_training("digits_nnclr", ["bank.start=empty"])
    both = small_training("digits_nnclr", ["bank.start=empty", "method.neighbours.both_views=true"])
    batch = one.batch(0)
    z = [F.normalize(one.training.pair.online.projector(one.training.pair.online.backbone(x)), dim=1).detach()
         for x in one.training.images(batch)]
    for layer in one.training.norms:
        layer.pending.clear()
    one.step(batch)
    both.step(batch)
    torch.testing.assert_close(one.training.bank.everything("key"), z[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(both.training.bank.everything("key"), torch.cat(z), rtol=0, atol=1e-12)
    ring, drawn = (small_training("digits_nnclr", [f"method.neighbours.replace={r}"]) for r in ("oldest", "random"))
    for made in (ring, drawn):
        made.step(batch)
    slots = [(made.training.bank.everything("index") >= 0).nonzero()[:, 0].tolist() for made in (ring, drawn)]
    assert slots[0] == list(range(16)) and len(slots[1]) == 16 and slots[1] != slots[0]


@pytest.mark.parametrize(("overrides", "said"), [
    (["method.neighbours.rule=nearst"], "nearest"),
    (["method.neighbours.k=0"], "k from 1"),
    (["method.neighbours={rule: soft, k: 3}"], "rule=nearest"),
    (["method.neighbours.both_views=true", "method.symmetric=false"], "symmetric"),
    (["method.contrast=row"], "rows"),
    (["method.tau=0"], "above 0"),
    (["machine.accumulate=2"], "machine.accumulate=1"),
    (["model.projector={last_norm: false, last_affine: false}"], "last_norm"),
    (["method.ema.momentum=0.9"], "momentum_encoder"),
    (["method.neighbours.tau=0.2"], "soft"),
    (["method.neighbours={rule: self, support: encoder}"], "rule=nearest"),
    (["model.shuffle=true"], "moving average"),
    (["views.second_query=strong"], "two modalities"),
])
def test_options_that_cannot_be_meant_are_refused(small_training, overrides, said):
    with pytest.raises(ConfigError, match=said):
        small_training("digits_nnclr", overrides)
