"""Remote shards through webdataset, from a server on this machine; and what must not be opened."""

import functools
import http.server
import json
import shutil
import threading

import pytest

from hpcssl.data.reader import Reader
from hpcssl.data.stream import Stream
from hpcssl.errors import DataError

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def copy(shards, tmp_path):
    """A copy of the shared shards that a test may damage."""
    return shutil.copytree(shards.root, tmp_path / "copy")


@pytest.fixture
def server(copy):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=copy)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def expected(shards):
    with Reader(shards) as reader:
        return [(shards.key(i), reader.read(i), i % 2) for i in range(len(shards))]


@needs_curl
def test_http_gives_every_sample_in_order(shards, server):
    stream = Stream(server + "/")
    assert stream.classes == shards.classes
    assert list(stream) == expected(shards)
    assert list(stream.samples([3, 1])) == expected(shards)[24:32] + expected(shards)[8:16]


@needs_curl
def test_a_missing_file_is_one_sentence(copy, server):
    (copy / "shard-000002.tar").unlink()
    stream, seen = Stream(server), 0
    with pytest.raises(DataError, match=r"shard-000002.tar of http.*after 0 samples"):
        for _ in stream:
            seen += 1
    assert seen == 16
    (copy / "index.json").unlink()
    with pytest.raises(DataError, match="the index of http"):
        Stream(server)


def test_files_work_alike(shards):
    assert list(Stream(f"file://{shards.root}")) == expected(shards)


@pytest.mark.parametrize("harm", ["truncated", "cut between samples", "flipped"])
def test_damage_that_the_library_passes_over_is_named(copy, shards, harm):
    path = copy / "shard-000001.tar"
    body = bytearray(path.read_bytes())
    if harm == "truncated":
        body = body[:len(body) // 2]
    elif harm == "cut between samples":
        row = shards.rows[12]
        body = body[:int(row["header"])]
    else:
        body[int(shards.rows[12]["offset"]) + 50] ^= 255
    path.write_bytes(body)
    with pytest.raises(DataError, match=r"shard-000001.tar of file:"):
        list(Stream(f"file://{copy}"))


def test_shell_text_is_refused_unless_allowed(shards, tmp_path, monkeypatch):
    command = f"pipe:touch {tmp_path}/ran; cat {shards.root}/{{}}"
    with pytest.raises(DataError, match="--allow-pipe"):
        Stream(command)
    assert not (tmp_path / "ran").exists()
    assert list(Stream(command, allow_pipe=True)) == expected(shards)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    monkeypatch.setenv("GOPEN_REWRITE", f"http://nowhere=pipe:touch {tmp_path}/ran")
    with pytest.raises(DataError, match="--allow-pipe"):
        Stream("http://nowhere")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("url", ["/some/folder", "-", "scp://host/x", "nonsense://x"])
def test_other_addresses_are_refused(url):
    with pytest.raises(DataError, match="expected http:"):
        Stream(url)


@pytest.mark.parametrize("name", ["../../secret.tar", "pipe:rm.tar", "a b.tar", "http://x/y.tar", "-o.tar/../x"])
def test_an_index_cannot_lead_elsewhere(copy, name):
    meta = json.loads((copy / "index.json").read_text())
    meta["shards"][0]["name"] = name
    (copy / "index.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="plain names"):
        next(iter(Stream(f"file://{copy}")))
