"""Ranks that are forked from one process, which has imported torch once for all of them: for scripts that tests run."""

import os
import select
import signal
import socket
import traceback

from hpcssl.errors import Stopped
from hpcssl.signals import StopFlag


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def place(rank, world, port, token=None):
    """A launcher's variables; ``token`` names the attempt."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "HPCSSL_TOKEN": token or f"attempt-{port}"}


def fork_rank(log, variables, work):
    """Fork a process that leaves with the code of ``work(stop)``; its pid. Its words go to ``log``, or (None) to where
    its parent's go."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stop = StopFlag().install()
        if log is not None:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
        os.environ.update(variables)
        code = work(stop)
    except Stopped as stopped:
        code = stopped.exit_code
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def over(pid, seconds):
    """Whether a child ends within so many seconds."""
    fd = os.pidfd_open(pid)
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def code_of(pid, patience=0.0, otherwise=signal.SIGKILL):
    """The exit code of a child (negative: died of that signal), which ``otherwise`` ends where it takes too long."""
    if not over(pid, patience):
        os.kill(pid, otherwise)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
