"""The first program of every task: it blocks the stopping signals until the training can handle them.

``python -m slurm.job.bootstrap [-u] -m MODULE RUN [ARGUMENTS…]`` blocks the signals and runs the module. A signal that
arrives while Python still imports waits in the kernel, instead of killing the task; ``slurm.job.task`` unblocks them
once its own handlers are installed. Before it runs the module, it checks that nobody else can have written the code
(``permissions``).
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from hpcssl.errors import SubmitError
from slurm.backend import permissions

BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
GPUS_VARIABLE = "HPCSSL_CUDA_VISIBLE_DEVICES"
"""Environment variable in which the local supervisor passes ``CUDA_VISIBLE_DEVICES`` to its tasks."""


def block_signals() -> None:
    """Block the stopping signals in this thread, and in the threads and processes that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)


def unblock_signals() -> None:
    """Unblock the stopping signals. Those that have arrived meanwhile go to the handlers installed now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)


def main(words: list[str]) -> None:
    """Run a module as the main program, with the signals blocked.

    Args:
        words: The command line: ``[-u] -m MODULE RUN [ARGUMENTS…]``.
    """
    block_signals()
    if GPUS_VARIABLE in os.environ:  # submitit's local executor hides every GPU, or numbers them from 0
        gpus = os.environ.pop(GPUS_VARIABLE)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if gpus != "all":
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    words = [word for word in words if word != "-u"]
    sys.argv = words[1:]  # "-m" MODULE RUN …
    try:
        permissions.check(words[2])
    except (SubmitError, OSError) as error:
        sys.exit(f"hpcssl: {error}")
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
