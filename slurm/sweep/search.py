"""A search: a sweep whose points a sampler chooses, from the scores of the runs that are finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpcssl import config
from hpcssl.errors import ConfigError, require_choice
from slurm.log import job_log
from slurm.submission import Submission, SubmissionRequest
from slurm.sweep import cost, many, space, study
from slurm.sweep.cost import Cost
from slurm.sweep.folder import Definition, check_folder
from slurm.sweep.many import RunState
from slurm.sweep.objective import Objective, find_objective
from slurm.sweep.space import Axis
from slurm.sweep.study import Trial

MakeRequest = Callable[[Path, str, tuple[str, ...]], SubmissionRequest]
"""From run folder, recipe and values to a request."""
NO_TRIAL = 9999
"""A number that no trial has, for the names of runs that are checked and never submitted."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a search.

    Attributes:
        sampler: One of ``study.SAMPLERS``.
        seed: Seed of the sampler.
        trials: Number of trials of the whole search.
        objective: Column to maximize; empty for the default (``objective.find_objective``).
        prune: Whether runs that fall behind are cancelled.
        limit: Most trials whose result is missing; None for one.
    """

    sampler: str
    trials: int
    seed: int = 0
    objective: str = ""
    prune: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class SearchPlan:
    """A search that has passed all checks.

    Attributes:
        root: The folder of the runs.
        definition: What it is for.
        recipe: The recipe.
        shared: Values that all trials share.
        axes: The search space.
        options: The options, with the limit filled in.
        objective: What is maximized.
        make_request: Makes the request of a run.
        corners: Runs at the ends of the space, of which none is submitted: the checks, and the bound of the cost.
    """

    root: Path
    definition: Definition
    recipe: str
    shared: tuple[str, ...]
    axes: list[Axis]
    options: SearchOptions
    objective: Objective
    make_request: MakeRequest
    corners: list[Submission]

    @property
    def limit(self) -> int:
        """Most trials whose result is missing."""
        return self.options.limit or 1

    def resolve_trial(self, trial: Trial) -> Submission:
        """Resolve the run of a trial.

        Raises:
            HpcsslError: See ``submission.resolve_submission``.
        """
        values = (*self.shared, *trial.values)
        return many.resolve_run(self.make_request(self.root / trial.name, self.recipe, values), self.limit)


def make_options(
    sampler: str | None, trials: int | None, seed: int, objective: str, prune: bool, limit: int | None
) -> SearchOptions:
    """Return the options of a search from those of the command line.

    Raises:
        ConfigError: One of ``--sampler`` and ``--trials`` is missing, or there is no such sampler.
    """
    if sampler is None or trials is None:
        missing, example = ("--sampler", "tpe") if sampler is None else ("--trials", "20")
        raise ConfigError(
            "sweep",
            got=f"no {missing}",
            expected="--sampler and --trials, or neither of them and no --objective and --prune",
            fix=f"add {missing} {example}",
        )
    require_choice("option --sampler", sampler, study.SAMPLERS)
    return SearchOptions(sampler=sampler, trials=trials, seed=seed, objective=objective, prune=prune, limit=limit)


def resolve(
    root: Path, recipe: str, source: str, words: Sequence[str], make_request: MakeRequest, options: SearchOptions
) -> SearchPlan:
    """Check everything that can be checked before the first trial exists. Nothing is written.

    Args:
        root: The folder of the runs.
        recipe: The recipe.
        source: The recipe as the folder records it.
        words: Recipe values, ranges and lists (``space.parse_space``).
        make_request: Makes the request of a run.
        options: The options.

    Raises:
        ConfigError: An option, a range or a value is invalid, or the folder is another one's.
        HpcsslError: See ``submission.resolve_submission``.
    """
    study.require_optuna()
    shared, axes = _parse_space(recipe, words)
    points = space.count_points(axes)
    if options.trials > points:
        raise ConfigError(
            "option --trials",
            got=options.trials,
            expected=f"at most {points:.0f}, the number of points",
            fix=f"set --trials {points:.0f}, or leave out --sampler and --trials to run all of them",
        )
    options = replace(options, limit=options.limit or 1)
    corners = [
        many.resolve_run(
            make_request(
                root / space.name_trial(NO_TRIAL, point), recipe, (*shared, *(f"{k}={v}" for k, v in point.items()))
            ),
            options.limit,
        )
        for point in space.list_corners(axes)
    ]
    if corners[0].request.local:
        many.check_gpus(corners[0], options.limit or 1)
    objective = find_objective(corners[0], options.objective)
    if options.prune and not objective.pruning:
        raise ConfigError(
            "option --prune",
            got="a recipe without online k-NN",
            expected="scores during the training",
            fix="add evals.knn_every_epochs=10, or leave out --prune",
        )
    definition = Definition("search", source, tuple(sorted(shared)), _describe(axes, options, objective))
    check_folder(root, definition)
    return SearchPlan(root, definition, recipe, tuple(shared), axes, options, objective, make_request, corners)


def _parse_space(recipe: str, words: Sequence[str]) -> tuple[list[str], list[Axis]]:
    from hpcssl.train import recipe as recipes  # imports torch, which the other commands do not wait for

    def read_default(shared: Sequence[str], key: str) -> object:
        return config.lookup(recipes.compose(recipe, shared), key)

    return space.parse_space(words, read_default)


def _describe(axes: Sequence[Axis], options: SearchOptions, objective: Objective) -> tuple[str, ...]:
    """What decides the points and their order. The number of trials may grow."""
    words = [f"{axis.key}={axis.text}" for axis in axes]
    return *words, f"sampler={options.sampler}", f"sampler_seed={options.seed}", f"objective={objective.column}"


def describe(
    plan: SearchPlan, trials: Sequence[Trial], resolve_trial: Callable[[Trial], Submission], step_s: float | None
) -> list[str]:
    """Return what there is of a search, and what the rest costs at most, as lines of ``name: value``.

    Args:
        plan: The search.
        trials: Its trials.
        resolve_trial: From a trial to its submission.
        step_s: See ``cost.estimate``.
    """
    counts = Counter(trial.state for trial in trials)
    new = max(0, plan.options.trials - len(trials))
    lines = [
        f"trials: {max(plan.options.trials, len(trials))} ({counts[study.COMPLETE]} complete, "
        f"{counts[study.PRUNED]} pruned, {counts[study.FAILED]} failed, {counts[study.RUNNING]} open, {new} new)"
    ]
    kept = [trial for trial in trials if trial.state in (study.COMPLETE, study.RUNNING)]
    states = [many.query_run(resolve_trial(trial)) for trial in kept]
    if states or new:
        lines += estimate(plan, states, new, step_s).describe()
    if new:
        lines.append("these are bounds: each new trial counts as the point of the space that takes most")
    return [
        *lines,
        f"trials without a result: {plan.limit} at a time",
        f"objective: {plan.objective.column}, maximized",
    ]


def estimate(plan: SearchPlan, states: Sequence[RunState], new: int, step_s: float | None) -> Cost:
    """Estimate what is missing of a search.

    Args:
        plan: The search.
        states: The runs of its trials, without those that failed or were pruned.
        new: Number of trials that do not exist yet. Each counts as the corner of the space that takes most.
        step_s: See ``cost.estimate``.
    """
    bounds = []
    for corner in plan.corners if new else plan.corners[:1]:
        state = RunState(corner, [], [job_log.TRAIN, *corner.evaluations])
        bounds.append(cost.estimate([*states, *[state] * new], step_s))
    hours = [bound.device_hours for bound in bounds]
    return replace(
        max(bounds, key=lambda bound: bound.steps),
        device_hours=None if None in hours else max(hour for hour in hours if hour is not None),
        disk_bytes=max(bound.disk_bytes for bound in bounds),
    )
