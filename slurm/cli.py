"""The command ``hpcssl-submit``: submit a run, and look after it."""

from __future__ import annotations

import sys
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from hpcssl import cli_runner
from hpcssl.cli_runner import print_message
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from hpcssl.run_dir import RunDir
from hpcssl.terminal.arguments import Parent, split_recipe
from hpcssl.terminal.help_pages import CommandGroup
from slurm import command_line
from slurm.backend import sbatch_options
from slurm.cli_options import (
    AllowPipe,
    Cluster,
    EvalEvery,
    Evals,
    EvalSbatch,
    Local,
    RecipeAndValues,
    RunFolder,
    RunFolders,
    Sbatch,
    SpareNodes,
)
from slurm.doctor import cli as doctor_cli
from slurm.log import job_log
from slurm.log.job_log import Job, SbatchOptions
from slurm.sweep import cli as sweep_cli
from slurm.top import command as top_command

if TYPE_CHECKING:
    from slurm.api import SubmittedRun

PROGRAM = "hpcssl-submit"


class _SubmitByDefault(CommandGroup):
    """Takes a command line without a verb as a submission."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, command_line.add_default_verb(args))


class _SplitSbatchOptions(TyperCommand):
    """Takes the options of sbatch out before the CLI library parses the rest."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        parts = sbatch_options.split_command_line(list(args))
        ctx.obj = parts.sbatch
        return super().parse_args(ctx, parts.own)


app = typer.Typer(
    cls=_SubmitByDefault,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Run trainings on a SLURM cluster, or with --local on this machine by the same rules. The default command is "
    "submit.",
    epilog=cli_runner.EPILOG,
)


_with_sbatch_options = app.command(
    cls=_SplitSbatchOptions,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="All options of sbatch are allowed as well, in any position: --nodes 2 --gpus-per-node 8 "
    "--time 2-0 -p gpu … (see `man sbatch`).",
)


@_with_sbatch_options
def submit(
    ctx: typer.Context,
    run: Annotated[str, typer.Option("--run", help="The run folder. A run that it contains is continued.")],
    words: RecipeAndValues = None,
    parent: Parent = None,
    evals: Evals = "",
    eval_every: EvalEvery = 0,
    eval_sbatch: EvalSbatch = None,
    cluster: Cluster = None,
    sbatch: Sbatch = None,
    spare_nodes: SpareNodes = 0,
    local: Local = False,
    allow_pipe: AllowPipe = False,
    wait: Annotated[bool, typer.Option("--wait", "-W", help="Follow the run, and exit with its exit code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch scripts, and submit nothing.")] = False,
    parsable: Annotated[bool, typer.Option("--parsable", help="Print only the job id.")] = False,
) -> int:
    """Submit RECIPE as a job that survives preemptions, time limits and requeues, followed by evaluations."""
    from slurm import api, submission
    from slurm import submit as submitting
    from slurm.backend import profiles, resources

    recipe, overrides = split_recipe(words or [], parent)
    newer = {name: value for text in sbatch or [] for name, value in sbatch_options.parse_option(text).items()}
    request = submission.SubmissionRequest(
        run=run,
        recipe=recipe,
        overrides=overrides,
        evals=evals or "knn" * bool(eval_every),
        eval_every=eval_every,
        sbatch=(ctx.obj or {}) | newer | ({resources.SPARE_NODES: str(spare_nodes)} if spare_nodes else {}),
        local=local,
        profile=profiles.load_profile(cluster),
        allow_pipe=allow_pipe,
        parent=parent,
        eval_sbatch=sbatch_options.group_by_evaluation(eval_sbatch or []),
    )
    if local:
        _report_ignored(request.sbatch, cluster)
    if dry_run:
        print(submitting.render_scripts(request))
        return EXIT_DONE
    submitted = api.submit_request(request)
    if submitted.is_new:
        for job in submitted.jobs[:1] if parsable else submitted.jobs:
            text = job.id if parsable else f"Submitted batch job {job.id}{_describe_job(submitted.folder, job)}"
            print(text, flush=True)
    else:
        _report_nothing_to_submit(submitted)
        if parsable and submitted.jobs:
            print(submitted.ids[0], flush=True)
    return _wait(submitted) if wait else EXIT_DONE


_with_sbatch_options(sweep_cli.sweep)
_with_sbatch_options(sweep_cli.table)


