"""The trials of a search, in the journal of an Optuna study. Optuna is imported here only, and needed nowhere else.

A trial is appended with all of its values in one line, so that it exists as a whole or not at all. Its values are drawn
in a copy of the study in memory, by a sampler whose seed depends on the number of the trial: what a sampler proposes
depends on the trials that are there, and not on how often a command was interrupted.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcssl import rng
from hpcssl.errors import ConfigError, SubmitError
from slurm.sweep import space
from slurm.sweep.space import Axis

if TYPE_CHECKING:
    import optuna

FILE = "study.journal"
SAMPLERS = ("tpe", "random", "gp")
"""Samplers by name: tree-structured Parzen estimator, independent draws, Gaussian process."""
RUNNING, COMPLETE, PRUNED, FAILED = "RUNNING", "COMPLETE", "PRUNED", "FAIL"
"""States of a trial, as Optuna calls them."""
PROPOSALS = 10
"""How often a sampler may propose a point that was tried, before one is drawn among those that were not."""
DRAWS = 100
"""Independent draws that look for a new point of a space that is too large to be listed."""
LOCK_S = 10
"""Seconds after which a lock of the journal counts as left behind."""
_NAME = "hpcssl"
_PRUNE, _REASON = "prune", "reason"  # user attributes of a trial


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: Its number, from 0.
        state: ``RUNNING`` from the proposal on, then ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        point: Its values as they are written in a recipe, by key.
        score: The objective of a complete trial; None for any other.
        reported: Its intermediate scores by epoch.
        is_to_be_pruned: Whether it was decided to cancel its run.
        reason: Why it failed; empty if it did not.
    """

    number: int
    state: str
    point: dict[str, str]
    score: float | None = None
    reported: dict[int, float] = field(default_factory=dict)
    is_to_be_pruned: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return space.name_trial(self.number, self.point)

    @property
    def values(self) -> tuple[str, ...]:
        """Its values as ``key=value``."""
        return tuple(f"{key}={value}" for key, value in self.point.items())


