"""What the doors and the jobs do with a run folder: here training and evaluations meet, which do not know each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from hpcssl import config
from hpcssl.data.stream import is_remote
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, Stopped
from hpcssl.evals import run as evals
from hpcssl.evals.watch import check, watch
from hpcssl.files import RunDir
from hpcssl.nets.importers import Source
from hpcssl.signals import Requeue, StopFlag
from hpcssl.train import main as training
from hpcssl.train import recipe as recipes
from hpcssl.train.data import open_shards
from hpcssl.train.recipe import MachineOptions, Recipe
from hpcssl.train.state import another_recipe, method_of
from hpcssl.world import World


def compose(name: str, overrides: list[str]) -> Recipe:
    """``recipe.compose``, and the sections that other floors understand are checked too."""
    recipe = recipes.compose(name, overrides)
    method_of(recipe)
    check(recipe)
    return recipe


def resolve(name: str, overrides: list[str], run: RunDir, *, write: bool = False, allow_pipe: bool = False) -> Recipe:
    """Compose a recipe with absolute paths, and check it against the data and against what the run folder holds.

    A run continues under other machinery (devices, threads, checkpoint period, evaluations, paths), and never under
    other science: ``ResumeError`` names the fields. Shard folders are opened, so that a wrong path is refused here and
    not in a job. ``write`` stores the recipe at once, for a caller who knows that nobody trains there; otherwise the
    attempt does, once it holds the run's lock. ``allow_pipe``: whether ``data.train`` may be a shell command.
    """
    recipe = compose(name, overrides)
    shards = open_shards(recipe, allow_pipe=allow_pipe)
    values = config.as_dict(recipe)
    for kind in ("train", "val", "stage"):
        if values["data"][kind] and not is_remote(values["data"][kind]):
            values["data"][kind] = str(Path(values["data"][kind]).absolute())
    if run.config.exists():
        theirs, ours = recipes.read(run.config).science(training.digest_of(run) or shards.digest, 1), \
            recipe.science(shards.digest, 1)
        for science in (theirs, ours):  # what a group is depends on the number of processes: the checkpoint will say
            del science["model"]["norm_group"]
        if ours != theirs:
            raise another_recipe(f"run folder {run.root}", ours, theirs)
    recipe = recipes.typed(values, "recipe")
    if write:
        training.store(run, recipe, shards)
    return recipe


def train(run: RunDir, recipe: Recipe | None = None, *, stop: StopFlag,
          requeue: Callable[[list[str]], Requeue] | None = None, attempt: dict | None = None,
          on_hang: Callable[[str], None] | None = None, allow_pipe: str = "") -> int:
    """Train a run folder with k-NN on the way where ``evals.every_epochs`` asks for it. Returns the exit code."""
    return training.train(run, recipe, stop=stop, requeue=requeue, attempt=attempt, watch=watch,
                          on_hang=on_hang, allow_pipe=allow_pipe)


def evaluate(name: str, overrides: list[str], *, run: Path | None, weights: Source | Path | None, train: Path | None,
             val: Path | None, devices: str, step: str) -> int:
    """The door's ``eval``: a run's encoder, or a weights file between two shard folders. Prints the scores."""
    from hpcssl.journal import set_up_logging

    if (run is None) == (weights is None):
        raise ConfigError("hpcssl eval", got="both or neither of --run and --weights", expected="one of them",
                          mend="--run DIR evaluates a run's encoder, --weights FILE any exported one")
    stop = StopFlag().install(keyboard=True)
    training.prepare(MachineOptions(devices=devices))
    world = World.start(devices, stop=stop.is_set)
    set_up_logging(world.rank)
    try:
        if run is not None:
            rows = evals.evaluate_run(name, RunDir(run), world, train=train, val=val, overrides=overrides, step=step,
                                      stop=stop.is_set)
        else:
            options, sets = evals.question(name, {}, train=train, val=val, overrides=overrides)
            rows = evals.evaluate_sets(name, run=None, weights=weights, world=world, options=options, sets=sets,
                                       stop=stop.is_set)
    except Stopped as stopped:
        if world.main:
            sys.stderr.write(f"hpcssl: {stopped}\n")
        return EXIT_STOPPED
    world.close()
    if world.main:
        for row in rows:
            scores = "\t".join(f"{k}={v:.2f}" for k, v in row["metrics"].items() if isinstance(v, float))
            which = row["weights"] if row["step"] is None else f"step={row['step']}"
            sys.stdout.write(f"{name}\t{which}\t{scores}\n")
    return EXIT_DONE


def list_recipes(gpus: int | None = None) -> None:
    """One line per packaged recipe: a table on a terminal, plain records on a pipe. ``gpus``: the ranks that the memory
    of one is estimated for; by default as many as hold 32 images each, up to 32, and one for small images."""
    from hpcssl.train import memory

    rows = []
    for name in recipes.names():
        r = recipes.compose(name)
        ranks = gpus or (1 if r.model.stem == "small" else max(1, min(32, r.optim.batch // 32)))
        size = f"{memory.estimate(r, ranks).total / 2**30:.1f} GiB x {ranks}"
        length = f"{r.schedule.epochs:g} epochs" if not r.schedule.steps else f"{r.schedule.steps} steps"
        scores = " ".join(f"{k} {v:g}" for k, v in r.about.published.items()) or "-"
        bank = str(r.bank.size) if method_of(r).bank else "-"
        rows.append((name, r.model.arch, str(r.optim.batch), length, bank, size, scores, r.about.title))
    head = ("recipe", "backbone", "batch", "length", "bank", "memory per GPU", "published", "what")
    if not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(row) + "\n" for row in [head, *rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
