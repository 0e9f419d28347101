"""Commands of the package that start in a fork of one process, which has imported torch once.

Importing torch and torchvision takes seconds, more than most commands of the documentation take. ``CommandServer``
starts this file as a process and writes scripts named like the commands; a script sends its arguments, environment,
folder and standard streams to that process, which forks a child that runs the command there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("hpcssl", "hpcssl-submit", "hpcssl-shard")
MAX_REQUEST = 1 << 20
SCRIPT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = {{"name": {name!r}, "words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
answer = server.recv(16)
sys.exit(int(answer) if answer else 70)
"""


class CommandServer:
    """The process, and a folder of scripts to put first in PATH.

    Args:
        folder: An empty folder for the scripts and the socket. Its path must be short: addresses of sockets have at
            most 107 bytes.
        environment: Environment of the process, in which torch is imported.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        address = str(folder / "socket")
        for name in COMMANDS:
            script = folder / name
            script.write_text(SCRIPT.format(python=sys.executable, address=address, name=name))
            script.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(address)
        listener.listen()
        descriptor = listener.fileno()
        command = [sys.executable, __file__, str(descriptor)]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[descriptor], stdin=subprocess.DEVNULL)
        listener.close()  # once that process has ended, no command waits for it

    def close(self) -> None:
        """End the process. Commands that still run go on."""
        self._process.kill()
        self._process.wait()


def serve(listener: socket.socket) -> None:
    """Run the commands that are sent, each in a child of its own, until this process is killed."""
    import torch.utils.tensorboard  # noqa: F401 - so that no command has to
    import torchvision  # noqa: F401

    import hpcssl.cli
    import slurm.cli  # noqa: F401
    from hpcssl import cli_runner

    entry_points = (hpcssl.cli.main, cli_runner.submit_main, cli_runner.shard_main)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child is waited for: each one answers for itself
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            run(connection, dict(zip(COMMANDS, entry_points, strict=True)))
        connection.close()


def run(connection: socket.socket, entry_points: dict[str, Callable[[], None]]) -> None:
    """Run one command in a child of this process, which stays behind to send the exit code. Does not return."""
    message, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST, 3)
    request = json.loads(message)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # whoever sent the command has ended
            connection.send(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    connection.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["name"], *request["words"]]
    entry_points[request["name"]]()
    sys.exit()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    serve(socket.socket(fileno=int(sys.argv[1])))
