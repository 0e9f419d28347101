"""An HTTP server on this machine that serves a shard folder and fails on request."""

import contextlib
import http.server
import shutil
import threading
import time
from functools import partial

import pytest


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, unless the server has a fault for the requested file (see ``Server.fail``)."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if self.headers.get("Range") == "bytes=0-0":
            self.server.probes += 1
        else:
            self.server.requests.append(name)
        password = self.server.password
        if password and self.headers.get("Authorization") != password:
            self.send_error(401)
        elif (kind := self.server.take_fault(name)) is None:
            super().do_GET()
        elif isinstance(kind, int):
            self.send_error(kind)
        else:
            with contextlib.suppress(OSError):
                self.send_faulty(kind)
            self.close_connection = True

    def send_faulty(self, kind):
        with open(self.translate_path(self.path), "rb") as file:
            body = file.read()
        if kind != "silent":
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(bytes(b ^ 255 for b in body) if kind == "other" else body[: len(body) // 2])
            self.wfile.flush()
        if kind in ("stall", "silent"):
            while not self.server.closing:
                time.sleep(0.02)


class Server(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
        requests: Names of the requested files, without probes for one byte.
        probes: Number of requests for one byte, which a client sends to find out why a transfer failed.
        password: Value that the header ``Authorization`` must have; None where no password is needed.
        closing: Set when the server ends, so that stalled transfers end too.
    """

    daemon_threads = True
    password, closing, probes = None, False, 0

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.folder, self.requests, self.faults, self.lock = folder, [], [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def take_fault(self, name):
        with self.lock:
            for fault in self.faults:
                if fault[0] in (name, "*") and fault[2] > 0:
                    fault[2] -= 1
                    return fault[1]
        return None

    def fail(self, name, kind, times=10**6):
        """Fail the next requests for a file.

        Args:
            name: Name of the file, or ``*`` for all.
            kind: An HTTP status; ``stall`` (the header, half of the file, and then nothing); ``silent`` (no byte at
                all); ``cut`` (half of the file); or ``other`` (as many other bytes).
            times: Number of requests that fail.
        """
        self.faults.append([name, kind, times])


@pytest.fixture
def copy(shards, tmp_path):
    """A copy of the shared shards that a test may damage."""
    return shutil.copytree(shards.root, tmp_path / "copy")


@pytest.fixture
def server(copy):
    """That copy over HTTP: ``server.url``, ``server.fail(name, kind, times)``, ``server.requests``."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads http through curl")
    with Server(copy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.closing = True
        server.shutdown()
        thread.join()
