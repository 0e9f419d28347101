"""``hpcssl-submit``: submit a run, and look after it."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from hpcssl import door
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from hpcssl.files import RunDir
from slurm import options

VERBS = ("submit", "status", "cancel", "logs", "preempt")


class _Verbs(TyperGroup):
    """A command line without a verb is a submission."""

    def parse_args(self, ctx, args):
        if args and args[0] not in (*VERBS, "--help"):
            args = ["submit", *args]
        return super().parse_args(ctx, args)


class _Submit(TyperCommand):
    """sbatch's options are taken out by our table before the CLI library sees the rest."""

    def parse_args(self, ctx, args):
        parts = options.split(list(args))
        ctx.obj = parts.sbatch
        return super().parse_args(ctx, parts.ours)


app = typer.Typer(cls=_Verbs, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  context_settings={"help_option_names": ["--help", "-h"]},
                  help="Run trainings on a SLURM cluster, or on this machine by the same rules (--local). Without a "
                       "verb: submit.")

Runs = Annotated[list[Path] | None, typer.Argument(help="Run folders; by default those below this folder.")]
Run = Annotated[Path, typer.Argument(help="The run folder.")]


@app.command(cls=_Submit, context_settings={"help_option_names": ["--help", "-h"]},
             epilog="Every option of sbatch is taken as well, in any position: --nodes 2 --gpus-per-node 8 "
                    "--time 2-0 -p gpu … (see `man sbatch`).")
def submit(ctx: typer.Context, words: Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...")],
           run: Annotated[str, typer.Option("--run", help="The run folder; what it holds is continued.")],
           evals: Annotated[str, typer.Option(help="Evaluations to chain on success, with options after colons: "
                                              "knn,linear:protocol=msf,transfer:sets=dtd+pets.")] = "",
           eval_every: Annotated[int, typer.Option(min=0, help="Evaluate also beside the training, by small jobs, the "
                                                   "weights of every so many epochs (by knn without --evals).")] = 0,
           eval_sbatch: Annotated[list[str] | None, typer.Option(help="An option of sbatch for the evaluations only, "
                                                                 'such as "--time=30", or for one of them: '
                                                                 '"detect:--gpus-per-node=8".')] = None,
           cluster: Annotated[str | None, typer.Option(help="A cluster profile: name or YAML file.")] = None,
           sbatch: Annotated[list[str] | None, typer.Option(help='An option that only a newer SLURM knows, such as '
                                                            '"--any=thing".')] = None,
           local: Annotated[bool, typer.Option("--local", help="Run on this machine, without SLURM.")] = False,
           allow_pipe: Annotated[bool, typer.Option("--allow-pipe", help="data.train may be pipe:COMMAND, a shell "
                                                    "command of your own, which runs in the job.")] = False,
           wait: Annotated[bool, typer.Option("--wait", "-W", help="Follow the run; exit with its code.")] = False,
           dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch scripts only.")] = False,
           parsable: Annotated[bool, typer.Option("--parsable", help="Print the bare job id.")] = False) -> int:
    """Submit RECIPE as a job that survives preemption, walltime and requeues, with evaluations chained on it."""
    from slurm import cluster as profiles
    from slurm import shape
    from slurm import submit as submits

    recipe, overrides = _recipe_of(words)
    further = {name: value for text in sbatch or [] for name, value in options.one(text).items()}
    request = submits.Request(
        run=run, recipe=recipe, overrides=overrides, evals=evals or "knn" * bool(eval_every), eval_every=eval_every,
        sbatch=(ctx.obj or {}) | further, local=local, profile=profiles.find(cluster),
        allow_pipe=allow_pipe,
        eval_sbatch=_by_evaluation(eval_sbatch or []))
    if local:
        _say_left_out({k: v for k, v in request.sbatch.items() if k not in shape.LOCAL}, cluster)
    if dry_run:
        print(submits.texts(request))
        return EXIT_DONE
    jobs = submits.submit(request)
    folder = RunDir(Path(run).expanduser())
    if not jobs:
        jobs = _nothing_to_submit(folder)
        if parsable and jobs:
            print(jobs[0].job, flush=True)
        return _wait(folder, jobs) if wait else EXIT_DONE
    for job in jobs[:1] if parsable else jobs:
        print(job.job if parsable else f"Submitted batch job {job.job}{_chained(folder, job)}", flush=True)
    return _wait(folder, jobs) if wait else EXIT_DONE


