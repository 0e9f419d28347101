"""How a batch script and its tasks count the launches inside one allocation."""

from __future__ import annotations

import os

LAUNCH_VARIABLE = "HPCSSL_LAUNCH"
"""Environment variable in which the batch script counts the launches of its tasks, from 0."""
LAUNCH_TIME_VARIABLE = "HPCSSL_LAUNCH_TIME"
"""Environment variable with the Unix time at which the batch script began this launch."""
NODES_VARIABLE = "HPCSSL_STEP_NODES"
"""Shell variable of a batch script with spare nodes: the arguments of srun that select the nodes of a launch."""
WAIT_VARIABLE = "HPCSSL_STEP_WAIT"
"""Shell variable of a batch script: the argument of srun that limits how long another launch waits for its nodes."""
STEP_WAIT_S = 60
"""Seconds that srun waits for the nodes of another launch. SLURM may never learn that the step before has ended, if its
slurmstepd was killed; without a limit srun would then wait until the time limit of the job."""
EXIT_RELAUNCH = 76
"""Exit code with which the epilogue tells the batch script to launch the tasks again. No job ends with it."""


def current_launch() -> int:
    """Return how often the batch script has launched the tasks before, since SLURM started it."""
    return int(os.environ.get(LAUNCH_VARIABLE, 0))
