"""The weights files that a run has exported."""

from __future__ import annotations

import re
from pathlib import Path

from hpcssl.errors import ConfigError, EvalError
from hpcssl.run_dir import RunDir


def find_weights(run: RunDir, step: int | str = "last") -> Path:
    """Return the weights file of a step of a run.

    Args:
        run: The run folder.
        step: A step number, ``first`` (step 0), or ``last``: the last step of a finished training, else the newest
            exported step.

    Raises:
        ConfigError: ``step`` is none of these.
        EvalError: The run has no weights of this step; the message lists the steps it has.
    """
    exported = sorted(run.weights.glob("step-*.safetensors"))
    if not re.fullmatch(r"[0-9]+", str(step)) and step not in ("first", "last"):
        raise ConfigError("--step", got=repr(step), expected="last, first or a step number", fix="set --step last")
    if step == "first":
        path = run.weights_at(0)
    elif step != "last":
        path = run.weights_at(int(step))
    elif (finished := run.finished) is not None:
        path = run.weights_at(finished["step"])
    else:
        path = exported[-1] if exported else run.weights_at(0)
    if not path.exists():
        steps = ", ".join(str(int(file.stem.removeprefix("step-"))) for file in exported)
        raise EvalError(
            f"weights of {run.root}",
            got=f"no {path.name}",
            expected=f"one of the steps {steps}" if steps else "a run with exported weights",
            fix="name one of these steps" if steps else "check --run, or start the training with `hpcssl train`",
        )
    return path


def resolve_weights(path: Path | str, step: int | str = "last") -> Path:
    """Return the weights file that a path stands for.

    Args:
        path: A weights file, or a run folder.
        step: Which weights of a run folder, see ``find_weights``.

    Raises:
        ConfigError: ``step`` is set for a file.
        EvalError: A folder without exported weights, or no weights of this step.
    """
    path = Path(path)
    if path.is_dir():
        return find_weights(RunDir(path), step)
    if step != "last":
        raise ConfigError(
            "step of the weights",
            got=f"{step} for the file {path}",
            expected="a run folder, which has the weights of several steps",
            fix="leave the step out, or name the run folder",
        )
    return path


def find_run(path: Path | str) -> RunDir | None:
    """Return the run that a path belongs to: a run folder, or a file in its folder of weights; None for another one."""
    path = Path(path)
    root = path if path.is_dir() else path.absolute().parent.parent
    run = RunDir(root)
    inside = path.is_dir() or path.absolute().parent == run.weights
    return run if inside and run.config.is_file() else None
