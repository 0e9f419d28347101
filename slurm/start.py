"""First program of every task: hold the stopping signals back until the training can take them.

``python -m slurm.start [-u] -m MODULE RUN [ARGUMENTS…]`` blocks them and runs the module. A signal that comes while
Python still imports waits in the kernel, instead of killing the task; ``job`` lets it through once its own handlers
stand. Before it does so, it refuses to run what others can have written (``trust``).
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from hpcssl.errors import SubmitError
from slurm import trust

HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
GPUS = "HPCSSL_CUDA_VISIBLE_DEVICES"


def hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release() -> None:
    """Let held signals through, to whatever handlers stand now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def main(words: list[str]) -> None:
    hold()
    if GPUS in os.environ:  # submitit's local executor hides every GPU, or numbers them from 0 whatever was visible
        seen = os.environ.pop(GPUS)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if seen != "all":
            os.environ["CUDA_VISIBLE_DEVICES"] = seen
    words = [w for w in words if w != "-u"]
    sys.argv = words[1:]  # "-m" MODULE RUN …
    try:
        trust.check(words[2])
    except (SubmitError, OSError) as error:
        sys.exit(f"hpcssl: {error}")
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
