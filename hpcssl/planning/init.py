"""``hpcssl init``: write a recipe that fits a data set and a machine."""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hpcssl import run as runs
from hpcssl.errors import ConfigError
from hpcssl.planning.data_summary import DataSummary, read_summary
from hpcssl.planning.dry_run import dry_run, format_duration
from hpcssl.planning.fit import EPOCHS, MOST_EPOCHS, TRAINING_SHARE, Fit, fit_recipe
from hpcssl.planning.machine import Machine
from hpcssl.planning.methods import check_method, find_method
from hpcssl.planning.recipe_text import write_yaml
from hpcssl.preparation.checks import check_start
from hpcssl.run_dir import RunDir

FEW_IMAGES = 1000
"""Images below which a note warns of the result."""
FEW_EPOCHS = 20
"""Epochs below which a note warns of the result."""


@dataclass(frozen=True)
class InitResult:
    """What ``hpcssl init`` prints.

    Attributes:
        text: The recipe, as YAML with comments.
        notes: Sentences about what the user should know.
        machine: The machine that it fits.
    """

    text: str
    notes: list[str]
    machine: Machine


def make_recipe(root: Path, *, method: str = "msf", gpus: int | None = None, hours: float | None = None) -> InitResult:
    """Make a recipe for a data set.

    Args:
        root: A shard folder, or a folder with shards in ``train`` and ``val``.
        method: Name of the method, see ``methods.METHODS``.
        gpus: Number of GPUs; None for all of this machine, 0 for the CPU.
        hours: Length of the training, fitted by a dry run of the recipe; None for ``EPOCHS`` epochs.

    Raises:
        ConfigError: An unknown method, or hours that cannot be measured here or are too few.
        DataError: Shards that cannot be used, or that lack what the method needs.
    """
    choice = find_method(method)
    machine = Machine.detect(gpus)
    if hours is not None:
        _check_hours(hours, machine)
    data = read_summary(root.absolute())
    check_method(choice, data)
    fit = fit_recipe(data, choice, machine)
    if hours is None:
        epochs, reason = EPOCHS, "as the packaged recipes; `hpcssl init --hours H` fits them to a time"
    else:
        epochs, reason = _fit_epochs(fit, machine, hours)
    views = next(value.value for value in fit.values if value.key == "views.size")
    title = f"{choice.title} on {data.images:,} images of {root.absolute().name}, {views} pixels"
    device = f"{machine.gpus} GPU{'s' * (machine.gpus > 1)}" if machine.gpus else "a CPU"
    head = [
        f"{title}, for {device}.",
        "Written by `hpcssl init`. What is not set here comes from the base;",
        "`hpcssl show FILE --comments` prints all keys with their meaning.",
    ]
    text = write_yaml(head, fit.base.name, fit.with_length(epochs, reason))
    _check_text(text, data, machine)
    return InitResult(text, _notes(data, machine, epochs), machine)


def _check_hours(hours: float, machine: Machine) -> None:
    if not 0 < hours < math.inf:
        raise ConfigError("--hours", got=hours, expected="a number above 0", fix="set --hours 8, or leave it out")
    if machine.gpus and not machine.gpus_here:
        raise ConfigError(
            "--hours",
            got=f"{hours:g} with --gpus {machine.gpus} on a machine without a GPU, where no step can be measured",
            expected="a machine with a GPU of the kind that trains",
            fix="run the command in a job (`srun --gpus 1 hpcssl init ...`), or leave --hours out",
        )