def require_optuna() -> None:
    """Raise ``ConfigError`` if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "option --sampler",
            got="no package optuna",
            expected="an environment with it",
            fix="pip install 'hpcssl[sweep]', or leave out --sampler and write the values with commas",
        )


class Study:
    """The study of a search. One process uses it at a time, under the lock of the folder.

    Args:
        root: The folder of the runs. The journal is created if it is missing, unless ``read_only``.
        axes: The search space.
        sampler: One of ``SAMPLERS``.
        seed: Seed of the sampler.
        read_only: Whether nothing may be written.

    Raises:
        SubmitError: The journal is damaged.
    """

    def __init__(self, root: Path, axes: Sequence[Axis], sampler: str, seed: int, *, read_only: bool = False):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        self._optuna, self._axes, self._sampler, self._seed = optuna, {axis.key: axis for axis in axes}, sampler, seed
        path = root / FILE
        if not read_only:
            _cut_torn_line(path)
        try:
            # The lock is a file that is created with O_EXCL, which NFS has had since version 3. One that a killed
            # process has left is removed after LOCK_S: the lock of the folder keeps others away.
            lock = JournalFileOpenLock(str(path), grace_period=LOCK_S)
            self._storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
            if not read_only:
                optuna.create_study(storage=self._storage, study_name=_NAME, direction="maximize", load_if_exists=True)
            self._study = optuna.load_study(storage=self._storage, study_name=_NAME)
            self._id = self._storage.get_study_id_from_name(_NAME)
            self.trials()
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise SubmitError(
                f"study {path}",
                got=f"a journal that Optuna cannot read ({type(error).__name__}: {error})",
                expected="the file that hpcssl-submit wrote",
                fix="restore it from a copy; or move it away, and the search starts again from its first trial",
            ) from error

    def trials(self) -> list[Trial]:
        """Return all trials by number."""
        return [self._read_trial(trial) for trial in self._study.get_trials(deepcopy=False)]

    def propose(self) -> dict[str, str] | None:
        """Return the values of the next trial, which no earlier trial has; None if none was found.

        Nothing is stored. The same trials give the same values.
        """
        trials = self._study.get_trials(deepcopy=False)
        tried = [self._format(trial.params) for trial in trials]
        copy = self._optuna.create_study(direction="maximize")
        copy.add_trials(trials)
        distributions = self._distributions()
        is_finite = space.count_points(list(self._axes.values())) <= space.MAX_LISTED
        for attempt in range(PROPOSALS + (0 if is_finite else DRAWS)):
            name = self._sampler if attempt < PROPOSALS else "random"
            copy.sampler = self._make_sampler(name, rng.key(self._seed, "sampler", len(trials), attempt) % 2**32)
            point = self._format(copy.ask(distributions).params)
            if point not in tried:
                return point
        left = [p for p in space.list_points(list(self._axes.values())) if p not in tried] if is_finite else []
        if not left:
            return None
        return left[rng.key(self._seed, "untried", len(trials)) % len(left)]

    def add(self, point: Mapping[str, str], *, failed: str = "") -> Trial:
        """Append a trial, which runs from now on.

        Args:
            point: Its values, from ``propose``.
            failed: Why it has failed already, since no run can have these values; empty if it has not.
        """
        state = self._optuna.trial.TrialState
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state.FAIL if failed else state.RUNNING,
                params={key: self._parse(key, value) for key, value in point.items()},
                distributions=self._distributions(),
                user_attrs={_REASON: failed} if failed else {},
            )
        )
        return self.trials()[-1]

    def report(self, number: int, epoch: int, score: float) -> bool:
        """Store an intermediate score of a trial, and return whether it falls behind the median of the others.

        The best score so far is compared with the median of what the complete trials had at this epoch. Nothing is
        pruned before five trials are complete.
        """
        trial_id = self._find_id(number)
        self._storage.set_trial_intermediate_value(trial_id, epoch, score)
        return self._optuna.pruners.MedianPruner().prune(self._study, self._storage.get_trial(trial_id))

    def request_pruning(self, number: int) -> None:
        """Record that the run of a trial is to be cancelled, before it is."""
        self._storage.set_trial_user_attr(self._find_id(number), _PRUNE, True)

    def complete(self, number: int, score: float) -> None:
        """Store the objective of a trial."""
        self._study.tell(number, score)

    def prune(self, number: int) -> None:
        """Record that the run of a trial was cancelled, since it had fallen behind."""
        self._study.tell(number, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial has failed."""
        self._storage.set_trial_user_attr(self._find_id(number), _REASON, reason)
        self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    def _find_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _read_trial(self, trial: optuna.trial.FrozenTrial) -> Trial:
        return Trial(
            trial.number,
            trial.state.name,
            self._format(trial.params),
            trial.value if trial.state.name == COMPLETE else None,
            dict(trial.intermediate_values),
            bool(trial.user_attrs.get(_PRUNE)),
            str(trial.user_attrs.get(_REASON, "")),
        )

    def _format(self, params: Mapping[str, Any]) -> dict[str, str]:
        return {key: axis.format(params[key]) for key, axis in self._axes.items()}

    def _parse(self, key: str, value: str) -> str | int | float:
        axis = self._axes[key]
        return value if axis.choices else int(value) if axis.is_int else float(value)

    def _distributions(self) -> dict[str, Any]:
        kinds = self._optuna.distributions
        distributions: dict[str, Any] = {}
        for key, axis in self._axes.items():
            if axis.choices:
                distributions[key] = kinds.CategoricalDistribution(axis.choices)
            elif axis.is_int:
                distributions[key] = kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
            else:
                distributions[key] = kinds.FloatDistribution(axis.low, axis.high, log=axis.log)
        return distributions

    def _make_sampler(self, name: str, seed: int) -> Any:
        samplers = self._optuna.samplers
        if name == "random":
            return samplers.RandomSampler(seed=seed)
        # trials whose result is not there yet count as bad ones, so that others are not proposed beside them
        return samplers.GPSampler(seed=seed) if name == "gp" else samplers.TPESampler(seed=seed, constant_liar=True)


def read_trials(root: Path, axes: Sequence[Axis]) -> list[Trial]:
    """Return the trials of a folder without writing anything; none before the first one.

    Raises:
        SubmitError: The journal is damaged.
    """
    path = root / FILE
    if not path.exists() or not path.stat().st_size:
        return []
    return Study(root, axes, SAMPLERS[0], 0, read_only=True).trials()


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that a killed process or a full disk has left without its end.

    Optuna would append to it, and could read neither that line nor any later one.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with open(path, "r+b") as file:
            file.truncate(end)
