"""Triton kernels in Triton's interpreter, on a CPU.

Triton decides when it is imported whether it interprets, so a script that runs kernels is a process of its own: it sets
``TRITON_INTERPRET=1`` and calls ``check``. A test starts it with ``run_script``.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNUSABLE = 77
"""Exit code of a script whose interpreter does not work."""


def check():
    """End the process with ``UNUSABLE`` if the interpreter cannot run a loop whose bounds are arguments.

    That of Triton 3.6 cannot with NumPy 2.4 or newer, which converts no array of one element to an index.
    """
    import numpy
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def count(x, end):
        for at in range(end):
            tl.store(x + at, at)

    x = torch.zeros(3, dtype=torch.int32)
    try:
        count[(1,)](x, 3)
    except Exception as error:
        print(f"the interpreter of triton {triton.__version__} fails with NumPy {numpy.__version__}: {error!r}"[:200])
        sys.exit(UNUSABLE)
    assert x.tolist() == [0, 1, 2]


def run_script(script, *words, timeout=300):
    """Run a script of kernels; skips the test where triton is missing or its interpreter does not work."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, str(script), *map(str, words)]
    done = subprocess.run(
        command, timeout=timeout, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    if done.returncode == UNUSABLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
