"""The global batch is a pure function of (seed, epoch, step)."""

import tracemalloc

import numpy as np
import pytest

from hpcssl import rng
from hpcssl.data.order import Order, SequentialOrder
from hpcssl.errors import ConfigError, DataError, WorldError
from tests.printed import numbers_in

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
def test_batches_do_not_depend_on_earlier_calls(window):
    steps = [40, 0, 13, 5, 41, 12]
    first = {t: make(window=window).batch(t).tolist() for t in steps}
    one = make(window=window)
    assert {t: one.batch(t).tolist() for t in reversed(steps)} == first


def test_batches_differ_between_epochs_and_seeds():
    assert make().permutation(0).tolist() != make().permutation(1).tolist()
    assert make(seed=3).permutation(0).tolist() != make(seed=4).permutation(0).tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_slices_together_equal_the_batch(size):
    order = make()
    for step in (0, 5, 6, 17):
        parts = [order.local_batch(step, rank, size) for rank in range(size)]
        assert {len(p) for p in parts} == {8 // size}
        np.testing.assert_array_equal(np.concatenate(parts), order.batch(step))


def test_samples_are_shuffled_within_windows_of_shards():
    """With windows of two shards, each part of the epoch reads its own two shards and no other."""
    shard = np.repeat(np.arange(5), COUNTS)
    epoch = shard[make(window=2).permutation(0)]
    groups, start = [], 0
    while start < len(epoch):
        length = next(
            n
            for n in range(1, 50)
            if start + n == len(epoch)
            or (
                len(set(epoch[start : start + n])) <= 2
                and epoch[start + n] not in epoch[start : start + n]
                and n == sum(COUNTS[s] for s in set(epoch[start : start + n]))
                and (len(set(epoch[start : start + n])) == 2)
            )
        )
        groups.append(set(epoch[start : start + length].tolist()))
        start += length
    assert [len(g) for g in groups] == [2, 2, 1]
    assert set.union(*groups) == set(range(5)) and sum(map(len, groups)) == 5
    # within a window, samples of the two shards alternate
    head = epoch[: sum(COUNTS[s] for s in groups[0])]
    assert (np.diff(head) != 0).sum() > 3


def test_every_sample_is_equally_likely_at_every_position():
    """The mean position of each sample over 400 epochs is within 5 sigma of the middle.

    One of 49 correct means exceeds that with a probability of 3e-5; permutations by key do not depend on the CPU.
    """
    order = make(window="all")
    positions = np.zeros(49)
    for epoch in range(400):
        positions[order.permutation(epoch)] += np.arange(49)
    sigma = np.sqrt((49**2 - 1) / 12 / 400)
    assert np.abs(positions / 400 - 24).max() < 5 * sigma


def test_a_late_step_draws_one_permutation_only(monkeypatch):
    order, drawn, permutation = make(window="all"), [], rng.permutation
    monkeypatch.setattr(rng, "permutation", lambda key, n: drawn.append(key) or permutation(key, n))
    order.batch(6 * 1_000_000 + 3)
    order.batch(6 * 1_000_000 + 4)
    assert drawn == [rng.key(3, "order", 1_000_000)]


@pytest.mark.parametrize("window", [2, "all"])
def test_a_window_beyond_the_sorted_size_is_a_permutation_too(window, monkeypatch):
    monkeypatch.setattr(rng, "MAX_SORTED", 12)
    order = make(window=window)
    assert sorted(order.permutation(4)) == list(range(49))
    np.testing.assert_array_equal(np.concatenate([order.batch(t) for t in range(6, 12)]), order.permutation(1)[:48])
    shard = np.repeat(np.arange(5), COUNTS)[order.permutation(4)]
    windows = [set(shards.tolist()) for shards in order.upcoming_windows(4 * 6, 4 * 6 + 1)]
    samples = sum(COUNTS[s] for s in windows[0])
    assert set(shard[:samples].tolist()) == windows[0] and len(windows[0]) == (2 if window == 2 else 5)


@pytest.mark.parametrize("window", [16, "all"])
def test_a_hundred_million_samples_take_no_memory_per_sample(window):
    counts = np.full(100_000, 1000)
    order = make(window=window, counts=counts, batch=4096)
    tracemalloc.start()
    batches = [order.batch(step) for step in (0, 24_413, 1_000_000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(len(np.unique(batch)) == 4096 and batch.min() >= 0 and batch.max() < 10**8 for batch in batches)
    assert peak < 64 * len(counts)  # bytes; one number per sample would be 800 MB


def test_an_empty_set_is_refused():
    with pytest.raises(DataError) as caught:
        make(counts=[])
    assert caught.value.what == "the data set"


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(DataError) as caught:
        make(batch=50)
    assert numbers_in(caught.value.got) == [50, 49] and numbers_in(caught.value.expected) == [49]
    assert "optim.batch" in caught.value.fix


@pytest.mark.parametrize("window", [0, "some"])
def test_a_wrong_window_is_refused(window):
    with pytest.raises(ConfigError) as caught:
        make(window=window)
    assert caught.value.what == "data.shuffle_window" and caught.value.got == repr(window)


def test_a_wrong_batch_is_refused():
    with pytest.raises(ConfigError) as caught:
        make(batch=0)
    assert caught.value.got == "0" and "optim.batch" in caught.value.fix


def test_a_world_size_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(WorldError) as caught:
        make().local_batch(0, 0, 3)
    assert numbers_in(caught.value.got) == [3] and numbers_in(caught.value.expected) == [1, 2, 4, 8]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("samples, batch", [(10, 4), (9, 3), (3, 8), (1, 1)])
def test_sequential_order_gives_every_sample_once_and_in_order(samples, batch, size):
    order = SequentialOrder(samples, batch)
    parts = [order.local_batch(t, rank, size) for t in range(order.steps) for rank in range(size)]
    assert np.concatenate(parts).tolist() == list(range(samples))
    assert max(map(len, parts)) <= order.rows_per_rank(size)


def test_sequential_order_refuses_an_empty_set():
    with pytest.raises(DataError):
        SequentialOrder(0, 4)
