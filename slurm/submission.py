"""Resolving a submission: everything that can be checked before a job exists.

The recipe is composed once and each shard index is opened once, here. ``submit`` gets both, and opens nothing again:
an index may be remote.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcssl import config
from hpcssl.errors import ConfigError, suggest
from hpcssl.run_dir import RunDir
from slurm.backend import profiles, resources
from slurm.log import job_log
from slurm.log.job_log import SbatchOptions
from slurm.manage import evaluations
from slurm.manage.evaluations import EvalRequest

if TYPE_CHECKING:  # these import torch, which the other commands do not wait for
    from hpcssl.data.shards import ShardSet
    from hpcssl.train.recipe import Recipe, RecipeSource
    from hpcssl.train.start.branch import RunBranch


MAX_NAME_BYTES = 255
"""Longest name of a file or folder, on every file system in use."""
MAX_PATH_BYTES = 4095 - MAX_NAME_BYTES
"""Longest path of a run folder: Linux's limit, less room for what is in the folder. SLURM has no lower one (measured:
a job with its logs in a folder of 4020 bytes ran)."""


@dataclass(frozen=True, kw_only=True)
class SubmissionRequest:
    """A command line of ``hpcssl-submit submit``.

    Attributes:
        run: The run folder.
        recipe: Name of a packaged recipe, path of a YAML file, or values (``hpcssl.train.recipe.compose``).
        overrides: Recipe values as ``key=value``, or as nested dicts.
        evals: The text of ``--evals``; empty for none.
        eval_every: Epochs between two concurrent evaluations; 0 for none.
        sbatch: Options of sbatch for the training.
        eval_sbatch: Options of sbatch by the name of the evaluation; under an empty name, those of all evaluations.
        profile: The cluster profile.
        local: Whether to run on this machine, without SLURM.
        allow_pipe: Whether ``data.train`` may be a shell command.
        parent: The checkpoint of another run to start from, as ``RUN[@STEP]``; None for none. Its recipe is the base,
            and ``recipe`` is empty.
    """

    run: str
    recipe: RecipeSource
    overrides: config.Overrides = ()
    evals: str = ""
    eval_every: int = 0
    sbatch: SbatchOptions = field(default_factory=dict)
    eval_sbatch: dict[str, SbatchOptions] = field(default_factory=dict)
    profile: profiles.Profile = field(default_factory=profiles.Profile)
    local: bool = False
    allow_pipe: bool = False
    parent: str | None = None

    @property
    def kind(self) -> str:
        """The kind of its jobs, ``local`` or ``slurm``."""
        return "local" if self.local else "slurm"


@dataclass(frozen=True)
class ResolvedEvaluation:
    """One requested evaluation, with what it needs.

    Attributes:
        request: The evaluation, normalized.
        options: Its option values that differ from the defaults.
        sets: Its opened shard sets (``hpcssl.evals.resolve.resolve_evaluation``).
    """

    request: EvalRequest
    options: dict[str, Any]
    sets: dict[str, ShardSet]


@dataclass(frozen=True)
class Submission:
    """A request that has passed all checks.

    Attributes:
        request: The request.
        run: The run folder.
        recipe: The recipe.
        shards: The training shards.
        evaluations: The evaluations of the last weights, by text.
        options: Options of sbatch by ``what``: of the training, then of its evaluations.
        every: Steps between two concurrent evaluations; 0 for none.
        last: The last step of the training.
        branch: The checkpoint of another run that has to be copied into the run folder; None for none.
    """

    request: SubmissionRequest
    run: RunDir
    recipe: Recipe
    shards: ShardSet
    evaluations: dict[str, ResolvedEvaluation]
    options: dict[str, SbatchOptions]
    every: int
    last: int
    branch: RunBranch | None = None


def resolve_submission(request: SubmissionRequest) -> Submission:
    """Parse, resolve and check a request, without writing anything.

    Raises:
        ConfigError: The recipe, an option or an evaluation is invalid.
        DataError: Shards cannot be read.
        EvalError: An evaluation cannot score its shards.
        WorldError: This number of processes cannot run the recipe.
    """
    from hpcssl.preparation import branches
    from hpcssl.preparation.checks import check_start
    from hpcssl.train.checks.data_set import count_steps
    from hpcssl.train.data import open_train_shards

    run = _parse_run_folder(request.run)
    eval_requests = evaluations.parse_requests(request.evals)
    train = request.profile.to_sbatch_options() | request.sbatch
    size = resources.count_local_tasks(train) if request.local else resources.count_processes(train)
    recipe, start = branches.compose_start(request.recipe, request.overrides, run, parent=request.parent)
    shards = open_train_shards(recipe, allow_pipe=request.allow_pipe)
    val = check_start(recipe, shards, run, world_size=size, is_branch=request.parent is not None)
    start = branches.compare_branch(start, recipe, shards)
    resolved = _resolve_evaluations(eval_requests, recipe, shards, val)
    options = _derive_options(request, train, [evaluation.request for evaluation in resolved])
    if request.eval_every:  # the weights that concurrent evaluations score must be exported
        export_epochs = gcd(recipe.machine.export_epochs, request.eval_every)
        recipe = replace(recipe, machine=replace(recipe.machine, export_epochs=export_epochs))
    last, steps_per_epoch = count_steps(recipe, len(shards)), len(shards) // recipe.optim.batch
    evaluations.check_period(request.eval_every, last / steps_per_epoch)
    return Submission(
        request,
        run,
        recipe,
        shards,
        {str(evaluation.request): evaluation for evaluation in resolved},
        options,
        every=request.eval_every * steps_per_epoch,
        last=last,
        branch=start,
    )


def _parse_run_folder(path: str) -> RunDir:
    run = RunDir(Path(path).expanduser())
    if re.search(r"[%\\]", str(run.root)) or not str(run.root).isprintable():
        raise ConfigError(
            "option --run",
            got=repr(path),
            expected="a path without %, \\ and control characters, which SLURM would replace in the names of logs",
            fix="choose another folder name",
        )
    name = max(run.root.parts, key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(name)) > MAX_NAME_BYTES or len(os.fsencode(run.root)) > MAX_PATH_BYTES:
        raise ConfigError(
            "option --run",
            got=f"a path of {len(os.fsencode(run.root))} bytes with a name of {len(os.fsencode(name))}",
            expected=f"at most {MAX_PATH_BYTES}, and {MAX_NAME_BYTES} in each name",
            fix="choose a shorter path",
        )
    if run.root.exists() and not run.root.is_dir():
        raise ConfigError(
            "option --run", got=f"{path}, which is a file", expected="a folder", fix="choose another path"
        )
    return run


def _resolve_evaluations(
    requests: list[EvalRequest], recipe: Recipe, shards: ShardSet, val: ShardSet | None
) -> list[ResolvedEvaluation]:
    """Check names and options of evaluations, and open their shard sets. ``val``: the opened set of ``data.val``."""
    from hpcssl.evals.resolve import check_sets

    # an evaluation may not run a shell command, so it does not get the training shards of one either
    opened = {} if recipe.data.train.startswith("pipe:") else {_absolute(recipe.data.train): shards}
    if val is not None:
        opened[_absolute(recipe.data.val)] = val
    by_identity: dict[str, ResolvedEvaluation] = {}
    for request in requests:
        evaluation = _resolve_evaluation(request, recipe, opened)
        check_sets(request.name, evaluation.options, evaluation.sets)
        identity = _compute_identity(evaluation)
        if identity in by_identity:
            raise ConfigError(
                "option --evals",
                got=f"{by_identity[identity].request} and {request}, which are the same evaluation",
                expected="each evaluation once",
                fix="leave out one of them",
            )
        by_identity[identity] = evaluation
    return list(by_identity.values())


def _resolve_evaluation(request: EvalRequest, recipe: Recipe, opened: dict[str, ShardSet]) -> ResolvedEvaluation:
    """Resolve one evaluation. ``opened``: shard sets by folder; those opened here are added."""
    from hpcssl.evals.registry import EVALS
    from hpcssl.evals.resolve import resolve_evaluation

    if request.name not in EVALS or request.step is not None:
        raise ConfigError(
            "option --evals",
            got=repr(str(request)),
            expected="names of evaluations, separated by commas",
            fix=suggest(request.name, EVALS),
        )
    evaluation = EVALS[request.name]
    request = evaluations.normalize(request, _find_list_options(evaluation.options))
    folders = dict(request.shards)
    if evaluation.open_sets is None:  # it has no data sets of its own
        if not (folders.get("val") or recipe.data.val):
            raise ConfigError(
                "data.val",
                got="no folder",
                expected=f"shards for {request.name} to score",
                fix="add data.val=FOLDER to the command, or leave out --evals",
            )
        folders = {"train": _absolute(recipe.data.train), "val": _absolute(recipe.data.val), **folders}
    shards = {role: opened.get(folder, folder) for role, folder in folders.items()}
    options, sets = resolve_evaluation(
        request.name,
        config.as_dict(recipe),
        train=shards.get("train"),
        val=shards.get("val"),
        overrides=request.overrides,
    )
    opened.update({folder: sets[role] for role, folder in folders.items()})
    return ResolvedEvaluation(request, options, sets)


def _compute_identity(evaluation: ResolvedEvaluation) -> str:
    """A digest of what decides the scores, apart from the weights: equal ones would compute the same rows."""
    from hpcssl.evals.resolve import load_options

    name = evaluation.request.name
    options = config.as_dict(load_options(name, evaluation.options))
    digests = {role: shards.digest for role, shards in evaluation.sets.items()}
    return config.fingerprint({"eval": name, **digests, "options": options})


def _find_list_options(options: type) -> Mapping[str, bool]:
    """Whether each option of an evaluation is a list, or may be one."""
    return {
        name: list in (hint, *map(typing.get_origin, (hint, *typing.get_args(hint))))
        for name, hint in typing.get_type_hints(options).items()
    }


def _absolute(folder: str) -> str:
    """The absolute path of a folder; an address as it is."""
    from hpcssl.data.address import is_remote

    return folder if not folder or is_remote(folder) else str(Path(folder).absolute())


def _derive_options(
    request: SubmissionRequest, train: SbatchOptions, requests: list[EvalRequest]
) -> dict[str, SbatchOptions]:
    """Options of sbatch by ``what``, checked."""
    overrides, names = request.eval_sbatch, {evaluation.name for evaluation in requests}
    if unknown := overrides.keys() - {"", *names}:
        raise ConfigError(
            "option --eval-sbatch",
            got=f"options for {min(unknown)}, which is not in --evals",
            expected="the name of an evaluation in --evals",
            fix=suggest(min(unknown), names) if names else "add --evals",
        )
    options = {job_log.TRAIN: train}
    for evaluation in requests:
        own = overrides.get("", {}) | overrides.get(evaluation.name, {})
        options[str(evaluation)] = resources.derive_evaluation_options(train, own)
        resources.add_dependency("JOBID", options[str(evaluation)])  # refuses what cannot be combined
    for sbatch in options.values():  # each of these refuses values that it cannot read
        resources.get_warning_signal(sbatch)
        resources.count_tasks_per_node(sbatch)
        resources.count_nodes(sbatch)
        resources.count_spare_nodes(sbatch)
    return options
