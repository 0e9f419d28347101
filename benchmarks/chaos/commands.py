"""The commands that start the training of a soak test, as a user types them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hpcssl.run_dir import RunDir

PERIOD = 5
"""Steps between two checkpoints."""
RECIPE = [
    "digits_msf",
    "optim.batch=32",
    "bank.size=256",
    "machine.devices=cpu",
    "machine.log_steps=1",
    f"machine.checkpoint_steps={PERIOD}",
    "machine.checkpoint_minutes=0",
    "machine.hang_minutes=0.5",
]
FOUR_TASKS = ["-N2", "--ntasks-per-node=2", "--time=60"]


class StuckError(Exception):
    """The training did not recover by itself."""


@dataclass
class TrainingCommands:
    """The commands that start a training and compare its result, as a user types them.

    Attributes:
        data: The folder of training shards.
        steps: Steps of the training.
    """

    data: Path
    steps: int

    def arguments(self, run: RunDir) -> list[str]:
        """Return recipe, run folder and recipe values."""
        return [
            *RECIPE[:1],
            "--run",
            str(run.root),
            *RECIPE[1:],
            f"schedule.steps={self.steps}",
            f"data.train={self.data}",
        ]

    def submit(self, run: RunDir) -> str:
        """Submit the training, or continue it. Return the job id."""
        return run_module("slurm", *self.submission(run), "--parsable").splitlines()[0]

    def submit_and_kill(self, run: RunDir) -> None:
        """Submit the training, and kill the command when SLURM has accepted the job, before it can be recorded."""
        with tempfile.TemporaryDirectory() as folder:
            sbatch = Path(folder) / "sbatch"
            sbatch.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"\nkill -KILL $PPID\n')
            sbatch.chmod(0o755)
            environ = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
            command = [sys.executable, "-m", "slurm", *self.submission(run)]
            subprocess.run(command, capture_output=True, timeout=300, env=environ)

    def digest(self, run: RunDir) -> str:
        """Return the digest of the newest checkpoint."""
        return run_module("hpcssl", "digest", "--run", str(run.root)).strip()

    def submission(self, run: RunDir) -> list[str]:
        words = self.arguments(run)
        return [*words[:3], *FOUR_TASKS, *words[3:]]


def run_module(*words: str) -> str:
    """Run a module's command line. Return its standard output.

    Raises:
        StuckError: It failed.
    """
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise StuckError(f"`{' '.join(words[:3])}`: exit code {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout
