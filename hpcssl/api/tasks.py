"""``hpcssl.train`` and ``hpcssl.evaluate``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcssl.api.overrides import collect_overrides, plain_source
from hpcssl.api.records import Records
from hpcssl.api.run_folder import Run
from hpcssl.api.session import call_session
from hpcssl.errors import EXIT_DONE, TrainingStopped
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag

if TYPE_CHECKING:
    from hpcssl.nets.importers import WeightsSource
    from hpcssl.train.recipe import RecipeSource


def train(
    recipe: RecipeSource | None = None,
    *overrides: str,
    run: str | os.PathLike[str],
    parent: str | os.PathLike[str] | None = None,
    allow_pipe: bool = False,
    stop: StopFlag | None = None,
    began: float | None = None,
    **values: Any,
) -> Run:
    """Train a recipe in a run folder, or resume the training that the folder holds.

    The result is that of ``hpcssl train`` and of a job of ``hpcssl-submit``. Under torchrun or srun all processes call
    it alike. Ctrl-C (the stop button of a notebook) saves the state and raises ``TrainingStopped``; a second Ctrl-C
    interrupts at once. The same call resumes. Without progress for ``machine.hang_minutes`` the process is ended.

    Args:
        recipe: Name of a packaged recipe, path of a ``.yaml`` file, nested values as in such a file, or the recipe of
            another run (``Run.config``). None with ``parent``.
        overrides: Recipe values to change, as on the command line: ``"optim.lr=0.1"``.
        run: The run folder. It is created, or continued if it holds a run of the same recipe.
        parent: Start from the complete state of a checkpoint of another run, ``RUN[@STEP]``, with its recipe.
        allow_pipe: Let ``data.train`` be ``pipe:COMMAND``, which runs a shell command of yours.
        stop: Stops the training, with its state saved, when another thread sets it; the caller then handles signals.
        began: Unix time from which the run's account of its time counts this attempt; by default now.
        values: Recipe values to change, by name: ``optim={"lr": 0.1}``, or ``**{"optim.lr": 0.1}``.

    Returns:
        The finished run.

    Raises:
        ResumeError: The folder holds a run of another recipe, or another process trains in it.
        TrainingStopped: After a request to stop; the state is saved unless the message says otherwise.
        HpcsslError: ``ConfigError`` for an invalid recipe, ``DataError`` for shards; or the training failed.

    Example:
        ::

            for lr in (0.01, 0.1):
                run = hpcssl.train("digits_msf", "data.train=data/digits/train", run=f"runs/lr{lr}", optim={"lr": lr})
    """
    began = time.time() if began is None else began
    changes, branch = collect_overrides(overrides, values), None if parent is None else os.fspath(parent)
    with call_session(stop) as flag:
        from hpcssl import run as runs
        from hpcssl.preparation import branches

        source, folder = plain_source(recipe, branch), RunDir(Path(run).expanduser())
        resolved, start = branches.resolve(source, changes, folder, parent=branch, allow_pipe=allow_pipe)
        code = runs.train(
            folder,
            resolved,
            stop=flag,
            attempt={"began": round(began, 1)},
            allow_pipe=resolved.data.train if allow_pipe else "",
            prepare=lambda: branches.write_branch(start, folder),
        )
        if code != EXIT_DONE:
            raise _stopped_error(Run(folder.root), flag)
    return Run(folder.root)


def evaluate(
    name: str,
    *options: str,
    run: Run | str | os.PathLike[str] | None = None,
    weights: WeightsSource | str | os.PathLike[str] | None = None,
    train: str | os.PathLike[str] | None = None,
    val: str | os.PathLike[str] | None = None,
    step: int | str = "last",
    stage_dir: str | os.PathLike[str] = "",
    devices: str = "auto",
    stop: StopFlag | None = None,
    **values: Any,
) -> Records:
    """Evaluate the encoder of a run, or of a weights file. Identical evaluations of a run return the stored rows.

    Args:
        name: ``knn``, ``linear``, ``finetune``, ``svm``, ``lowshot``, ``transfer`` or ``detect``.
        options: Options of the evaluation, as on the command line: ``"k=[20]"``.
        run: The run, or its folder. Give this or ``weights``.
        weights: A weights file of this project or of another known one.
        train: Folder or address of the shards to learn from; by default those of the run.
        val: Folder or address of the shards to score on; by default those of the run.
        step: Which weights of the run: ``last`` (with those of step 0, unless ``evals.baseline`` is false), ``first``,
            or a number of steps.
        stage_dir: Folder for the shards of an address; by default ``data.stage_dir`` of the run.
        devices: ``cpu``, ``gpu`` or ``auto``.
        stop: Stops the evaluation when it is set; see ``train``.
        values: Options by name: ``k=[20]``.

    Returns:
        One row per encoder and pair of data sets. ``row["metrics"]`` has the scores in percent, ``row["step"]`` the
        training step of the encoder.

    Raises:
        Stopped: After a request to stop, such as Ctrl-C; the same call continues an evaluation of a run.
        HpcsslError: ``ConfigError`` for unknown names, ``DataError`` for shards, ``EvalError`` for weights and labels,
            ``ResumeError`` where there is no run.

    Example:
        ::

            scores = {row["step"]: row["metrics"]["knn20"] for row in hpcssl.evaluate("knn", run="runs/first", k=[20])}
    """
    changes = collect_overrides(options, values)
    places = {role: None if place is None else os.fspath(place) for role, place in (("train", train), ("val", val))}
    with call_session(stop) as flag:
        from hpcssl import run as runs

        rows = runs.evaluate(
            name,
            changes,
            run=run.folder if isinstance(run, Run) else None if run is None else Run(run).folder,
            weights=Path(weights) if isinstance(weights, str | os.PathLike) else weights,
            **places,
            stage_dir=os.fspath(stage_dir),
            devices=devices,
            step=step,
            stop=flag,
        )
    return Records(rows)


def _stopped_error(run: Run, stop: StopFlag) -> TrainingStopped:
    last = run.attempts[-1] if run.attempts else {}
    saved = "the state is saved" if last.get("cause") else "the log says whether the state is saved"
    if last.get("why"):
        saved = f"the state is NOT saved ({last['why']})"
    reason = ", ".join(last.get("signals") or [stop.reason or "another rank"])
    return TrainingStopped(
        f"training in {run.path}",
        got=f"a request to stop ({reason}) at step {last.get('last_step', 'unknown')}; {saved}",
        expected="the last step",
        fix="train the same recipe in this run folder again: it resumes",
    )
