"""A small training in a fork of the test's process."""

import json
import os

from hpcssl.errors import HpcsslError
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag

BASE = [
    "machine.devices=cpu",
    "views.size=16",
    "optim.batch=8",
    "schedule.steps=12",
    "bank.size=24",
    "machine.checkpoint_steps=2",
    "machine.checkpoint_minutes=0",
    "machine.log_steps=4",
    "model.norm=sync",
]


def train(folder, overrides, *, before=None, allow_pipe=""):
    """Train in a fork of this process, which may change whatever it likes. ``before(step)`` is called before each step.

    Returns:
        None where training has finished, and the error that ended it otherwise.
    """
    from hpcssl.train import loop, main, recipe

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            launch_step = loop.launch_step
            if before:
                loop.launch_step = lambda state, *rest: (before(state.step), launch_step(state, *rest))[1]
            composed = recipe.compose("digits_msf", [*BASE, *overrides])
            code, parts = main.train(RunDir(folder), composed, stop=StopFlag(), allow_pipe=allow_pipe), None
        except HpcsslError as error:
            code, parts = error.exit_code, error.to_json()
        except BaseException as error:
            code, parts = 99, repr(error)
        os.write(write, json.dumps(parts).encode())
        os._exit(code)
    os.close(write)
    with open(read) as file:
        parts = json.loads(file.read())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert isinstance(parts, list) or (code, parts) == (0, None), f"exit code {code}: {parts}"
    error = HpcsslError.from_json(parts) if parts else None
    assert code == (error.exit_code if error else 0)
    return error
