"""Where rank 0 hosts the store of an attempt: it answers at the first free port of a list that all ranks know.

The list follows from the attempt's token (``launch.ports_for``), and the answer is one line with that token and the
store's own port. torch's client waits without a limit for a program that accepts a connection and never answers, so a
rank first reads this line, with a timeout: another program or another attempt at one of the ports is passed over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import threading

from hpcssl.distributed.launch import LaunchInfo, ports_for
from hpcssl.errors import WorldError

CONNECT_S = 5.0
"""Seconds that one port may take to answer."""
_MAX_BYTES = 4096  # of an answer


class Announcement:
    """Answers every connection to one of the attempt's ports until it is closed.

    Args:
        info: Address and token of the attempt.
        store_port: Port of the store on this host.

    Attributes:
        port: Port that answers.

    Raises:
        WorldError: All of the attempt's ports are in use.
    """

    def __init__(self, info: LaunchInfo, store_port: int):
        self._answer = (json.dumps({"token": info.token, "port": store_port}) + "\n").encode()
        self._socket = _listen(info)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="announcement", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with contextlib.suppress(OSError), connection:
                connection.sendall(self._answer)

    def close(self) -> None:
        """Stop answering."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        self._thread.join()


def _listen(info: LaunchInfo) -> socket.socket:
    ports, dual = ports_for(info), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=dual)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):  # the latter where a site reserves ports
                raise
    raise WorldError(
        f"rank 0 at {info.address}",
        got=f"ports {', '.join(map(str, ports))} in use",
        expected="a free port for the rendezvous",
        fix="end the processes that hold them (`ss -ltnp` lists them), or set another MASTER_PORT",
    )


def read(address: str, port: int) -> tuple[str, int] | None:
    """The token and the store's port that are announced at a port; None where there is no announcement."""
    try:
        with socket.create_connection((address, port), CONNECT_S) as connection, connection.makefile("rb") as lines:
            answer = json.loads(lines.readline(_MAX_BYTES))
        return str(answer["token"]), int(answer["port"])
    except (OSError, ValueError, LookupError, TypeError):  # nobody listens there, or another program
        return None
