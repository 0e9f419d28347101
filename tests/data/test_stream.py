"""A remote shard folder through webdataset, from a server on this machine; its faults; and what must not be opened."""

import json
import os
import resource
import shutil

import pytest

from hpcssl.data import stream
from hpcssl.data.stream import Remote, check_address, is_remote
from hpcssl.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(stream, "_PAUSE_S", 0.01)


def remote(url, **options):
    return Remote(url, **{"stall_s": 0.4, "tries": 3} | options)


def fetch(found, shards, number, folder):
    found.fetch(shards.shards[number], folder / "got.tar")
    return (folder / "got.tar").read_bytes() == shards.path(number).read_bytes()


def test_http_gives_the_same_set(shards, server, tmp_path):
    found = remote(server.url + "/").open()
    assert found.digest == shards.digest and len(found) == len(shards) and found.classes == shards.classes
    assert (found.labels == shards.labels).all()
    assert fetch(remote(server.url), shards, 3, tmp_path)


def test_any_number_of_open_files(shards, server, tmp_path):
    """A reader keeps the files of all shards open, of which a set may have thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("no more than 1,200 files can be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]
    try:
        assert fetch(remote(server.url), shards, 0, tmp_path)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_work_alike(shards, tmp_path):
    found = remote(f"file://{shards.root}")
    assert found.open().digest == shards.digest and fetch(found, shards, 0, tmp_path)
    with pytest.raises(DataError, match=r"index.json of file:///no/where: got FileNotFoundError.*try 1 of 3"):
        remote("file:///no/where").text()


@pytest.mark.parametrize("kind", ["stall", "cut", "other", pytest.param("silent", marks=pytest.mark.full),
                                  pytest.param(401, marks=pytest.mark.full)])
def test_a_fault_that_passes_is_borne(shards, server, tmp_path, kind, caplog):
    server.fail("shard-000001.tar", kind, 1)
    assert fetch(remote(server.url), shards, 1, tmp_path)
    assert server.asked.count("shard-000001.tar") == 2 and "try 2 of 3" in caplog.text
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["got.tar"]


@pytest.mark.full
def test_curl_itself_waits_for_a_server_that_recovers(shards, server, tmp_path, caplog):
    server.fail("shard-000001.tar", 503, 1)
    assert fetch(remote(server.url, stall_s=30), shards, 1, tmp_path)
    assert server.asked.count("shard-000001.tar") == 2 and "try" not in caplog.text


@pytest.mark.parametrize("kind, said", [
    (500, r"no byte for 0.4 s; asked again, the server answers HTTP 500, at try 3 of 3; expected \d+ bytes with sha"),
    ("stall", r"got no byte for 0.4 s, at try 3 of 3"),
    ("cut", r"got exit code 18 of curl \(a transfer cut half-way\), at try 3 of 3"),
    ("other", r"got other bytes \(sha256 \w{12}…\), at try 3 of 3"),
    (404, r"got exit code 22 of curl \(an HTTP error\); asked again, the server answers HTTP 404, at try 1 of 3")])
def test_a_fault_for_ever_is_one_sentence(shards, server, tmp_path, kind, said):
    server.fail("shard-000001.tar", kind)
    with pytest.raises(DataError, match=rf"shard-000001.tar of {server.url}.*{said}"):
        fetch(remote(server.url), shards, 1, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_a_server_that_is_away_is_one_sentence(shards, server, tmp_path):
    server.server_close()
    with pytest.raises(DataError, match=r"index.json of http.*exit code 7 of curl \(no connection\).*does not answer"):
        remote(server.url).text()


@pytest.mark.parametrize("name", ["index.json", "index.npy"])
@pytest.mark.parametrize("kind", ["other", "cut"])
def test_an_index_that_came_damaged_is_asked_for_again(shards, server, name, kind):
    server.fail(name, kind, 1)
    assert remote(server.url).open().digest == shards.digest
    assert server.asked.count(name) == 2
    server.fail(name, kind)
    with pytest.raises(DataError, match=rf"{name} of http.*at try 3 of 3"):
        remote(server.url).open()


def test_a_server_that_never_ends_is_cut(shards, server, copy, tmp_path):
    with open(copy / "shard-000002.tar", "ab") as file:
        file.write(bytes(1 << 21))
    with pytest.raises(DataError, match=r"got more than \d+ bytes, at try 3"):
        fetch(remote(server.url), shards, 2, tmp_path)


def test_an_end_is_not_waited_for(shards, server, tmp_path):
    server.fail("shard-000000.tar", "stall")
    with pytest.raises(DataError, match="got the end of the attempt, at try 1"):
        fetch(remote(server.url, stall_s=60, over=lambda: len(server.asked) > 0), shards, 0, tmp_path)


def test_passwords_come_from_curls_own_files(shards, server, tmp_path, monkeypatch):
    server.password = "Basic YW5uOnNlY3JldA=="  # ann:secret
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CURL_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    with pytest.raises(DataError, match="HTTP 401, at try 1"):
        remote(server.url).text()
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ann password secret\n")
    (tmp_path / ".curlrc").write_text("netrc\n")
    assert remote(server.url).open().digest == shards.digest


SECRET = ["http://ann:secret@host/x", "https://token@host/x", "pipe:curl -s https://ann:secret@host/{}",
          "https://host/x?token=secret", "https://host/x#secret"]


@pytest.mark.parametrize("address", SECRET)
def test_no_secret_is_taken_or_repeated(address):
    with pytest.raises(ConfigError, match="netrc") as caught:
        check_address(address, allow_pipe=True)
    assert "secret" not in str(caught.value) and "token@" not in str(caught.value)


@pytest.mark.parametrize("address", [
    "scp://host/x", "nonsense://x", "htps://host/x", "http://host/a b", "http://host/$(touch x)", "http://host/`id`",
    "http://host/x;id", "http://host/x|id", "http://host/{a,b}", "http://host/[1-3]", "http://host/x\ny", "-",
    "/folder", "http://[x/y", "pipe:cat the-same-for-all"])
def test_other_addresses_are_refused(address):
    with pytest.raises(ConfigError, match="expected"):
        check_address(address, allow_pipe=True)


def test_what_is_an_address():
    assert all(map(is_remote, ["http://x", "pipe:cat {}", "file:///x", "htps://x"]))
    assert not any(map(is_remote, ["/x", "x", "./a:b", "", "../x/y:z"]))
    for address in ("https://host/a/b", "http://[::1]:80/x", "gs://bucket/a", "http://host/%20x~_-.,+@=&!"):
        check_address(address, allow_pipe=False)


def test_shell_text_is_refused_unless_allowed(shards, tmp_path, monkeypatch):
    command = f"pipe:touch {tmp_path}/ran; cat {shards.root}/{{}}"
    with pytest.raises(ConfigError, match="--allow-pipe"):
        remote(command)
    assert not (tmp_path / "ran").exists()
    assert remote(command, allow_pipe=True).open().digest == shards.digest
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with pytest.raises(DataError, match=r"exit code 3 of the command, at try 3 of 3"):
        remote("pipe:exit 3 {}", allow_pipe=True).text()
    for rule, said in ((f"http://nowhere=pipe:touch {tmp_path}/ran", "--allow-pipe"), ("http://nowhere=/etc", "scheme"),
                       ("http://nowhere=http://ann:secret@host", "netrc"), ("http://nowhere=http://a b", "blanks"),
                       ("nonsense", "GOPEN_REWRITE"), ("(=x", "GOPEN_REWRITE")):
        monkeypatch.setenv("GOPEN_REWRITE", rule)
        with pytest.raises(ConfigError, match=said):
            remote("http://nowhere").text()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../../secret.tar", "pipe:rm.tar", "a b.tar", "http://x/y.tar", "-o.tar", "x;id.tar",
                                  "$(id).tar", "a|b.tar", "/etc/x.tar", "é.tar", "a.tar\n"])
def test_an_index_cannot_lead_elsewhere(copy, name):
    from hpcssl.data.shards import ShardSet

    meta = json.loads((copy / "index.json").read_text())
    meta["shards"][0]["name"] = name
    (copy / "index.json").write_text(json.dumps(meta))
    for opened in (remote(f"file://{copy}").open, lambda: ShardSet.open(copy)):
        with pytest.raises(DataError, match="plain names"):
            opened()


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 2}', "3", '{"format": 1, "shards": [{"name": 3}]}'])
def test_an_index_of_another_kind_is_one_sentence(copy, text):
    (copy / "index.json").write_text(text)
    with pytest.raises(DataError, match="the index of file"):
        remote(f"file://{copy}").open()
    shutil.rmtree(copy)
