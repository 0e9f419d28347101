"""The paths of a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcssl import files
from hpcssl.errors import EvalError


@dataclass(frozen=True, init=False)
class RunDir:
    """All paths of one run. No other code joins strings into paths of a run.

    Args:
        root: The run folder; a relative path counts from the current directory.
    """

    root: Path

    def __init__(self, root: Path | str):
        object.__setattr__(self, "root", Path(root).absolute())

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.root / "config.yaml"

    @property
    def code(self) -> Path:
        """Copy of the source code that the jobs of this run execute."""
        return self.root / "code"

    @property
    def data(self) -> Path:
        """Digest of the training shards."""
        return self.root / "data.json"

    @property
    def parent(self) -> Path:
        """The checkpoint of another run that this run started from; absent for a run that started from step 0."""
        return self.root / "parent.json"

    @property
    def shards(self) -> Path:
        """Size, times and hashes of a few images of each training shard."""
        return self.root / "shards.json"

    @property
    def journal(self) -> Path:
        """Scalars per step, as JSON lines."""
        return self.root / "journal.jsonl"

    @property
    def samples(self) -> Path:
        """Sample ids per step, as JSON lines; written if ``machine.log_sample_ids`` is set."""
        return self.root / "samples.jsonl"

    @property
    def events(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def damaged(self) -> Path:
        """Samples that could not be decoded, as JSON lines."""
        return self.root / "damaged.jsonl"

    @property
    def attempts(self) -> Path:
        """Start and end of every attempt, as JSON lines."""
        return self.root / "attempts.jsonl"

    @property
    def jobs(self) -> Path:
        """Submitted jobs, as JSON lines."""
        return self.root / "jobs.jsonl"

    @property
    def chain(self) -> Path:
        """Plan of the evaluations that the training submits while it runs, with the cluster profile."""
        return self.root / "chain.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        """Folder of the exported encoders."""
        return self.root / "weights"

    @property
    def evals(self) -> Path:
        """Folder of the evaluations' results."""
        return self.root / "evals"

    @property
    def features(self) -> Path:
        """Folder of stored features."""
        return self.root / "evals" / "features"

    @property
    def logs(self) -> Path:
        """Folder of the jobs' output."""
        return self.root / "logs"

    @property
    def lock(self) -> Path:
        """Names the process that trains in this folder."""
        return self.root / "lock"

    @property
    def done(self) -> Path:
        """Marks a finished run."""
        return self.root / "done.json"

    @property
    def finished(self) -> dict[str, Any] | None:
        """Content of ``done``: the last ``step`` and its ``weights``.

        None before the end, and if the file is damaged: training then resumes from its last checkpoint and writes it
        again.
        """
        return files.read_record(self.done, {"step": int})

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def weights_at(self, step: int) -> Path:
        """File of the encoder exported at a step."""
        return self.weights / f"step-{step:08d}.safetensors"

    def tracking(self, name: str) -> Path:
        """What was sent to an experiment tracker."""
        return self.root / "tracking" / f"{name}.json"

    def eval_rows(self, name: str) -> Path:
        """Results of an evaluation, as JSON lines."""
        return self.evals / f"{name}.jsonl"

    def eval_state(self, name: str, identity: str) -> Path:
        """Where an unfinished evaluation keeps the state that it resumes from."""
        return self.evals / "unfinished" / f"{name}-{identity[:16]}.safetensors"


def open_run(path: Path | str) -> RunDir:
    """Open a run folder. Raises EvalError for any other path."""
    run = RunDir(path)
    what = f"run folder {run.root}"
    if not run.root.is_dir():
        raise EvalError(what, got="no such folder", expected="the folder of a run", fix="check the path")
    if not run.config.exists():
        raise EvalError(
            what,
            got="no config.yaml in it",
            expected="the folder of a run",
            fix="name the run folders themselves, such as runs/demo",
        )
    return run


def find_runs(folder: Path, depth: int = 3) -> list[RunDir]:
    """Return the runs below a folder that is no run itself, sorted by path; runs inside of runs are left out.

    Args:
        folder: The folder; a run, or a path that is no folder, holds none.
        depth: Number of levels of folders that are searched.
    """
    if not folder.is_dir() or RunDir(folder).config.exists():
        return []
    runs: list[RunDir] = []
    for path in sorted(folder.iterdir()):
        if RunDir(path).config.exists():
            runs.append(RunDir(path))
        elif depth > 1 and not path.is_symlink() and not path.name.startswith("."):
            runs += find_runs(path, depth - 1)
    return runs
