"""Remote shard folders, read from an HTTP server on this machine: its faults, and addresses that must not be opened."""

import hashlib
import json
import os
import resource
import shutil

import pytest

from hpcssl.data import stream
from hpcssl.data.address import check_address, is_remote
from hpcssl.data.stream import Remote
from hpcssl.errors import ConfigError, DataError
from tests.printed import numbers_in


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(stream, "_PAUSE_S", 0.01)


def remote(url, **options):
    # stall_s is so long that no working server reaches it on a slow machine; tests of silent servers set their own
    return Remote(url, **{"stall_s": 60, "tries": 3} | options)


def fetch(source, shards, number, folder):
    """Download a shard; whether it equals the original."""
    source.fetch(shards.shards[number], folder / "fetched.tar")
    return (folder / "fetched.tar").read_bytes() == shards.path(number).read_bytes()


def test_http_gives_the_same_set(shards, server, tmp_path):
    opened = remote(server.url + "/").open()
    assert opened.digest == shards.digest and len(opened) == len(shards) and opened.classes == shards.classes
    assert (opened.labels == shards.labels).all()
    assert fetch(remote(server.url), shards, 3, tmp_path)


def test_an_index_may_be_larger_than_the_memory_but_not_than_its_samples(shards, server, monkeypatch):
    """The index is mapped from a file. A server that sends more than the described samples need is refused."""
    monkeypatch.setattr(stream, "_INDEX_LIMIT", (shards.root / "index.json").stat().st_size)  # of index.json only
    opened = remote(server.url).open()
    assert opened.digest == shards.digest and not opened.rows.flags.owndata
    with open(server.folder / "index.npy", "ab") as file:
        file.write(bytes(2**16))
    with pytest.raises(DataError) as caught:
        remote(server.url, tries=1).open()
    assert caught.value.what == f"index.npy of {server.url}"
    assert numbers_in(caught.value.got)[0] == 2**16 + len(shards) * shards.rows.itemsize


def test_a_transfer_works_with_more_than_1024_open_files(shards, server, tmp_path):
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


def test_file_addresses_work_like_http(shards, tmp_path):
    source = remote(f"file://{shards.root}")
    assert source.open().digest == shards.digest and fetch(source, shards, 0, tmp_path)
    with pytest.raises(DataError) as caught:
        remote("file:///no/where").read_index()
    assert caught.value.what == "index.json of file:///no/where"
    assert "FileNotFoundError" in caught.value.got and numbers_in(caught.value.got)[-2:] == [1, 3]


@pytest.mark.parametrize(
    "kind",
    [
        "stall",
        "cut",
        "other",
        pytest.param("silent", marks=pytest.mark.full),
        pytest.param(401, marks=pytest.mark.full),
    ],
)
def test_a_transient_fault_is_retried(shards, server, tmp_path, kind, caplog):
    server.fail("shard-000001.tar", kind, 1)
    # of a silent server the limit must pass once, and the second answer must come within it
    source = remote(server.url, **{"stall_s": 3} if kind in ("stall", "silent") else {})
    assert fetch(source, shards, 1, tmp_path)
    assert server.requests.count("shard-000001.tar") == 2
    assert [numbers_in(message)[-2:] for message in caplog.messages] == [[2, 3]]  # attempt 2 of 3
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["fetched.tar"]


@pytest.mark.full
def test_curl_itself_waits_for_a_server_that_recovers(shards, server, tmp_path, caplog):
    server.fail("shard-000001.tar", 503, 1)
    assert fetch(remote(server.url, stall_s=30), shards, 1, tmp_path)
    assert server.requests.count("shard-000001.tar") == 2 and not caplog.messages