@app.command()
def status(
    runs: RunFolders = None,
    time: Annotated[bool, typer.Option("--time", help="Show where the allocated time went, one line per run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch one line per refresh.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of --json.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print the state again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="Time between refreshes.")] = 10.0,
) -> None:
    """Show job, state, attempt, step, last end and evaluations of runs, and what to do where a run needs help."""
    from slurm.manage import status_view

    if schema:
        status_view.write_schema()
        return
    if time and as_json:
        raise ConfigError("status", got="--time and --json", expected="one of them", fix="leave --time out")
    for path in runs or []:
        _require_run(RunDir(path).root)
    while True:
        # looked for at each refresh, since new runs may have come
        folders = [RunDir(path) for path in runs] if runs else _find_runs(Path())
        status_view.write_status(folders, as_json=as_json, time=time, watch=watch)
        if not watch:
            return
        sleep(every)


app.command()(top_command.top)


@app.command()
def cancel(run: RunFolder) -> None:
    """Cancel the run's jobs for good. The training saves first; submitting the run again continues it."""
    from slurm.manage import control

    for job in control.cancel(_require_run(run)):
        print(f"Cancelled job {job}")


@app.command()
def preempt(run: RunFolder) -> None:
    """Send the running tasks the signals of a preemption (CONT, then TERM): the run saves, and continues later."""
    from slurm.manage import control

    print(control.preempt(_require_run(run)))


@app.command()
def logs(
    run: RunFolder,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing as the log grows.")] = False,
    rank: Annotated[int, typer.Option(help="The rank whose log is printed.")] = 0,
    job: Annotated[str, typer.Option(help="train, or an evaluation.")] = "train",
    lines: Annotated[int, typer.Option(help="How many of the last lines to print.")] = 40,
) -> None:
    """Print the last lines of a rank's log, of the newest attempt."""
    from slurm.manage import control

    files = control.find_logs(_require_run(run), job, rank)
    positions = {path: control.print_tail(path, lines, print) for path in files}
    while follow:
        sleep(0.5)
        for path in control.find_logs(RunDir(run), job, rank):
            positions[path] = control.print_new_lines(path, positions.get(path, 0), print)


app.command(cls=doctor_cli.SplitDoctorOptions, context_settings=doctor_cli.SETTINGS, epilog=doctor_cli.EPILOG)(
    doctor_cli.doctor
)


def _report_nothing_to_submit(submitted: SubmittedRun) -> None:
    """Say why there is nothing to submit."""
    path = submitted.folder.root
    if submitted.jobs:
        queued = ", ".join(f"job {job.id} ({job.what})" for job in submitted.jobs)
        print_message(f"nothing to submit: run {path} has {queued} in the queue", PROGRAM)
    else:
        print_message(f"run {path} is finished: nothing to submit (--evals adds evaluations)", PROGRAM)


def _describe_job(folder: RunDir, job: Job) -> str:
    if job.what == job_log.TRAIN:
        return ""
    train = job_log.latest_jobs(folder).get(job_log.TRAIN)
    if train is None or folder.finished or job.is_concurrent:
        return f" ({job.what})"
    return f" ({job.what}, after {train.id})"


def _report_ignored(sbatch: SbatchOptions, cluster: str | None) -> None:
    """Say which options have no effect without SLURM."""
    from slurm.backend import resources

    ignored = sbatch_options.format_options({k: v for k, v in sbatch.items() if k not in resources.LOCAL_OPTIONS})
    text = (ignored + (f" --cluster={cluster}" if cluster else "")).strip()
    if text:
        print_message(f"ignored, since they need SLURM: {text}", PROGRAM)


def _wait(submitted: SubmittedRun) -> int:
    try:
        return submitted.wait(check=False, write=lambda text: print_message(text, PROGRAM))
    except KeyboardInterrupt:
        print_message(f"the job continues; see hpcssl-submit status {submitted.folder.root}", PROGRAM)
        return EXIT_STOPPED


def _find_runs(folder: Path) -> list[RunDir]:
    patterns = ("jobs.jsonl", "*/jobs.jsonl", "*/*/jobs.jsonl")
    return [RunDir(path) for path in sorted(file.parent for pattern in patterns for file in folder.glob(pattern))]


def _require_run(path: Path) -> RunDir:
    run = RunDir(path)
    if not run.jobs.exists() and not run.config.exists():
        raise ConfigError(
            f"run folder {path}",
            got="a folder without a run" if path.is_dir() else "no such folder",
            expected="a folder that hpcssl-submit or hpcssl train has created",
            fix="check the path",
        )
    return run


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit. ``argv``: the words after the program's name, by default those of the process."""
    sys.exit(cli_runner.run(app, argv, PROGRAM))


if __name__ == "__main__":
    main()
