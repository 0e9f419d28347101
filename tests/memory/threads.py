"""Ranks as threads of one process, for worlds of many ranks that would take too long to start as processes."""

import threading

import torch

from hpcssl.distributed.collectives import Collectives

TIMEOUT_S = 60


class ThreadedRanks(Collectives):
    """One rank of a group of threads, which exchange references to their tensors between two barriers."""

    def __init__(self, rank, size, barrier, table):
        super().__init__(rank, size, torch.device("cpu"))
        self._barrier, self._table = barrier, table

    def _exchange(self, value):
        self._table[self.rank] = value
        self._barrier.wait(TIMEOUT_S)
        values = list(self._table)
        self._barrier.wait(TIMEOUT_S)
        return values

    def all_gather(self, x):
        return torch.cat(self._exchange(x.detach().clone()))

    def all_reduce_sum(self, x):
        return torch.stack(self._exchange(x.detach().clone())).sum(0)

    def all_to_all(self, x, to_send=None, to_receive=None):
        counts = [len(x) // self.size] * self.size if to_send is None else to_send
        assert sum(counts) == len(x)
        pieces = [pieces[self.rank].clone() for pieces in self._exchange(x.detach().clone().split(counts))]
        if to_receive is not None:
            assert [len(piece) for piece in pieces] == to_receive
        return torch.cat(pieces)


def run_ranks(size, work, kind=ThreadedRanks):
    """Run ``work(world)`` on every rank, with worlds of this kind. Returns the results by rank, or raises an error."""
    barrier, table = threading.Barrier(size), [None] * size
    results, errors = [None] * size, []

    def run(rank):
        try:
            results[rank] = work(kind(rank, size, barrier, table))
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results