@pytest.mark.parametrize(
    "kind, numbers",
    [
        (500, [0.4, 500, 3, 3]),  # no byte for 0.4 s, because curl waits itself; HTTP 500; attempt 3 of 3
        ("stall", [0.4, 3, 3]),
        ("cut", [18, 3, 3]),  # curl's exit code for a partial transfer
        ("other", [3, 3]),
        (404, [22, 404, 1, 3]),  # curl's exit code for an HTTP error
    ],
)
def test_a_permanent_fault_is_an_error_with_its_reason(shards, server, tmp_path, kind, numbers):
    server.fail("shard-000001.tar", kind)
    with pytest.raises(DataError) as caught:
        fetch(remote(server.url, **{"stall_s": 0.4} if 0.4 in numbers else {}), shards, 1, tmp_path)
    error, shard = caught.value, shards.shards[1]
    assert error.what == f"shard-000001.tar of {server.url}" and numbers_in(error.got) == numbers
    assert numbers_in(error.expected)[0] == shard.bytes and shard.sha256[:12] in error.expected
    if kind == "other":
        inverted = bytes(byte ^ 255 for byte in shards.path(1).read_bytes())
        assert hashlib.sha256(inverted).hexdigest()[:12] in error.got
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_a_server_that_does_not_answer_is_an_error(shards, server, tmp_path):
    server.server_close()
    with pytest.raises(DataError) as caught:
        remote(server.url).read_index()
    assert caught.value.what == f"index.json of {server.url}"
    assert numbers_in(caught.value.got) == [7, 3, 3]  # curl's exit code for no connection; attempt 3 of 3


@pytest.mark.parametrize("name", ["index.json", "index.npy"])
@pytest.mark.parametrize("kind", ["other", "cut"])
def test_a_damaged_index_file_is_downloaded_again(shards, server, name, kind):
    server.fail(name, kind, 1)
    assert remote(server.url).open().digest == shards.digest
    assert server.requests.count(name) == 2
    server.fail(name, kind)
    with pytest.raises(DataError) as caught:
        remote(server.url).open()
    assert caught.value.what == f"{name} of {server.url}" and numbers_in(caught.value.got)[-2:] == [3, 3]


def test_a_file_that_is_longer_than_its_index_says_is_refused(shards, server, copy, tmp_path):
    with open(copy / "shard-000002.tar", "ab") as file:
        file.write(bytes(1 << 21))
    with pytest.raises(DataError) as caught:
        fetch(remote(server.url), shards, 2, tmp_path)
    assert caught.value.what == f"shard-000002.tar of {server.url}"
    assert numbers_in(caught.value.got) == [shards.shards[2].bytes, 3, 3]


def test_a_stalled_transfer_ends_when_the_attempt_ends(shards, server, tmp_path):
    server.fail("shard-000000.tar", "stall")
    with pytest.raises(DataError) as caught:
        fetch(remote(server.url, stall_s=60, stopped=lambda: len(server.requests) > 0), shards, 0, tmp_path)
    assert caught.value.what == f"shard-000000.tar of {server.url}"
    assert numbers_in(caught.value.got) == [1, 3]  # no second attempt, and not 60 s without a byte


def test_passwords_come_from_the_files_of_curl(shards, server, tmp_path, monkeypatch):
    server.password = "Basic YW5uOnNlY3JldA=="  # ann:secret
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CURL_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    with pytest.raises(DataError) as caught:
        remote(server.url).read_index()
    assert numbers_in(caught.value.got) == [22, 401, 1, 3]
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ann password secret\n")
    (tmp_path / ".curlrc").write_text("netrc\n")
    assert remote(server.url).open().digest == shards.digest


SECRET = [
    "http://ann:secret@host/x",
    "https://token@host/x",
    "pipe:curl -s https://ann:secret@host/{}",
    "https://host/x?token=secret",
    "https://host/x#secret",
]


