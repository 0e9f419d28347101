"""The commands ``hpcssl-submit sweep`` and ``hpcssl-submit table``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcssl.cli_runner import print_message
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED
from hpcssl.run_dir import RunDir
from hpcssl.terminal.arguments import split_recipe
from slurm.backend import profiles, resources, sbatch_options
from slurm.cli_options import AllowPipe, Cluster, EvalEvery, Evals, EvalSbatch, Local, Sbatch, SpareNodes
from slurm.log import job_log
from slurm.log.job_log import Job

if TYPE_CHECKING:
    from slurm.submission import SubmissionRequest
    from slurm.sweep.many import Plan, RunState

PROGRAM = "hpcssl-submit"

Out = Annotated[Path, typer.Option("--out", help="The folder of the runs. The same command adds what is missing.")]
Parallel = Annotated[
    int | None,
    typer.Option(min=1, metavar="P", help="Most trainings that run at a time; by default all, with --local one."),
]
StepSeconds = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds per step, for the cost; by default what runs in the folder have measured."),
]
Wait = Annotated[
    bool, typer.Option("--wait", "-W", help="Follow the runs, and exit with the code of the first failure.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print runs and cost, and submit nothing.")]


def sweep(
    ctx: typer.Context,
    out: Out,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE [KEY=VALUES]...",
            help="Recipe, then values: KEY=VALUE for all runs, KEY=VALUE,VALUE or KEY=FIRST..LAST to sweep.",
        ),
    ] = None,
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
    """Submit one run for each combination of recipe values, such as optim.lr=0.03,0.1 seed=0..2."""
    from slurm.sweep import many
    from slurm.sweep.folder import Definition
    from slurm.sweep.grid import parse_grid

    recipe, values = split_recipe(words or [], None)
    shared, points = parse_grid(values)
    base = _make_request(ctx, evals, eval_every, eval_sbatch, cluster, sbatch, spare_nodes, local, allow_pipe)
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
