"""``hpcssl.Run``: what a run folder holds, as plain objects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcssl import files
from hpcssl.api.records import Records
from hpcssl.attempts import FIELDS, AttemptLines, group_by_attempt
from hpcssl.errors import ResumeError
from hpcssl.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from PIL import Image

    from hpcssl.train.recipe import Recipe


class Run:
    """A run folder. Every property reads the files again, so that it shows a running training as it is now.

    Only ``config``, ``results``, ``digest`` and ``encoder`` import torch.

    Args:
        path: A folder that ``hpcssl.train``, ``hpcssl train`` or ``hpcssl-submit`` has created.

    Attributes:
        folder: The paths of all files in it.

    Raises:
        ResumeError: There is no run in this folder.

    Example:
        ::

            run = hpcssl.Run("runs/first")
            assert run.finished and run.config.method.name == "msf"
            run.journal.frame().plot(x="step", y="loss")
            backbone, transform = run.encoder()
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.folder = RunDir(Path(path).expanduser())
        traces = (self.folder.config, self.folder.checkpoints, self.folder.weights)
        if not any(trace.exists() for trace in traces):
            raise ResumeError(
                f"run folder {path}",
                got="a folder without a run" if self.folder.root.is_dir() else "no such folder",
                expected="a folder that hpcssl.train, `hpcssl train` or hpcssl-submit has created",
                fix="check the path",
            )

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The folder, as an absolute path."""
        return self.folder.root

    @property
    def config(self) -> Recipe:
        """The resolved recipe, such as ``run.config.optim.lr``. It can be trained again in another folder.

        Raises:
            ResumeError: The file is damaged, or written by a version with other keys.
        """
        from hpcssl.train import recipe

        return recipe.read(self.folder.config)

    @property
    def journal(self) -> Records:
        """Scalars of every step: ``step``, ``epoch``, ``loss``, ``lr`` and those of the method.

        Scores during the training are records of their own, with ``eval`` set, beside those of the step.
        """
        return Records(files.read_lines(self.folder.journal, {"step": int}))

    @property
    def attempts(self) -> Records:
        """The starts of the training, one record each, oldest first.

        ``attempt`` counts from 1; ``job``, ``host``, ``world`` and ``device`` say where it ran; ``began`` (of the
        process), ``started`` (of the training) and ``ended`` are times, and ``first_step`` and ``last_step`` numbers of
        finished steps. ``cause`` says why it ended: ``done``, ``stopped``, ``preempted``, ``timeout``, ``error``, ...;
        it is None for the last attempt if that runs, or died without a record. ``why`` and ``signals`` explain it.
        """
        lines = files.read_lines(self.folder.attempts, {"event": str, "attempt": int}, FIELDS)
        return Records(_describe_attempt(attempt) for attempt in group_by_attempt(lines))

    @property
    def results(self) -> Records:
        """The result rows of all evaluations, by evaluation, oldest first; see ``hpcssl.evaluate``."""
        from hpcssl.evals.rows import read_rows

        names = sorted(path.stem for path in self.folder.evals.glob("*.jsonl"))
        return Records(row for name in names for row in read_rows(self.folder, name))

    @property
    def weights(self) -> dict[int, Path]:
        """The exported weights files by step; step 0 is the encoder that the training began with."""
        paths = sorted(self.folder.weights.glob("step-*.safetensors"))
        return {int(path.stem.removeprefix("step-")): path for path in paths}

    @property
    def finished(self) -> bool:
        """Whether the training has reached its last step."""
        return self.folder.finished is not None

    @property
    def step(self) -> int:
        """The last step that the journal has; 0 before the first."""
        return max((record["step"] for record in self.journal), default=0)

    @property
    def digest(self) -> str:
        """The sha256 of the whole state in the newest checkpoint, as ``hpcssl digest`` prints it.

        It is the same for any number of processes.

        Raises:
            ResumeError: There is no checkpoint.
        """
        from hpcssl.checkpoint.manager import checkpoint_digest

        return checkpoint_digest(self.folder)

    def encoder(self, step: int | str = "last") -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor]]:
        """Load the encoder that the run has exported (``hpcssl.load_backbone``).

        Args:
            step: ``last``, ``first`` (step 0) or a number of steps.

        Returns:
            The backbone in evaluation mode, which turns images [B, 3, H, W] into features [B, D], and the transform
            from a PIL image to [3, H, W].

        Raises:
            EvalError: The run has no weights of this step.
        """
        from hpcssl.nets.importers import load_backbone
        from hpcssl.nets.run_weights import find_weights

        return load_backbone(find_weights(self.folder, step))


_OF_EVENT = ("event", "time", "attempt", "cause", "consequence", "longest_waits", "unlogged_s")


def _describe_attempt(lines: AttemptLines) -> dict[str, Any]:
    """One record of all that the lines of an attempt say, without what describes the lines themselves."""
    record: dict[str, Any] = {"attempt": lines.start["attempt"], "cause": lines.cause}
    for name, line in [("started", lines.start), *(("ended", end) for end in lines.ends)]:
        record |= {name: line.get("time"), **{key: value for key, value in line.items() if key not in _OF_EVENT}}
    return record
