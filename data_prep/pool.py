"""Work spread over processes: results as they come, a bar on a terminal, and nobody left behind by a kill."""

from __future__ import annotations

import concurrent.futures as futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from hpcssl.errors import DataError


def run(work: Callable, jobs: Sequence, workers: int | None, sizes: Sequence[int], verb: str) -> Iterator[tuple]:
    """Yield (number, ``work(jobs[number])``) in the order of completion. ``sizes`` are samples, for the bar.

    One worker runs in this process. The first error ends the run: what has not begun is not begun any more.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    with tqdm(total=sum(sizes), desc=verb, unit=" images", disable=None, leave=False) as bar:
        for number, result in _results(work, jobs, workers):
            bar.update(sizes[number])
            yield number, result


def _results(work: Callable, jobs: Sequence, workers: int) -> Iterator[tuple]:
    if workers <= 1:
        yield from ((number, work(job)) for number, job in enumerate(jobs))
        return
    # spawn: a fork would copy this process's memory map and whatever threads hold in it
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(workers, context, initializer=_prepare) as executor:
        waiting: dict[futures.Future, int] = {}
        left = iter(enumerate(jobs))
        try:
            while True:
                # few at a time: a job carries its thousand samples, and the data set should not be pickled at once
                while len(waiting) < 2 * workers and (job := next(left, None)) is not None:
                    waiting[executor.submit(work, job[1])] = job[0]
                if not waiting:
                    return
                done, _ = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError("worker processes", got="one that was killed", expected="all of them to finish",
                            mend="give fewer --workers if memory was short, then run the same command again: "
                                 "finished shards are kept") from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _prepare() -> None:
    """In a worker: the keyboard is the parent's affair, and a parent that is killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
