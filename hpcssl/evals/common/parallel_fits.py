"""Many independent fits of one evaluation, distributed over ranks and worker processes.

A fit is a number, and its result is one row of a table that depends on this number only. The results are therefore the
same on any number of ranks. Finished rows are kept in the evaluation's state file: a kill loses the fits in progress
and those finished within the last ``SAVE_PERIOD_S`` seconds.

Shapes: J fits, K numbers per fit.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import Tensor

from hpcssl.distributed.world import World
from hpcssl.errors import EvalError, HpcsslError
from hpcssl.evals.common import state
from hpcssl.evals.common.sync import StopCheck, as_eval_error, raise_on_any_rank
from hpcssl.signals import STOPPING
from hpcssl.terminal.progress import ProgressLog

SAVE_PERIOD_S = 5.0


class ParallelFits:
    """The result tables of one evaluation. The constructor reads what an earlier attempt finished.

    Args:
        what: Name of the evaluation in messages.
        world: The processes that share the work.
        stop: Whether this process was asked to stop.
        state_file: File that keeps finished rows, or None.
        identity: Identity of the evaluation, see ``state.write``.
    """

    def __init__(self, what: str, *, world: World, stop: StopCheck, state_file: Path | None, identity: str) -> None:
        self.what, self.world, self.stop, self.state_file, self.identity = what, world, stop, state_file, identity
        self.tables: dict[str, Tensor] = {}
        saved = state.read(state_file, identity) if world.is_main else None
        self._saved: dict[str, Tensor] = saved[0] if saved else {}
        self._saved_at = time.monotonic()

    def table(
        self,
        name: str,
        fits: int,
        width: int,
        fit: Callable[..., Sequence[float]],
        *arguments: Any,
        workers: int = 1,
    ) -> Tensor:
        """Compute a table of results. A collective.

        Neighboring fits should take about as long as each other, since ranks wait for one another after each round.

        Args:
            name: Name of the table in the state file.
            fits: Number of fits, J.
            width: Numbers per fit, K.
            fit: ``fit(*arguments, j)`` returns the K numbers of fit j. With several workers, a module-level function.
            *arguments: First arguments of ``fit``.
            workers: Processes of this rank that fit at the same time, each with one thread. 1 for this process alone.

        Returns:
            float64 [J, K]; row j is the result of fit j.

        Raises:
            EvalError: What a fit raised on one rank, on every rank.
            Stopped: After a request to stop.
        """
        world, table = self.world, self._saved_table(name, fits, width)
        self.tables[name] = table
        missing = table.isnan().any(1).nonzero()[:, 0].tolist()
        # ranks may have different numbers of cores, and must agree on which rank takes which fit
        most = min(map(int, world.all_gather_text(str(workers))))
        workers = min(workers, most, max(1, -(-len(missing) // world.size)))
        fit = functools.partial(_ignore_stop_signals, fit) if workers > 1 else fit
        round_size, done = workers * world.size, fits - len(missing)
        progress = ProgressLog(f"{self.what}, {name}", fits, "fits", first=done)
        with joblib.Parallel(workers, mmap_mode="r") as pool:
            for first in range(0, len(missing), round_size):
                numbers = missing[first : first + round_size]
                mine = numbers[world.rank * workers : (world.rank + 1) * workers]
                rows = torch.full((workers, width), float("nan"), dtype=torch.float64)
                error = self._run_fits(pool, fit, arguments, mine, rows)
                table[numbers] = world.all_gather(rows.to(world.device)).cpu()[: len(numbers)]
                stop = self.stop()
                raise_on_any_rank(world, self.what, stop=stop, error=error or self._save(at_once=stop))
                progress.update(done + first + len(numbers))
        return table

    def _saved_table(self, name: str, fits: int, width: int) -> Tensor:
        """The table as an earlier attempt left it, NaN where a fit is missing, on every rank. A collective."""
        saved = self._saved.get(name)
        if saved is None or saved.shape != (fits, width):
            saved = torch.full((fits, width), float("nan"), dtype=torch.float64)
        return self.world.all_gather(saved[None].to(self.world.device))[0].cpu()

    def _run_fits(
        self,
        pool: joblib.Parallel,
        fit: Callable[..., Sequence[float]],
        arguments: tuple[Any, ...],
        numbers: list[int],
        rows: Tensor,
    ) -> HpcsslError | None:
        """Write the results of this rank's fits of one round into ``rows``; return the error, if any."""
        self.world.set_phase("evaluate", computing=True)
        try:
            results = pool(joblib.delayed(fit)(*arguments, number) for number in numbers)
            rows[: len(numbers)] = torch.tensor(results, dtype=torch.float64).view(len(numbers), rows.shape[1])
        except (HpcsslError, OSError) as caught:
            return as_eval_error(caught)
        except TerminatedWorkerError:
            # a stop signal may reach a worker before it ignores these signals: the next attempt repeats its fits
            if self.stop():
                return None
            return EvalError(
                self.what,
                got="a worker process was killed, possibly for lack of memory",
                expected=f"memory for {len(numbers)} fits at once on each rank",
                fix="request more memory or fewer cores, then run the command again; finished fits are kept",
            )
        return None

    def _save(self, at_once: bool) -> HpcsslError | None:
        """Write the state file on rank 0 if it is due; return the error, if any."""
        if not self.world.is_main or self.state_file is None:
            return None
        if not at_once and time.monotonic() - self._saved_at < SAVE_PERIOD_S:
            return None
        try:
            state.write(self.state_file, self.identity, self._saved | self.tables, {})
        except OSError as error:
            return as_eval_error(error)
        self._saved_at = time.monotonic()
        return None


def _ignore_stop_signals(fit: Callable[..., Sequence[float]], *arguments: Any) -> Sequence[float]:
    """Run ``fit`` in a worker process that leaves the stop signals to its rank.

    SLURM, ``timeout`` and the keyboard send these signals to every process of the group.
    """
    for number in (*STOPPING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    return fit(*arguments)