def _fit_epochs(fit: Fit, machine: Machine, hours: float) -> tuple[int, str]:
    """Measure a step on one process, and return how many epochs fill the hours, and the reason."""
    per_process = fit.batch // machine.processes
    with tempfile.TemporaryDirectory(prefix="hpcssl-init-") as folder:
        path = Path(folder, "init.yaml")
        path.write_text(write_yaml([], fit.base.name, fit.with_length(MOST_EPOCHS, "")))
        recipe = runs.compose(str(path), [f"optim.batch={per_process}", "evals.knn_every_epochs=0"])
        report = dry_run(recipe)
    assert report is not None, "hpcssl init is one process"
    epoch_s = fit.steps_per_epoch * report.step_s
    epochs = min(MOST_EPOCHS, int(hours * 3600 * TRAINING_SHARE / epoch_s))
    if epochs < 1:
        raise ConfigError(
            "--hours",
            got=f"{hours:g}",
            expected=f"time for an epoch, which takes {format_duration(epoch_s)} here",
            fix=f"set --hours {epoch_s / 3600 / TRAINING_SHARE * 1.1:.2g} or more, use more GPUs, or take fewer images "
            "(`hpcssl-shard subset`)",
        )
    reason = f"{format_duration(report.step_s)} per step of {per_process} images on one process, measured"
    if epochs == MOST_EPOCHS:
        reason += f"; at most {MOST_EPOCHS} epochs"
    else:
        reason += f"; {TRAINING_SHARE:.0%} of {hours:g} h"
    if machine.processes > 1:
        reason += "; without communication between GPUs"
    return epochs, reason


def _check_text(text: str, data: DataSummary, machine: Machine) -> None:
    """Compose the recipe once and check it as the training does, so that a mistake appears here."""
    with tempfile.TemporaryDirectory(prefix="hpcssl-init-") as folder:
        path = Path(folder, "init.yaml")
        try:
            path.write_text(text, encoding="utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                "DATA",
                got="a path that is not UTF-8",
                expected="a path that a YAML file can hold",
                fix="rename the folder, or make a link to it",
            ) from error
        recipe = runs.compose(str(path), [])
        check_start(recipe, data.train, RunDir(Path(folder, "run")), world_size=machine.processes, val=data.val)


def _notes(data: DataSummary, machine: Machine, epochs: int) -> list[str]:
    notes = []
    root = Path(data.train.root)
    if data.val is None and root.name == "train" and (root.parent / "val").is_dir():
        notes.append(f"{root.parent / 'val'} is not used; `hpcssl init {shlex.quote(str(root.parent))}` uses both.")
    if data.images < FEW_IMAGES:
        notes.append(
            f"{data.images} images are few. Expect little more than from an untrained encoder; self-supervised "
            "training is usually done with tens of thousands."
        )
    if epochs < FEW_EPOCHS:
        notes.append(f"{epochs} epochs are few: the packaged recipes train {EPOCHS}.")
    if not data.has_scores:
        missing = "a label for each image" if data.val is not None else "validation shards with labels"
        notes.append(f"No k-NN accuracy during the training: it needs {missing}.")
    if machine.gpus and not machine.gpu_bytes:
        notes.append("There is no GPU here, so that its memory was not checked: try --dry-run in a job first.")
    return notes


def print_result(result: InitResult, root: Path) -> None:
    """Print the recipe to stdout, and notes and the next commands to stderr.

    Args:
        result: The recipe.
        root: The data set, after which the run is named.
    """
    sys.stdout.write(result.text)
    sys.stdout.flush()
    target = _stdout_file()
    path = target or Path(f"{root.absolute().name}.yaml")
    name, run = shlex.quote(str(path)), shlex.quote(f"runs/{path.stem}")
    for note in result.notes:
        sys.stderr.write(f"Note: {note}\n")
    sys.stderr.write("Next:\n" if target else f"Next, with this recipe in {name}:\n")
    machine = result.machine
    if machine.gpus > machine.gpus_here:
        commands = [f"hpcssl-submit {name} --run {run} --gpus-per-node {machine.gpus}"]
    else:
        launcher = f"torchrun --nproc-per-node {machine.gpus} -m -- " if machine.gpus > 1 else ""
        commands = [
            f"{launcher}hpcssl train {name} --run {run} --dry-run",
            f"{launcher}hpcssl train {name} --run {run}",
        ]
    for command in commands:
        sys.stderr.write(f"  {command}\n")


def _stdout_file() -> Path | None:
    """The .yaml file that stdout is redirected to, relative to the current folder where it lies below; else None."""
    try:
        path = Path("/proc/self/fd/1").readlink()
    except OSError:
        return None
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
