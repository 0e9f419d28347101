"""Ranks as children of one process that imported torch once, and the ports at which they meet.

Forking saves the seconds that every new Python process needs to import torch. Scripts such as tests/resume/attempts.py
use this module.
"""

import os
import select
import signal
import socket
import traceback

from hpcssl.errors import Stopped
from hpcssl.signals import STOPPING, StopFlag

_RESERVED = []


def free_port():
    """Return a free port, reserved for a process that listens on it with ``SO_REUSEADDR``, as torch's rendezvous does.

    The reservation is a bound socket that does not listen. It is kept for the life of this process: were it closed,
    the kernel could give the same port to another test or to an outgoing connection before rank 0 listens.
    """
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    # set after bind: while the kernel chooses a port, it must not take one that another reservation holds
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _RESERVED.append(reserved)
    return reserved.getsockname()[1]


def launcher_variables(rank, world_size, port, token=None):
    """Return the environment variables that a launcher sets for one rank.

    Args:
        rank: Rank of the process; also its local rank, since all ranks run on this machine.
        world_size: Number of ranks.
        port: Port of rank 0's rendezvous.
        token: Name of the attempt; by default one that follows from the port.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HPCSSL_TOKEN": token or f"attempt-{port}",
    }


def fork_rank(log, variables, work):
    """Fork a child that runs ``work(stop)`` and exits with the code that it returns.

    Args:
        log: File to which the child's stdout and stderr are appended; None to share those of this process.
        variables: Environment variables to set in the child.
        work: Function of the child's ``StopFlag``, called in the child only.

    Returns:
        The process id of the child.
    """
    # blocked until the handlers are installed: a signal that is sent at once must not end the child
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        stop = StopFlag().install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # whatever this process inherited
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


def exits_within(pid, timeout):
    """Wait for at most ``timeout`` seconds, and return whether the child has ended."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)


def wait_for_exit_code(pid, timeout=0.0, kill_signal=signal.SIGKILL):
    """Return the exit code of a child, negative if it died of that signal.

    Args:
        pid: Process id of the child.
        timeout: Seconds to wait before ``kill_signal`` is sent.
        kill_signal: Signal that ends a child that still runs.
    """
    if not exits_within(pid, timeout):
        os.kill(pid, kill_signal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