@app.command()
def status(runs: Runs = None) -> None:
    """Show job, state, attempt, step, last end and evaluations of runs, with the mend where one is needed."""
    from slurm import watch

    folders = [RunDir(p) for p in runs] if runs else _below(Path())
    for folder in folders:
        _existing(folder.root)
    reports = [watch.report(folder) for folder in folders]
    if not sys.stdout.isatty():
        for report in reports:
            print(report.line())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "job", "state", "attempt", "step", "last end", "evaluations", "note", box=None)
    for r in reports:
        table.add_row(str(r.run.root), r.job, r.state, str(r.attempt), f"{r.step}/{r.steps or '?'}", r.last,
                      "\n".join(f"{k} {v}" for k, v in r.evals.items()), r.note)
    Console().print(table)


@app.command()
def cancel(run: Run) -> None:
    """End the run's job, and what is chained on it, for good. The training saves first; submitting again continues."""
    from slurm import control

    for job in control.cancel(_existing(run)):
        print(f"Cancelled job {job}")


@app.command()
def preempt(run: Run) -> None:
    """Send the running tasks the signals that a preemption brings (CONT, then TERM): they save, and go on later."""
    from slurm import control

    print(control.preempt(_existing(run)))


@app.command()
def logs(run: Run, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the log grows.")] = False,
         rank: Annotated[int, typer.Option(help="Whose log.")] = 0,
         job: Annotated[str, typer.Option(help="train, or the name of an evaluation.")] = "train",
         lines: Annotated[int, typer.Option(help="How many of the last lines.")] = 40) -> None:
    """Print the end of a rank's log (of the newest attempt)."""
    from slurm import control

    files = control.logs(_existing(run), job, rank)
    places = {path: control.tail(path, lines, print) for path in files}
    while follow:
        time.sleep(0.5)
        for path in control.logs(RunDir(run), job, rank):
            places[path] = control.since(path, places.get(path, 0), print)


def _recipe_of(words: list[str]) -> tuple[str, list[str]]:
    """The recipe and the overrides: an override begins with a dotted key and '='; a path to a recipe has a slash."""
    overrides = [w for w in words if re.match(r"[A-Za-z_][\w.]*=", w)]
    recipes = [w for w in words if w not in overrides]
    if len(recipes) != 1:
        raise ConfigError("RECIPE", got=" and ".join(recipes) or "none", expected="one recipe, then key=value",
                          mend="name one, such as digits_msf: `hpcssl recipes` lists them")
    return recipes[0], overrides


def _by_evaluation(texts: list[str]) -> dict[str, dict]:
    """Options of sbatch by the evaluation that they are for, under '' those for all."""
    found: dict[str, dict] = {}
    for text in texts:
        name, option = re.fullmatch(r"(?:([a-z]\w*):(?=--))?(.*)", text.strip(), re.S).groups()
        found.setdefault(name or "", {}).update(options.one(option))
    return found


def _nothing_to_submit(folder: RunDir) -> list:
    """Say why; the jobs that live."""
    from slurm import control

    living = control.living(folder)
    if living:
        _say(f"nothing to submit: run {folder.root} has " + ", ".join(f"job {job.job} ({job.what})" for job in living)
             + " in the queue")
    else:
        _say(f"run {folder.root} is finished: nothing to submit (--evals adds evaluations)")
    return living


def _chained(folder: RunDir, job) -> str:
    from slurm import records

    if job.what == records.TRAIN:
        return ""
    train = records.submitted(folder).get(records.TRAIN)
    waits = train is not None and not folder.finished and not job.beside
    return f" ({job.what}, after {train.job})" if waits else f" ({job.what})"


def _say_left_out(sbatch: dict, cluster: str | None) -> None:
    said = options.spelled(sbatch) + (f" --cluster={cluster}" if cluster else "")
    if said.strip():
        _say(f"{said.strip()} mean nothing without SLURM and are left out")


def _wait(folder: RunDir, jobs: list) -> int:
    from slurm import watch

    try:
        return watch.wait(folder, _say, jobs=jobs)
    except KeyboardInterrupt:
        _say(f"the job goes on; see hpcssl-submit status {folder.root}")
        return EXIT_STOPPED


def _below(folder: Path) -> list[RunDir]:
    found = [p.parent for pattern in ("jobs.jsonl", "*/jobs.jsonl", "*/*/jobs.jsonl") for p in folder.glob(pattern)]
    return [RunDir(p) for p in sorted(found)]


def _existing(path: Path) -> RunDir:
    run = RunDir(path)
    if not run.jobs.exists() and not run.config.exists():
        raise ConfigError(f"run folder {path}", got="no run in it" if path.is_dir() else "no such folder",
                          expected="a folder that hpcssl-submit or hpcssl train made", mend="check the path")
    return run


def _say(sentence: str) -> None:
    print(f"hpcssl-submit: {sentence}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    sys.exit(door.run(app, argv, "hpcssl-submit"))


if __name__ == "__main__":
    main()