@pytest.mark.parametrize("address", SECRET)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address):
    with pytest.raises(ConfigError) as caught:
        check_address(address, allow_pipe=True)
    assert caught.value.what == "data.train" and "~/.netrc" in caught.value.fix
    assert "secret" not in str(caught.value) and "token@" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "scp://host/x",
        "nonsense://x",
        "htps://host/x",
        "http://host/a b",
        "http://host/$(touch x)",
        "http://host/`id`",
        "http://host/x;id",
        "http://host/x|id",
        "http://host/{a,b}",
        "http://host/[1-3]",
        "http://host/x\ny",
        "-",
        "/folder",
        "http://[x/y",
        "pipe:cat the-same-for-all",
    ],
)
def test_other_schemes_and_shell_syntax_are_refused(address):
    with pytest.raises(ConfigError) as caught:
        check_address(address, allow_pipe=True)
    assert caught.value.what == "data.train" and repr(address) in caught.value.got


def test_is_remote_tells_addresses_from_folders():
    assert all(map(is_remote, ["http://x", "pipe:cat {}", "file:///x", "htps://x"]))
    assert not any(map(is_remote, ["/x", "x", "./a:b", "", "../x/y:z"]))
    for address in ("https://host/a/b", "http://[::1]:80/x", "gs://bucket/a", "http://host/%20x~_-.,+@=&!"):
        check_address(address, allow_pipe=False)


def test_a_shell_command_runs_only_where_it_is_allowed(shards, tmp_path):
    command = f"pipe:touch {tmp_path}/ran; cat {shards.root}/{{}}"
    with pytest.raises(ConfigError) as caught:
        remote(command)
    assert repr(command) in caught.value.got and "--allow-pipe" in caught.value.fix
    assert not (tmp_path / "ran").exists()
    assert remote(command, allow_pipe=True).open().digest == shards.digest
    assert (tmp_path / "ran").exists()
    with pytest.raises(DataError) as caught:
        remote("pipe:exit 3 {}", allow_pipe=True).read_index()
    assert numbers_in(caught.value.got) == [3, 3, 3]  # exit code 3, at attempt 3 of 3


@pytest.mark.parametrize(
    "rule, in_what, in_got, in_fix",
    [
        ("http://nowhere=pipe:touch FOLDER/ran", "GOPEN_REWRITE", "pipe:touch", "--allow-pipe"),
        ("http://nowhere=/etc", "GOPEN_REWRITE", "/etc", ""),
        ("http://nowhere=http://ann:secret@host", "GOPEN_REWRITE", "", "~/.netrc"),
        ("http://nowhere=http://a b", "GOPEN_REWRITE", "http://a b", "%XX"),
        ("nonsense", "environment variable GOPEN_REWRITE", "", "unset"),
        ("(=x", "environment variable GOPEN_REWRITE", "", "unset"),
    ],
)
def test_an_address_is_also_checked_after_gopen_rewrite(tmp_path, monkeypatch, rule, in_what, in_got, in_fix):
    monkeypatch.setenv("GOPEN_REWRITE", rule.replace("FOLDER", str(tmp_path)))
    with pytest.raises(ConfigError) as caught:
        remote("http://nowhere").read_index()
    assert in_what in caught.value.what and in_got in caught.value.got and in_fix in caught.value.fix
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.tar",
        "pipe:rm.tar",
        "a b.tar",
        "http://x/y.tar",
        "-o.tar",
        "x;id.tar",
        "$(id).tar",
        "a|b.tar",
        "/etc/x.tar",
        "é.tar",
        "a.tar\n",
    ],
)
def test_a_shard_name_that_leads_out_of_the_folder_is_refused(copy, name):
    from hpcssl.data.shards import ShardSet

    meta = json.loads((copy / "index.json").read_text())
    meta["shards"][0]["name"] = name
    (copy / "index.json").write_text(json.dumps(meta))
    for open_set in (remote(f"file://{copy}").open, lambda: ShardSet.open(copy)):
        with pytest.raises(DataError) as caught:
            open_set()
        assert repr(name) in caught.value.got


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 2}', "3", '{"format": 1, "shards": [{"name": 3}]}'])
def test_an_index_of_another_kind_is_refused(copy, text):
    (copy / "index.json").write_text(text)
    with pytest.raises(DataError) as caught:
        remote(f"file://{copy}").open()
    assert caught.value.what == f"the index of file://{copy}"
    shutil.rmtree(copy)
