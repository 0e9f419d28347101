"""What the ranks ask of the store while they wait for one another."""

import threading
import time
from collections import Counter

import pytest
from torch.distributed import HashStore

from hpcssl.distributed import rendezvous
from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.distributed.launch import LaunchInfo
from hpcssl.distributed.liveness import record
from hpcssl.errors import Stopped, WorldError

SIZE = 64


class CountingStore(KeyValueStore):
    """A store that counts the keys that are asked for, by rank."""

    def __init__(self, store, rank, asked):
        super().__init__(store)
        self._rank, self._asked = rank, asked

    def contains(self, keys):
        """Whether all keys exist; counts them."""
        keys = list(keys)
        self._asked[self._rank] += len(keys)
        return super().contains(keys)


def arrive(ranks, timeout_s):
    """Let these ranks of 64 arrive; what each raised or None, and the keys that each looked for."""
    store, asked, ends = HashStore(), Counter(), {}

    def wait(rank):
        info = LaunchInfo(rank=rank, local_rank=0, size=SIZE, address="127.0.0.1", port=1, token="token")
        try:
            rendezvous.wait_for_all(CountingStore(store, rank, asked), info, time.monotonic(), timeout_s, lambda: False)
            ends[rank] = None
        except WorldError as error:
            ends[rank] = error

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends, asked


def test_only_rank_0_looks_for_the_other_ranks():
    ends, asked = arrive(range(SIZE - 1, -1, -1), timeout_s=60)  # rank 0 comes last
    assert ends == dict.fromkeys(range(SIZE))
    assert set(asked) == {0}


@pytest.mark.parametrize("missing", [0, 5])
def test_a_rank_that_never_comes_is_named_by_all_others(missing):
    ends, _ = arrive([rank for rank in range(SIZE) if rank != missing], timeout_s=0.2)
    assert len(ends) == SIZE - 1
    assert {str(error.got) for error in ends.values()} == {
        f"rank {missing} of {SIZE} never came within 0.00333 minutes"
    }


def test_a_stop_that_comes_when_no_rank_is_missing_is_left_to_the_training():
    """Rank 1 has the stop and finds all ranks before rank 0 says so: both go on, and agree on a step later."""
    store = HashStore()
    infos = [LaunchInfo(rank=r, local_rank=0, size=2, address="127.0.0.1", port=1, token="token") for r in range(2)]
    store.set(record.key(0), record.first_record(0))
    for info, stopping in ((infos[1], True), (infos[0], False)):
        rendezvous.wait_for_all(KeyValueStore(store), info, time.monotonic(), 60, lambda stopping=stopping: stopping)


def test_a_stop_while_a_rank_is_missing_names_it():
    info = LaunchInfo(rank=0, local_rank=0, size=2, address="127.0.0.1", port=1, token="token")
    with pytest.raises(Stopped, match="rank 1 of 2 had not come"):
        rendezvous.wait_for_all(KeyValueStore(HashStore()), info, time.monotonic(), 60, lambda: True)
