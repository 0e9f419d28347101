"""Many independent fits of one evaluation: dealt out over the ranks, each done once, the results on every rank.

A job is a number and its result a row of a table, a function of the job alone, so that the numbers are the same on any
number of ranks. What is finished is kept in the evaluation's state file: a kill costs the jobs under way and those of
the last seconds.

Letters in shapes: J jobs, K numbers of each.
"""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable, Sequence

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import Tensor

from hpcssl.errors import EvalError, HpcsslError
from hpcssl.evals import state
from hpcssl.evals.together import agree, as_error
from hpcssl.signals import STOPPING

log = logging.getLogger("hpcssl")

EVERY_S = 5.0  # between two writes of the state file


class Jobs:
    """The tables of one evaluation. ``what``: its name in messages."""

    def __init__(self, context, what: str):
        self.context, self.what, self.tables = context, what, {}
        found = state.read(context.state, context.identity) if context.world.main else None
        self._kept: dict[str, Tensor] = found[0] if found else {}
        self._saved = time.monotonic()

    def table(self, name: str, jobs: int, width: int, work: Callable[..., Sequence[float]], *arguments,
              workers: int = 1) -> Tensor:
        """float64 [J, K]: row j is ``work(*arguments, j)``. A collective; the table's name is its place in the state.

        ``workers`` above 1: that many processes of this rank work at once (``work`` is then a module's function),
        each with one thread. Neighbouring jobs should take about as long: ranks wait for one another after each.
        Raises ``Stopped``, and on every rank what a job raised on one.
        """
        world = self.context.world
        kept = self._kept.get(name)
        if kept is None or kept.shape != (jobs, width):
            kept = torch.full((jobs, width), float("nan"), dtype=torch.float64)
        table = self.tables[name] = world.gather(kept[None].to(world.device))[0].cpu()
        todo = table.isnan().any(1).nonzero()[:, 0].tolist()
        # ranks may have other numbers of cores, and must deal out alike
        workers = min(workers, *map(int, world.gather_text(str(workers))), max(1, -(-len(todo) // world.size)))
        work = functools.partial(_deaf, work) if workers > 1 else work
        began = time.monotonic()
        with joblib.Parallel(workers, mmap_mode="r") as pool:
            for first in range(0, len(todo), workers * world.size):
                here = todo[first:first + workers * world.size]
                mine, error = here[world.rank * workers:(world.rank + 1) * workers], None
                rows = torch.full((workers, width), float("nan"), dtype=torch.float64)
                try:
                    found = pool(joblib.delayed(work)(*arguments, job) for job in mine)
                    rows[:len(mine)] = torch.tensor(found, dtype=torch.float64).view(len(mine), width)
                except (HpcsslError, OSError) as caught:
                    error = as_error(caught)
                except TerminatedWorkerError:
                    # one that a stop caught before it was deaf: its jobs are done by the next attempt
                    error = None if self.context.stop() else EvalError(
                        self.what, got="a worker process that was killed, as for lack of memory",
                        expected=f"memory for {workers} fits at once on each rank",
                        mend="ask for more memory or for fewer cores, and run it again: what is finished is kept")
                rows = world.gather(rows.to(world.device)).cpu()
                table[here] = rows[:len(here)]
                stop = self.context.stop()
                agree(world, self.what, stop=stop, error=error or self._save(at_once=stop))
                if time.monotonic() - began > 10:
                    began = time.monotonic()
                    log.info("%s: %d of %d fits", self.what, jobs - len(todo) + first + len(here), jobs)
        return table

    def _save(self, at_once: bool) -> HpcsslError | None:
        context = self.context
        if not context.world.main or context.state is None or not (at_once or
                                                                   time.monotonic() - self._saved >= EVERY_S):
            return None
        try:
            state.write(context.state, context.identity, self._kept | self.tables, {})
        except OSError as error:
            return as_error(error)
        self._saved = time.monotonic()
        return None


def _deaf(work: Callable[..., Sequence[float]], *arguments) -> Sequence[float]:
    """``work``, in a process that leaves the stopping signals to its rank: SLURM, ``timeout`` and the keyboard send
    them to every process of a group."""
    for number in (*STOPPING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    return work(*arguments)
