"""Counter-based random numbers: the same key gives the same numbers, on any thread and in any version."""

import threading

import numpy as np
import pytest

from hpcssl import rng


def test_the_numbers_are_those_of_numpys_philox():
    for parts in ((0, "view", 3, 7, 1), (2**40, "order", 0), (0,)):
        key = rng.key(*parts)
        assert np.array_equal(rng.raw(key, 9), np.random.Philox(key=key).random_raw(9))


def test_numbers_of_fixed_keys_never_change():
    """The data order of every run follows from these: with other numbers no earlier run could be resumed."""
    assert rng.key(0, "order", 1) == 55179147204985944885626421164422509564
    assert rng.permutation(rng.key(0, "order", 1), 8).tolist() == [3, 0, 7, 2, 6, 4, 5, 1]
    assert rng.uniform(rng.key(7, "view", 0, 3, 1), 2).tolist() == [0.23463154377579498, 0.4169965177335532]


def test_parts_of_a_key_are_not_concatenated():
    keys = [(0, "a", 1), (0, "a1"), (0, "a", "1"), (0, 1, "a"), (1, "a"), (0, "a", 1, 0)]
    assert len({rng.key(*a) for a in keys}) == len(keys)
    assert rng.key(np.int64(3), "a", np.int32(4)) == rng.key(3, "a", 4)


def test_threads_do_not_share_state():
    wrong = []

    def work(thread):
        for i in range(200):
            key = rng.key(thread, i)
            if not np.array_equal(rng.raw(key, 3), np.random.Philox(key=key).random_raw(3)):
                wrong.append((thread, i))

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_permutations_are_complete_and_uniform_numbers_are_uniform():
    order = rng.permutation(rng.key(0, "p"), 1000)
    assert sorted(order.tolist()) == list(range(1000))
    numbers = rng.uniform(rng.key(0, "u"), 20_000)
    assert numbers.min() >= 0 and numbers.max() < 1
    # within 5 sigma; the fourth moment of a uniform variable is 1.8 times the square of its variance
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert abs(numbers.var() - 1 / 12) < 5 / 12 * (0.8 / 20_000) ** 0.5


@pytest.mark.parametrize("count", [0, 1, 7, 999, 1000, 2000])
def test_the_first_entries_of_a_permutation_are_found_without_sorting_all(count):
    key = rng.key(0, "p")
    assert rng.permutation_slice(key, 1000, 0, count).tolist() == rng.permutation(key, 1000)[:count].tolist()


def test_ties_are_broken_by_position(monkeypatch):
    monkeypatch.setattr(rng, "raw", lambda key, n: np.array([5, 3, 5, 3, 9, 3], np.uint64)[:n])
    assert [rng.permutation_slice(0, 6, 0, count).tolist() for count in (2, 4, 6)] == [
        [1, 3],
        [1, 3, 5, 0],
        [1, 3, 5, 0, 2, 4],
    ]
