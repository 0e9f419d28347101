"""The commands ``hpcssl-submit sweep`` and ``hpcssl-submit table``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcssl.cli_runner import print_message
from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from hpcssl.run_dir import RunDir
from hpcssl.terminal.arguments import split_recipe
from slurm.backend import profiles, resources, sbatch_options
from slurm.cli_options import AllowPipe, Cluster, EvalEvery, Evals, EvalSbatch, Local, Sbatch, SpareNodes
from slurm.log import job_log
from slurm.log.job_log import Job
from slurm.sweep import grid

if TYPE_CHECKING:
    from slurm.submission import SubmissionRequest
    from slurm.sweep.many import Plan, RunState
    from slurm.sweep.search import SearchPlan
    from slurm.sweep.trials import Progress

PROGRAM = "hpcssl-submit"

Out = Annotated[Path, typer.Option("--out", help="The folder of the runs. The same command adds what is missing.")]
Parallel = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="P", help="Most trainings that run at a time; by default all, with --local or --sampler one."
    ),
]
StepSeconds = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds per step, for the cost; by default what runs in the folder have measured."),
]
Wait = Annotated[
    bool, typer.Option("--wait", "-W", help="Follow the runs, and exit with the code of the first failure.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print runs and cost, and submit nothing.")]

Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="tpe|random|gp", help="Let a sampler of Optuna choose the values; ranges are then KEY=LOW..HIGH[:log]."
    ),
]
Trials = Annotated[
    int | None, typer.Option(min=1, max=grid.MAX_POINTS, metavar="N", help="Runs of the whole search, with --sampler.")
]
SamplerSeed = Annotated[int, typer.Option(min=0, help="Seed of the sampler.")]
ObjectiveName = Annotated[
    str,
    typer.Option(
        metavar="SCORE", help="What is maximized: a column of `hpcssl results`; by default 20-NN if it is one."
    ),
]
Prune = Annotated[
    bool, typer.Option("--prune", help="Cancel runs whose online k-NN falls behind the median of the finished ones.")
]


def sweep(
    ctx: typer.Context,
    out: Out,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE [KEY=VALUES]...",
            help="Recipe, then values: KEY=VALUE for all runs, KEY=VALUE,VALUE or KEY=FIRST..LAST to sweep; "
            "with --sampler also KEY=LOW..HIGH and KEY=LOW..HIGH:log of real numbers.",
        ),
    ] = None,
    sampler: Sampler = None,
    trials: Trials = None,
    objective: ObjectiveName = "",
    sampler_seed: SamplerSeed = 0,
    prune: Prune = False,
    parallel: Parallel = None,
    evals: Evals = "",
    eval_every: EvalEvery = 0,
    eval_sbatch: EvalSbatch = None,
    cluster: Cluster = None,
    sbatch: Sbatch = None,
    spare_nodes: SpareNodes = 0,
    local: Local = False,
    allow_pipe: AllowPipe = False,
    step_seconds: StepSeconds = None,
    wait: Wait = False,
    dry_run: DryRun = False,
) -> int:
    """Submit one run for each combination of recipe values, or for those that a sampler chooses."""
    from slurm.sweep import many
    from slurm.sweep.folder import Definition

    recipe, values = split_recipe(words or [], None)
    base = _make_request(ctx, evals, eval_every, eval_sbatch, cluster, sbatch, spare_nodes, local, allow_pipe)
    if sampler is not None or trials is not None or objective or prune:
        from slurm.sweep import search

        options = search.make_options(sampler, trials, sampler_seed, objective, prune, parallel)
        search_plan = search.resolve(out, recipe, _absolute_file(recipe), values, base, options)
        return _search(search_plan, step_seconds, wait=wait, dry_run=dry_run)
    shared, points = grid.parse_grid(values)
    names = tuple(point.name for point in points)
    definition = Definition("sweep", _absolute_file(recipe), tuple(sorted(shared)), names)
    requests = [base(out / p.name, recipe, (*shared, *p.values)) for p in points]
    return _submit(many.resolve(out, definition, requests, parallel), step_seconds, wait=wait, dry_run=dry_run)


def table(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="TABLE", help="A published table, such as nnclr.table1 or msf.imagenet; or a FILE.yaml like these."
        ),
    ],
    out: Out,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values for all runs.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, with the seeds from 0.")] = 1,
    parallel: Parallel = None,
    evals: Evals = "",
    eval_every: EvalEvery = 0,
    eval_sbatch: EvalSbatch = None,
    cluster: Cluster = None,
    sbatch: Sbatch = None,
    spare_nodes: SpareNodes = 0,
    local: Local = False,
    allow_pipe: AllowPipe = False,
    step_seconds: StepSeconds = None,
    wait: Wait = False,
    dry_run: DryRun = False,
) -> int:
    """Submit every packaged recipe of a published table with its evaluations; `hpcssl results OUT` fills the table."""
    from slurm.sweep import many, tables
    from slurm.sweep.folder import Definition

    columns, points = tables.list_points(name, seeds)
    evals = evals or tables.derive_evaluations(columns)
    base = _make_request(ctx, evals, eval_every, eval_sbatch, cluster, sbatch, spare_nodes, local, allow_pipe)
    values = tuple(words or [])
    definition = Definition("table", _absolute_file(name), tuple(sorted(values)))
    requests = [base(out / p.name, p.values[0], (*values, *p.values[1:])) for p in points]
    return _submit(many.resolve(out, definition, requests, parallel), step_seconds, wait=wait, dry_run=dry_run)


def _make_request(
    ctx: typer.Context,
    evals: str,
    eval_every: int,
    eval_sbatch: list[str] | None,
    cluster: str | None,
    sbatch: list[str] | None,
    spare_nodes: int,
    local: bool,
    allow_pipe: bool,
) -> Any:
    """Return a function from run folder, recipe and values to a request."""
    from slurm.submission import SubmissionRequest

    newer = {name: value for text in sbatch or [] for name, value in sbatch_options.parse_option(text).items()}
    spare: dict[str, str | bool] = {resources.SPARE_NODES: str(spare_nodes)} if spare_nodes else {}
    profile, by_evaluation = profiles.load_profile(cluster), sbatch_options.group_by_evaluation(eval_sbatch or [])

    def make(run: Path, recipe: str, values: tuple[str, ...]) -> SubmissionRequest:
        return SubmissionRequest(
            run=str(run),
            recipe=recipe,
            overrides=values,
            evals=evals or "knn" * bool(eval_every),
            eval_every=eval_every,
            sbatch=(ctx.obj or {}) | newer | spare,
            eval_sbatch=by_evaluation,
            profile=profile,
            local=local,
            allow_pipe=allow_pipe,
        )

    return make


def _absolute_file(name: str) -> str:
    """The absolute path of a file, since the folder may be continued from elsewhere; any other name as it is."""
    path, colon, rest = name.partition(":")
    return f"{Path(path).absolute()}{colon}{rest}" if path.endswith((".yaml", ".yml")) else name


def _submit(plan: Plan, step_seconds: float | None, *, wait: bool, dry_run: bool) -> int:
    from slurm.sweep import cost, many

    states = many.query_runs(plan)
    lines = cost.estimate(states, step_seconds).describe()
    limit = "all at once" if plan.limit is None else f"{plan.limit} at a time"
    lines.append(f"trainings: {limit}")
    for line in lines:
        print(line, flush=True)
    if dry_run:
        for state in states:
            print(f"{state.submission.run.root}\t{_describe_state(state)}")
        return EXIT_DONE
    new = many.submit_all(plan, _print_jobs)
    if not new:
        print_message(f"nothing to submit: folder {plan.root} has all jobs of this command", PROGRAM)
    return _wait_for_all(plan) if wait else EXIT_DONE


def _search(plan: SearchPlan, step_seconds: float | None, *, wait: bool, dry_run: bool) -> int:
    from slurm.manage.wait import LOCAL_POLL_S, SLURM_POLL_S
    from slurm.sweep import search, study, trials

    runner = trials.TrialRunner(plan, lambda line: print(line, flush=True), _print_jobs)
    for line in search.describe(plan, study.read_trials(plan.root, plan.axes), runner.resolve, step_seconds):
        print(line, flush=True)
    if dry_run:
        return EXIT_DONE
    poll_s = LOCAL_POLL_S if plan.corners[0].request.local else SLURM_POLL_S
    try:
        progress = runner.advance()
        if not progress.has_changed:
            count = len(progress.open_trials)
            print_message(f"nothing to submit: folder {plan.root} has {count} trials without a result", PROGRAM)
        while wait and not progress.is_over:
            sleep(poll_s)
            progress = runner.advance()
    except KeyboardInterrupt:
        print_message(f"the jobs continue; see hpcssl-submit status {plan.root}/*", PROGRAM)
        return EXIT_STOPPED
    return _report_search(plan, progress, wait=wait)


def _report_search(plan: SearchPlan, progress: Progress, *, wait: bool) -> int:
    """Print the best trial so far. Return the exit code: with ``--wait`` a failure if there is none, or one is open."""
    best = progress.best
    if best is not None:
        print(
            f"best: trial {best.number}, {plan.objective.column} {best.score:.2f}, {' '.join(best.values)}", flush=True
        )
    if wait and progress.open_trials:
        names = ", ".join(trial.name for trial in progress.open_trials)
        print_message(f"ended early, and continued by the same command: {names} (see hpcssl-submit status)", PROGRAM)
    return EXIT_DONE if not wait or (best is not None and not progress.open_trials) else EXIT_FAILED


def _describe_state(state: RunState) -> str:
    if state.missing:
        return f"to submit: {', '.join(state.missing)}"
    if state.jobs:
        return "in the queue: " + ", ".join(f"job {job.id} ({job.what})" for job in state.jobs)
    return "finished"


def _print_jobs(run: RunDir, jobs: list[Job]) -> None:
    for job in jobs:
        what = "" if job.what == job_log.TRAIN else f", {job.what}"
        print(f"Submitted batch job {job.id} ({run.root.name}{what})", flush=True)


def _name_lines(run: RunDir) -> Callable[[str], None]:
    """Return a function that prints a line of progress with the name of its run."""
    return lambda text: print_message(f"{run.root.name}: {text}", PROGRAM)


def _wait_for_all(plan: Plan) -> int:
    from slurm.manage.wait import wait_for_jobs

    code = EXIT_DONE
    try:
        for submission in plan.submissions:
            one = wait_for_jobs(submission.run, _name_lines(submission.run))
            code = code or one
    except KeyboardInterrupt:
        print_message(f"the jobs continue; see hpcssl-submit status {plan.root}/*", PROGRAM)
        return EXIT_STOPPED
    return code
