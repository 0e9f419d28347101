"""Jobs in several processes: results as they complete, a progress bar, and no orphaned workers after a kill."""

from __future__ import annotations

import concurrent.futures as futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from hpcssl.errors import DataError

J = TypeVar("J")
R = TypeVar("R")


def run_jobs(
    function: Callable[[J], R], jobs: Sequence[J], workers: int | None, sizes: Sequence[int], label: str
) -> Iterator[tuple[int, R]]:
    """Apply a function to every job, in worker processes.

    With one worker the jobs run in this process. The first error ends the run: jobs that have not started are
    dropped.

    Args:
        function: A function of a module, since it is pickled by name.
        jobs: Its arguments; they are pickled too.
        workers: Number of processes; None for one per usable core.
        sizes: Number of images of each job, for the progress bar.
        label: Text in front of the bar.

    Yields:
        (number of the job, its result), in the order of completion.

    Raises:
        DataError: A worker process was killed.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    with tqdm(total=sum(sizes), desc=label, unit=" images", disable=None, leave=False) as bar:
        for number, result in _results(function, jobs, workers):
            bar.update(sizes[number])
            yield number, result


def _results(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[int, R]]:
    if workers <= 1:
        yield from ((number, function(job)) for number, job in enumerate(jobs))
        return
    # spawn: a fork would copy the memory map of this process and the locks that its threads hold
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(workers, context, initializer=_initialize_worker) as executor:
        pending: dict[futures.Future[R], int] = {}
        queue = iter(enumerate(jobs))
        try:
            while True:
                # only a few at a time: a job carries its thousand samples, and pickling all at once takes memory
                while len(pending) < 2 * workers and (entry := next(queue, None)) is not None:
                    pending[executor.submit(function, entry[1])] = entry[0]
                if not pending:
                    return
                done, _ = futures.wait(pending, return_when=futures.FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "worker processes",
                got="one that was killed",
                expected="all of them to finish",
                fix="give fewer --workers if memory was short, then run the same command again: "
                "finished shards are kept",
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _initialize_worker() -> None:
    """Leave Ctrl-C to the parent process, and exit when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a worker

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
