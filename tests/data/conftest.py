"""A server on this machine that misbehaves as it is told."""

import contextlib
import http.server
import shutil
import threading
import time
from functools import partial

import pytest


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; the server's ``faults`` [(name, kind, how often)] strike first, its ``asked`` are the names.

    ``kind``: an HTTP status, ``stall`` (the header, half of the file, and then nothing), ``silent`` (no byte at all),
    ``cut`` (half of the file) or ``other`` (as many other bytes).
    """

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if self.headers.get("Range") == "bytes=0-0":
            self.server.probes += 1
        else:
            self.server.asked.append(name)
        password = self.server.password
        if password and self.headers.get("Authorization") != password:
            self.send_error(401)
        elif (kind := self.server.strike(name)) is None:
            super().do_GET()
        elif isinstance(kind, int):
            self.send_error(kind)
        else:
            with contextlib.suppress(OSError):
                self.misbehave(kind)
            self.close_connection = True

    def misbehave(self, kind):
        with open(self.translate_path(self.path), "rb") as file:
            body = file.read()
        if kind != "silent":
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(bytes(b ^ 255 for b in body) if kind == "other" else body[:len(body) // 2])
            self.wfile.flush()
        if kind in ("stall", "silent"):
            while not self.server.over:
                time.sleep(0.02)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    password, over, probes = None, False, 0

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.folder, self.asked, self.faults, self.turn = folder, [], [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def strike(self, name):
        with self.turn:
            for fault in self.faults:
                if fault[0] in (name, "*") and fault[2] > 0:
                    fault[2] -= 1
                    return fault[1]
        return None

    def fail(self, name, kind, times=10**6):
        self.faults.append([name, kind, times])


@pytest.fixture
def copy(shards, tmp_path):
    """A copy of the shared shards that a test may damage."""
    return shutil.copytree(shards.root, tmp_path / "copy")


@pytest.fixture
def server(copy):
    """That copy over http: ``server.url``, ``server.fail(name, kind, times)``, ``server.asked``."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads http through curl")
    with Server(copy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.over = True
        server.shutdown()
        thread.join()
