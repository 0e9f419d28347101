"""The global batch is a pure function of (seed, epoch, step)."""

import numpy as np
import pytest

from hpcssl.data.order import Order, Sequential
from hpcssl.errors import ConfigError, DataError, WorldError

COUNTS = [10, 7, 13, 10, 9]  # 49 samples


def make(seed=3, window=2, batch=8, counts=COUNTS):
    return Order(counts, seed=seed, global_batch=batch, window=window)


@pytest.mark.parametrize("window", [1, 2, 5, 99, "all"])
def test_an_epoch_is_a_permutation_and_the_tail_is_dropped(window):
    order = make(window=window)
    assert order.steps_per_epoch == 6
    assert sorted(order.permutation(4)) == list(range(49))
    seen = np.concatenate([order.batch(t) for t in range(6, 12)])
    assert len(set(seen.tolist())) == 48
    np.testing.assert_array_equal(seen, order.permutation(1)[:48])


@pytest.mark.parametrize("window", [2, "all"])
def test_a_fresh_object_in_any_order_of_questions_gives_the_same_batch(window):
    steps = [40, 0, 13, 5, 41, 12]
    first = {t: make(window=window).batch(t).tolist() for t in steps}
    one = make(window=window)
    assert {t: one.batch(t).tolist() for t in reversed(steps)} == first


def test_batches_differ_between_epochs_and_seeds():
    assert make().permutation(0).tolist() != make().permutation(1).tolist()
    assert make(seed=3).permutation(0).tolist() != make(seed=4).permutation(0).tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_slices_of_any_world_make_up_the_same_batch(size):
    order = make()
    for step in (0, 5, 6, 17):
        parts = [order.part(step, rank, size) for rank in range(size)]
        assert {len(p) for p in parts} == {8 // size}
        np.testing.assert_array_equal(np.concatenate(parts), order.batch(step))


def test_a_window_keeps_samples_near_their_shards():
    """With windows of two shards, each stretch of the epoch comes from its own two shards and no other."""
    shard = np.repeat(np.arange(5), COUNTS)
    epoch = shard[make(window=2).permutation(0)]
    groups, start = [], 0
    while start < len(epoch):
        length = next(n for n in range(1, 50) if start + n == len(epoch)
                      or (len(set(epoch[start:start + n])) <= 2 and epoch[start + n] not in epoch[start:start + n]
                          and n == sum(COUNTS[s] for s in set(epoch[start:start + n]))
                          and (len(set(epoch[start:start + n])) == 2)))
        groups.append(set(epoch[start:start + length].tolist()))
        start += length
    assert [len(g) for g in groups] == [2, 2, 1]
    assert set.union(*groups) == set(range(5)) and sum(map(len, groups)) == 5
    # and within a window the two shards are mixed, not one after the other
    head = epoch[:sum(COUNTS[s] for s in groups[0])]
    assert (np.diff(head) != 0).sum() > 3


def test_positions_are_uniform():
    """Every sample is equally likely at every place: mean place over 400 epochs within 5 sigma of the middle."""
    order = make(window="all")
    places = np.zeros(49)
    for epoch in range(400):
        places[order.permutation(epoch)] += np.arange(49)
    sigma = np.sqrt((49**2 - 1) / 12 / 400)
    assert np.abs(places / 400 - 24).max() < 5 * sigma


def test_a_late_step_asks_for_one_epoch_only(monkeypatch):
    order, drawn = make(), []
    draw = order._draw
    monkeypatch.setattr(order, "_draw", lambda epoch: drawn.append(epoch) or draw(epoch))
    order.batch(6 * 1_000_000 + 3)
    order.batch(6 * 1_000_000 + 4)
    assert drawn == [1_000_000]


def test_mistakes_are_one_sentence():
    with pytest.raises(DataError, match="no samples"):
        make(counts=[])
    with pytest.raises(DataError, match="50 samples a step from a set of 49"):
        make(batch=50)
    with pytest.raises(ConfigError, match="window"):
        make(window=0)
    with pytest.raises(ConfigError, match="window"):
        make(window="some")
    with pytest.raises(ConfigError):
        make(batch=0)
    with pytest.raises(WorldError, match="such as 1, 2, 4, 8"):
        make().part(0, 0, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("samples, batch", [(10, 4), (9, 3), (3, 8), (1, 1)])
def test_sequential_gives_every_sample_once_and_in_order(samples, batch, size):
    order = Sequential(samples, batch)
    parts = [order.part(t, rank, size) for t in range(order.steps) for rank in range(size)]
    assert np.concatenate(parts).tolist() == list(range(samples))
    assert max(map(len, parts)) <= order.rows(size)


def test_sequential_refuses_nothing_to_do():
    with pytest.raises(DataError):
        Sequential(0, 4)
