"""Submitting a run: resolve and refuse first, then freeze the code, then hand over to SLURM or its local twin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hpcssl.errors import ConfigError, SubmitError, nearest
from hpcssl.files import RunDir
from slurm import cluster, freeze, local, records, sched, script, shape

EVALS = ("knn", "linear")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for, with sbatch's options apart."""

    run: str
    recipe: str
    overrides: list[str] = field(default_factory=list)
    evals: list[str] = field(default_factory=list)
    sbatch: dict[str, str | bool] = field(default_factory=dict)
    eval_sbatch: dict[str, str | bool] = field(default_factory=dict)
    profile: cluster.Profile = field(default_factory=cluster.Profile)
    local: bool = False


@dataclass(frozen=True)
class Plan:
    """A request that nothing speaks against: where, and sbatch's options of each job in order."""

    run: RunDir
    jobs: dict[str, dict]


def plan(request: Request) -> Plan:
    """Check everything that can be checked before a job exists. Raises members of ``HpcsslError``."""
    run = _folder(request.run)
    _check_recipe(request)
    train = request.profile.options() | request.sbatch
    if request.local:
        shape.local_tasks(train)
    jobs = {records.TRAIN: train} | {name: shape.evaluation(train, request.eval_sbatch) for name in request.evals}
    for sbatch in jobs.values():
        shape.signal(sbatch), shape.tasks_per_node(sbatch), shape.nodes(sbatch)  # each refuses what it cannot read
    return Plan(run, jobs)


def texts(request: Request) -> str:
    """What ``--dry-run`` prints: every batch script, the chained ones waiting for ``JOBID``."""
    planned = plan(request)
    parts = []
    for what, sbatch in planned.jobs.items():
        if what != records.TRAIN:
            sbatch = sbatch | {"dependency": "afterok:JOBID"}
        parts.append(f"# ---- {what}\n{script.text(planned.run, what, sbatch, request.profile)}")
    return "\n".join(parts)


def submit(request: Request) -> list[records.Job]:
    """Submit the training and its chained evaluations; the jobs, training first. Empty for a finished run.

    One submission of a run at a time; a run with a living job is refused, and one that has ended continues.
    """
    from hpcssl import run as runs  # imports torch, which no other verb waits for

    if not request.local:
        sched.require()
    planned = plan(request)
    run = planned.run
    with records.locked(run):
        _refuse_living(run)
        runs.resolve(request.recipe, request.overrides, run, write=True)
        stamp = freeze.freeze(run)
        run.logs.mkdir(parents=True, exist_ok=True)
        wanted = {k: v for k, v in planned.jobs.items() if k != records.TRAIN or not run.done.exists()}
        if not wanted:
            return []
        if request.local:
            return local.launch(run, wanted, commit=stamp)
        return _through_sbatch(run, wanted, request.profile)


def _through_sbatch(run: RunDir, wanted: dict[str, dict], profile: cluster.Profile) -> list[records.Job]:
    parent, jobs = None, []
    for what, sbatch in wanted.items():
        if parent is not None:
            sbatch = sbatch | {"dependency": f"afterok:{parent}"}
        try:
            job = script.submit(run, what, sbatch, profile)
        except SubmitError:
            for before in jobs:  # half a chain is nothing that anybody asked for
                records.note(run, "cancel", before.job, why="the rest of its chain was refused")
                sched.call("scancel", before.job, cluster=before.cluster)
            raise
        jobs.append(records.Job(job, what, "slurm", sbatch))
        parent = job if what == records.TRAIN else parent
    return jobs


def _folder(path: str) -> RunDir:
    run = RunDir(Path(path).expanduser())
    if "%" in str(run.root) or not str(run.root).isprintable():
        raise ConfigError("option --run", got=repr(path), expected="a path without % and control characters, which "
                          "SLURM would replace in the names of logs", mend="choose another folder name")
    if run.root.exists() and not run.root.is_dir():
        raise ConfigError("option --run", got=f"{path}, which is a file", expected="a folder",
                          mend="choose another path")
    return run


def _check_recipe(request: Request) -> None:
    """Refuse now what a job would find out on 64 GPUs. Raises ``ConfigError``, ``DataError``."""
    from hpcssl import run as runs
    from hpcssl.data.shards import ShardSet
    from hpcssl.evals.run import EVALS
    from hpcssl.train.main import open_shards

    recipe = runs.compose(request.recipe, request.overrides)
    open_shards(recipe)
    for name in request.evals:
        if name not in EVALS:
            raise ConfigError("option --evals", got=repr(name), expected="names of evaluations, with commas",
                              mend=nearest(name, EVALS))
        if request.evals.count(name) > 1:
            raise ConfigError("option --evals", got=",".join(request.evals), expected="each evaluation once",
                              mend="leave out the second mention")
        if not recipe.data.val:
            raise ConfigError("data.val", got="no folder", expected=f"shards for {name} to score on",
                              mend="add data.val=FOLDER to the command, or leave out --evals")
    if recipe.data.val:
        ShardSet.open(recipe.data.val)


def _refuse_living(run: RunDir) -> None:
    for job in records.submitted(run).values():
        state = local.ask(run, job) if job.local else sched.ask(job.job, job.cluster)
        if state.live:
            raise SubmitError(f"run {run.root}", got=f"job {job.job} ({job.what}) is {state.name}",
                              expected="no job of this run in the queue",
                              mend=f"wait for it (hpcssl-submit status {run.root}), or cancel it")
