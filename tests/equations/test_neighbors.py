"""The neighbors of NNCLR and NNSiam by rule, on a bank filled by hand, and which rows are pushed where."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hpcssl import rng
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec
from hpcssl.methods import equations
from hpcssl.methods.base import Embedding, StepContext
from hpcssl.methods.neighbors import NeighborOptions, find_positives, search_bank
from tests.tolerances import of_step, rounding

B, N, D = 8, 40, 6


def unit(*shape, at):
    return F.normalize(torch.randn(shape, generator=rng.generator(rng.key(0, at)), dtype=torch.float64), dim=-1)


def make_context(step=0, init="empty", labels=3, filled=True):
    """A full bank whose row i has label i % labels, and a context of B images with labels 0 … B-1."""
    bank = Bank(
        N,
        {"key": ColumnSpec(D), "index": ColumnSpec(), "label": ColumnSpec()},
        World.single_process(),
        key=1,
        init=init,
        dtype=torch.float64,
    )
    rows = unit(N, D, at="bank")
    if filled:
        bank.push(key=rows, index=torch.arange(N) + 100, label=torch.arange(N) % labels)
    return rows, StepContext(
        step=step,
        steps_per_epoch=10,
        seed=0,
        world=bank.world,
        layout=BatchLayout(B),
        bank=bank,
        index_B=torch.arange(B),
        label_B=torch.arange(B),
        rows_B=torch.arange(B),
        predict=None,
        has_labels=True,
    )


def test_nearest_has_the_smallest_distance():
    z, (rows, ctx) = unit(B, D, at="z"), make_context()
    literal = torch.stack([rows[((rows - row) ** 2).sum(1).argmin()] for row in z])
    assert torch.equal(find_positives(Embedding(z), ctx, NeighborOptions()), literal)


def test_views_that_are_searched_for_together_find_what_each_finds_alone():
    """With one search of the bank for both, and k that differ."""
    views = {v: Embedding(unit(B, D, at=f"z{v}"), view=v) for v in (0, 1)}
    alone = make_context()[1]
    together = replace(make_context()[1], target_embeddings=views)
    searches, nearest = [], together.bank.nearest
    together.bank.nearest = lambda query, k: searches.append(len(query)) or nearest(query, k)
    for k in (1, 3):
        for view in views.values():
            found, wanted = search_bank(view, together, k), alone.bank.nearest(view.z, k)
            for name in ("slot", "similarity", "valid", "rows"):
                assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert searches == [2 * B, 2 * B]
    other = replace(views[0], z=views[1].z)  # no view of this step
    assert torch.equal(search_bank(other, together, 1).slot, alone.bank.nearest(other.z, 1).slot)


def test_oracle_chooses_rows_of_the_same_label_or_else_any():
    z, (rows, ctx) = unit(B, D, at="z"), make_context(labels=3)
    positives = find_positives(Embedding(z), ctx, NeighborOptions(rule="oracle"))
    for i in range(B):
        allowed = torch.arange(i, N, 3) if i < 3 else torch.arange(N)  # the bank holds labels 0, 1 and 2
        assert torch.equal(positives[i], rows[allowed[(rows[allowed] @ z[i]).argmax()]])


@pytest.mark.parametrize("rule", ["nearest", "oracle"])
def test_each_of_the_k_nearest_is_equally_likely(rule):
    z, options = unit(B, D, at="z"), NeighborOptions(k=4, rule=rule)
    ranks = torch.zeros(4)
    for step in range(100):
        rows, ctx = make_context(step, labels=1 if rule == "oracle" else 3)
        positives = find_positives(Embedding(z, view=1), ctx, options)
        _, same_ctx = make_context(step, labels=1 if rule == "oracle" else 3)
        assert torch.equal(positives, find_positives(Embedding(z, view=1), same_ctx, options))
        order = (z @ rows.T).argsort(1, descending=True)[:, :4]
        chosen = (rows[order] == positives[:, None]).all(2)
        assert (chosen.sum(1) == 1).all()
        ranks += chosen.sum(0)
    # within 4 sigma in 800 draws, which are integers by key: the same on every CPU
    assert ((ranks / ranks.sum() - 0.25).abs() < 4 * (0.25 * 0.75 / 800) ** 0.5).all()


def test_views_and_steps_have_different_draws():
    z, options = unit(B, D, at="z"), NeighborOptions(k=8)
    first, view, step = (
        find_positives(Embedding(z, view=v), make_context(s)[1], options) for v, s in ((0, 0), (1, 0), (0, 1))
    )
    assert not torch.equal(first, view) and not torch.equal(first, step)


def test_a_bank_with_fewer_rows_than_k():
    _, ctx = make_context(filled=False)
    two = unit(2, D, at="two")
    ctx.bank.push(key=two, index=torch.arange(2), label=torch.arange(2))
    positives = find_positives(Embedding(unit(B, D, at="z")), ctx, NeighborOptions(k=5))
    assert all(any(torch.equal(row, r) for r in two) for row in positives)


@pytest.mark.parametrize("rule", ["nearest", "oracle", "soft", "self"])
def test_an_empty_bank_gives_the_view_itself(rule):
    z = unit(B, D, at="z")
    assert torch.equal(find_positives(Embedding(z), make_context(filled=False)[1], NeighborOptions(rule=rule)), z)


def test_soft_averages_over_the_whole_bank():
    z, (rows, ctx) = unit(B, D, at="z").requires_grad_(), make_context()
    positives = find_positives(Embedding(z), ctx, NeighborOptions(rule="soft", temperature=0.2))
    torch.testing.assert_close(
        positives,
        equations.soft_nearest_neighbor(z.detach(), rows, 0.2),
        rtol=0,
        atol=rounding(torch.float64, 100, scale=1 / 0.2),
    )
    assert not positives.requires_grad


def test_a_push_into_random_slots_can_be_undone():
    bank = make_context()[1].bank
    before = bank.all_rows("key").clone()
    slots = bank.draw_slots(7, B)
    assert torch.equal(slots, bank.draw_slots(7, B)) and not torch.equal(slots, bank.draw_slots(8, B))
    assert len(set(slots.tolist())) == B and set(slots.tolist()) <= set(range(N))
    fresh, pointer = unit(B, D, at="fresh"), bank.pointer
    undo = bank.push(slots, key=fresh, index=torch.arange(B), label=torch.arange(B))
    assert torch.equal(bank.all_rows("key")[slots], fresh) and bank.pointer == pointer
    assert torch.equal(bank.all_rows("index")[slots], torch.arange(B))
    untouched = [i for i in range(N) if i not in slots.tolist()]
    assert torch.equal(bank.all_rows("key")[untouched], before[untouched])
    bank.undo(undo)
    assert torch.equal(bank.all_rows("key"), before)
    assert make_context(filled=False)[1].bank.draw_slots(7, B) is None, "an unfilled bank is filled in order first"


def test_rows_are_pushed_after_the_search(small_training):
    """They come from the first view or from both, and go to the oldest slots or to random ones."""
    one = small_training("digits_nnclr", ["bank.init=empty"])
    both = small_training("digits_nnclr", ["bank.init=empty", "method.neighbors.both_views=true"])
    batch = one.batch(0)
    z = [
        F.normalize(one.training.pair.online.projector(one.training.pair.online.backbone(x)), dim=1).detach()
        for x in one.training.images(batch)
    ]
    for layer in one.training.norms:
        layer.pending.clear()
    one.step(batch)
    both.step(batch)
    torch.testing.assert_close(one.training.bank.all_rows("key"), z[0], rtol=0, atol=of_step(1))
    torch.testing.assert_close(both.training.bank.all_rows("key"), torch.cat(z), rtol=0, atol=of_step(1))
    oldest, random = (small_training("digits_nnclr", [f"method.neighbors.replace={r}"]) for r in ("oldest", "random"))
    for run in (oldest, random):
        run.step(batch)
    slots = [(run.training.bank.all_rows("index") >= 0).nonzero()[:, 0].tolist() for run in (oldest, random)]
    assert slots[0] == list(range(16)) and len(slots[1]) == 16 and slots[1] != slots[0]


@pytest.mark.parametrize(
    ("overrides", "what", "got", "fix"),
    [
        (["method.neighbors.rule=nearst"], "method.neighbors.rule", "'nearst'", "'nearest'"),
        (["method.neighbors.k=0"], "method.neighbors", "k=0", "method.neighbors.k=1"),
        (["method.neighbors={rule: soft, k: 3}"], "method.neighbors.k", "3 with rule soft", "rule=nearest"),
        (
            ["method.neighbors.both_views=true", "method.symmetric=false"],
            "method.neighbors.both_views",
            "true",
            "method.symmetric=true",
        ),
        (["method.contrast=row"], "method.contrast", "'row'", "'rows'"),
        (["method.temperature=0"], "method.temperature", "0.0", "method.temperature=0.1"),
        (["machine.accumulation_steps=2"], "machine.accumulation_steps", "2", "machine.accumulation_steps=1"),
        (
            ["model.projector={last_norm: false, last_affine: false}"],
            "last_affine of a head",
            "false",
            "last_norm=true",
        ),
        (["method.ema.momentum=0.9"], "method.ema", "0.9", "method.momentum_encoder=true"),
        (["method.neighbors.temperature=0.2"], "method.neighbors.temperature", "0.2", "method.neighbors.rule=soft"),
        (["method.neighbors={rule: self, support: encoder}"], "method.neighbors.rule", "self", "rule=nearest"),
        (["model.shuffle_bn=true"], "model.shuffle_bn", "true", "model.shuffle_bn=false"),
        (["views.second_query=strong"], "views.second_query, views.second_target", "nnclr", "method.rule=cross_modal"),
    ],
)
def test_invalid_options_are_refused(small_training, overrides, what, got, fix):
    with pytest.raises(ConfigError) as caught:
        small_training("digits_nnclr", overrides)
    assert caught.value.what == what and got in str(caught.value.got) and fix in caught.value.fix
