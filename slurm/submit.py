"""Submitting a run: resolve and refuse first, then freeze the code, then hand over to SLURM or its local twin.

Asking for the same again submits only what is missing: neither a job that lives nor an evaluation whose row is there.
"""

from __future__ import annotations

import sys
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpcssl import config
from hpcssl.errors import ConfigError, SubmitError, nearest
from hpcssl.files import RunDir
from slurm import beside, chain, cluster, control, freeze, local, records, sched, script, shape, trust, watch


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for, with sbatch's options apart. ``evals``: the text of ``--evals``. ``eval_every``:
    epochs between two evaluations beside the training, 0 for none. ``eval_sbatch``: options of sbatch by evaluation,
    those of all under ''. ``allow_pipe``: ``data.train`` may be a shell command."""

    run: str
    recipe: str
    overrides: list[str] = field(default_factory=list)
    evals: str = ""
    eval_every: int = 0
    sbatch: dict[str, str | bool] = field(default_factory=dict)
    eval_sbatch: dict[str, dict[str, str | bool]] = field(default_factory=dict)
    profile: cluster.Profile = field(default_factory=cluster.Profile)
    local: bool = False
    allow_pipe: bool = False

    @property
    def kind(self) -> str:
        return "local" if self.local else "slurm"


@dataclass(frozen=True)
class Plan:
    """A request that nothing speaks against. ``jobs``: sbatch's options of the training and of the evaluations of its
    last weights; ``every`` and ``last``: steps between two evaluations beside the training, and of all of it."""

    run: RunDir
    overrides: list[str]
    jobs: dict[str, dict]
    every: int
    last: int


def plan(request: Request) -> Plan:
    """Check everything that can be checked before a job exists. Raises members of ``HpcsslError``."""
    run = _folder(request.run)
    train = request.profile.options() | request.sbatch
    overrides, entries, every, last = _check_recipe(
        request, shape.local_tasks(train) if request.local else shape.processes(train))
    given = request.eval_sbatch
    if unknown := given.keys() - {"", *(e.name for e in entries)}:
        raise ConfigError("option --eval-sbatch", got=f"options for {min(unknown)}", expected="those of --evals",
                          mend=nearest(min(unknown), {e.name for e in entries}) if entries else "add --evals")
    jobs = {records.TRAIN: train} | {
        str(e): shape.evaluation(train, given.get("", {}) | given.get(e.name, {})) for e in entries}
    for what, sbatch in jobs.items():
        shape.signal(sbatch), shape.tasks_per_node(sbatch), shape.nodes(sbatch)  # each refuses what it cannot read
        if what != records.TRAIN:
            shape.after("JOBID", sbatch)
    return Plan(run, overrides, jobs, every, last)


def texts(request: Request) -> str:
    """What ``--dry-run`` prints: every batch script, the chained ones waiting for ``JOBID``, those
    beside the training for the weights of ``STEP``."""
    planned = plan(request)
    parts = []
    for what, sbatch in planned.jobs.items():
        if what == records.TRAIN:
            parts.append((what, sbatch))
            continue
        parts.append((what, shape.after("JOBID", sbatch)))
        if planned.every:
            name, colon, options = what.partition(":")
            parts.append((f"{name}@STEP{colon}{options}", shape.beside(sbatch)))
    return "\n".join(f"# ---- {what}\n{script.text(planned.run, what, sbatch, request.profile)}"
                     for what, sbatch in parts)


def submit(request: Request) -> list[records.Job]:
    """Submit what is missing of the training and its evaluations; the new jobs, training first.

    One submission of a run at a time. A run that has ended early continues, with today's code; evaluations that are
    still in the queue are asked for anew. While the training lives, or an evaluation of a finished run, evaluations
    can be added: ``SubmitError`` where the recipe has changed.
    """
    from hpcssl import run as runs  # imports torch, which no other verb waits for

    if not request.local:
        sched.require()
    planned = plan(request)
    run = planned.run
    with records.locked(run):
        trust.secure(run.root)
        living = _living(run)
        training = not run.finished and records.TRAIN not in living
        recipe = runs.resolve(request.recipe, planned.overrides, run, write=training or not living,
                              allow_pipe=request.allow_pipe)
        if training:  # they wait for a training that did not succeed, or hold on to its code
            for job in living.values():
                control.end(run, job)
            living = {}
        if living:
            _refuse_change(run, recipe, next(iter(living.values())), request)
        wanted = {what: sbatch for what, sbatch in planned.jobs.items() if (
            training if what == records.TRAIN else what not in living and (
                not run.finished or _missing(run, chain.entry(what))))}
        _write_chain(run, planned, request, keep=not training)
        again = [e for e in chain.beside(run) if planned.every and str(replace(e, step=None)) in planned.jobs
                 and str(e) not in living and _missing(run, e)]
        if not wanted and not again:
            return []
        if not living:
            freeze.freeze(run)
        if request.allow_pipe:
            records.allow_pipe(run, recipe.data.train)
        parent = living.get(records.TRAIN)
        jobs = local.launch(run, wanted) if request.local and wanted else \
            _through_sbatch(run, wanted, request.profile, parent.job if parent else None)
        # a running training looks for these itself: only what it has submitted before, and in vain, is left to us
        return jobs + beside.submit(run, again if run.finished else [e for e in again if e not in chain.due(run)])


def _through_sbatch(run: RunDir, wanted: dict[str, dict], profile: cluster.Profile,
                    parent: str | None = None) -> list[records.Job]:
    jobs = []
    for what, sbatch in wanted.items():
        if parent is not None:
            sbatch = shape.after(parent, sbatch)
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


def _check_recipe(request: Request, processes: int | None) -> tuple[list[str], list[chain.Entry], int, int]:
    """Refuse now what a job would find out on 64 GPUs: overrides, entries, and the steps that ``Plan`` holds.

    Raises ``ConfigError``, ``DataError``, and ``WorldError`` where so many ``processes`` cannot run the recipe.
    """
    from math import gcd

    from hpcssl import run as runs
    from hpcssl.optim.schedule import total_steps
    from hpcssl.train import worlds
    from hpcssl.train.data import open_shards, open_val

    recipe, overrides = runs.compose(request.recipe, request.overrides), list(request.overrides)
    if processes is not None:
        worlds.check(recipe, processes)
    shards = open_shards(recipe, allow_pipe=request.allow_pipe)
    entries = _entries(request, recipe)
    if recipe.data.val:
        open_val(recipe)
    per_epoch = len(shards) // recipe.optim.batch
    if request.eval_every:
        overrides.append(f"machine.export_epochs={gcd(recipe.machine.export_epochs, request.eval_every)}")
    return overrides, entries, request.eval_every * per_epoch, total_steps(recipe.schedule, per_epoch)


def _entries(request: Request, recipe) -> list[chain.Entry]:
    """The evaluations asked for, with options that they have, each once. Raises ``ConfigError``, ``DataError``."""
    from hpcssl.evals.run import EVALS, check_sets, question

    found: dict[str, chain.Entry] = {}
    for asked in chain.parse(request.evals):
        if asked.name not in EVALS or asked.step is not None:
            raise ConfigError("option --evals", got=repr(str(asked)), expected="names of evaluations, with commas",
                              mend=nearest(asked.name, EVALS))
        kinds = {name: list in (hint, *map(typing.get_origin, (hint, *typing.get_args(hint))))
                 for name, hint in typing.get_type_hints(EVALS[asked.name].options).items()}
        entry = chain.settled(asked, kinds)
        values = config.as_dict(recipe)
        if EVALS[asked.name].split is None and not (entry.shards.get("val") or recipe.data.val):
            raise ConfigError("data.val", got="no folder", expected=f"shards for {asked.name} to score on",
                              mend="add data.val=FOLDER to the command, or leave out --evals")
        options, sets = question(asked.name, values, overrides=entry.overrides, **entry.shards)
        check_sets(asked.name, options, sets)
        same = config.fingerprint({"eval": asked.name, **{k: s.digest for k, s in sets.items()}, "options":
                                   config.as_dict(config.load(EVALS[asked.name].options, options))})
        if same in found:
            raise ConfigError("option --evals", got=f"{found[same]} and {asked}, which mean the same",
                              expected="each evaluation once", mend="leave out one of them")
        found[same] = entry
    return list(found.values())


def _living(run: RunDir) -> dict[str, records.Job]:
    """Jobs of the run that are queued or running, by what they do. ``SubmitError`` where SLURM cannot be asked."""
    found = {}
    for what, job in records.submitted(run).items():
        state = watch.state_of(run, job)
        if state.name == "UNKNOWN":
            raise SubmitError(f"job {job.job} ({what})", got=state.note, expected="an answer of SLURM",
                              mend="see whether `sinfo` answers, and submit again")
        if state.live:
            found[what] = job
    return found


def _missing(run: RunDir, entry: chain.Entry) -> bool:
    """Whether a row is missing of what the job of this entry would measure."""
    from hpcssl.evals.run import missing

    step = "last" if entry.step is None else entry.step
    return bool(missing(entry.name, run, overrides=entry.overrides, step=step, **entry.shards))


def _refuse_change(run: RunDir, recipe, job: records.Job, request: Request) -> None:
    """What lives has read the recipe, and a job's kind is that of what it waits for."""
    from hpcssl.train import recipe as recipes

    changed = [name for name in config.differing(config.as_dict(recipe), config.as_dict(recipes.read(run.config)))
               if not (run.finished and name.startswith("machine."))]  # nobody will read these any more
    if changed or job.kind != request.kind:
        got = f"other values of {', '.join(changed)}" if changed else \
            f"a submission {'with' if request.local else 'without'} --local"
        raise SubmitError(f"run {run.root}", got=f"{got}, while job {job.job} ({job.what}) lives",
                          expected="no job of this run in the queue, or the same command",
                          mend=f"wait for it (hpcssl-submit status {run.root}), or cancel it")


def _write_chain(run: RunDir, planned: Plan, request: Request, keep: bool) -> None:
    """Note what is to be evaluated beside the training. ``keep``: beside what was asked for before."""
    entries = chain.read(run)["entries"] if keep else {}
    for what, sbatch in planned.jobs.items():
        if what != records.TRAIN and planned.every:
            entries[what] = {"every": planned.every, "sbatch": shape.beside(sbatch)}
    profile = replace(request.profile, python=request.profile.python or sys.executable)
    if entries or run.chain.exists():
        chain.write(run, entries, last=planned.last, kind=request.kind, profile=profile)
