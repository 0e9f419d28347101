"""Bad data and bad servers, through the whole training: what it bears, it bears exactly; what not, it names."""

import importlib.util
import io
import json
import os
import shutil
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcssl import run as runs
from hpcssl.errors import HpcsslError
from hpcssl.files import RunDir, read_lines
from hpcssl.signals import StopFlag

BASE = ["machine.devices=cpu", "views.size=16", "optim.batch=8", "schedule.steps=12", "bank.size=24",
        "machine.checkpoint_steps=2", "machine.checkpoint_minutes=0", "machine.log_steps=4", "model.norm=whole"]


def _module(name):
    path = Path(__file__).parents[1] / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def attempt():
    """attempt(folder, overrides, worlds=[1], attempts=[{}]) -> the result of tests/resume/attempts.py."""
    play = _module("resume/attempts.py")

    def run(folder, overrides, worlds=(1,), attempts=({},)):
        return play.scenario({"run": str(folder), "recipe": "digits_msf", "overrides": [*BASE, *overrides],
                              "worlds": list(worlds), "attempts": list(attempts)})

    return run


@pytest.fixture(scope="module")
def many(tmp_path_factory, make_shards, picture, encode):
    """320 small pictures in 40 shards, of which a window of two needs a part at a time."""
    samples = [(f"{i:03d}", encode(picture(i, 20, 24)), i % 2) for i in range(320)]
    return make_shards(tmp_path_factory.mktemp("many"), samples)


@pytest.fixture
def serve():
    """serve(folder) -> a server that fails as it is told (tests/data/conftest.py)."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads http through curl")
    servers = []

    def start(folder):
        server = _module("data/conftest.py").Server(folder)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.over = True
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)])
def test_shards_of_a_bad_server_give_the_same_bits(attempt, many, serve, tmp_path, world):
    """Killed twice, on a server that stalls, cuts and lies, in a cache for a part of the set."""
    window = ["data.window=2", "schedule.steps=8"]
    local = attempt(tmp_path / "local", [f"data.train={many.root}", *window], [world])
    server = serve(many.root)
    for number, kind in ((3, "cut"), (7, "other"), (11, "stall"), (20, "cut")):
        server.fail(many.shards[number].name, kind, 1)
    room = 16 * max(s.bytes for s in many.shards) / 1e9
    remote = attempt(tmp_path / "remote", [
        f"data.train={server.url}", f"data.stage={tmp_path}/stage", f"data.stage_gb={room}", "data.stall_seconds=0.5",
        *window], [world], [{"kill_at": 3}, {"kill_at": 6}, {}])
    assert local["done"], local["log"]
    assert remote["done"], remote["log"]
    assert [any(code == -9 for code in codes) for codes in remote["codes"]] == [True, True, False]
    assert remote["digest"] == local["digest"]
    (stage,) = (tmp_path / "stage").iterdir()
    assert 0 < len(list(stage.glob("*.tar"))) <= 16
    assert str(server.url) in (tmp_path / "remote" / "config.yaml").read_text()


def test_another_index_on_the_server_is_another_data_set(attempt, many, serve, tmp_path, make_shards, picture, encode):
    folder = shutil.copytree(many.root, tmp_path / "set")
    server, where = serve(folder), [f"data.stage={tmp_path}/stage", "data.stall_seconds=0.5"]
    begun = attempt(tmp_path / "run", [f"data.train={server.url}", *where], attempts=[{"kill_at": 5}])
    assert begun["codes"] == [[-9]]
    shutil.rmtree(folder)
    make_shards(folder, [(f"{i:03d}", encode(picture(i + 1, 20, 24)), i % 2) for i in range(320)])
    with pytest.raises(HpcsslError, match=r"differs in data.train="):
        runs.resolve("digits_msf", [*BASE, f"data.train={server.url}", *where], RunDir(tmp_path / "run"))
    (tmp_path / "run2").mkdir()
    shutil.copy(tmp_path / "run" / "data.json", tmp_path / "run2")
    code, said = _train(tmp_path / "run2", [f"data.train={server.url}", *where])
    assert code == 1 and "got data.train with other shards" in said and "put these back" in said


def _train(folder, overrides, *, before=None, allow_pipe=""):
    """One process in a fork of this one; its exit code, and its error. ``before(step)`` is called before each step."""
    from hpcssl.train import loop, main, recipe

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            honest = loop.train_step
            if before:
                loop.train_step = lambda t, *rest: (before(t.step), honest(t, *rest))[1]
            code, said = main.train(RunDir(folder), recipe.compose("digits_msf", [*BASE, *overrides]), stop=StopFlag(),
                                    allow_pipe=allow_pipe), ""
        except HpcsslError as error:
            code, said = error.exit_code, str(error)
        except BaseException as error:
            code, said = 99, repr(error)
        os.write(write, said.encode())
        os._exit(code)
    os.close(write)
    with open(read) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


# -- damaged images -------------------------------------------------------------------------------------------


def _bomb():
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(bytes(9999))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _moving(kind, picture):
    out, frames = io.BytesIO(), [Image.fromarray(picture(i, 20, 24)) for i in (1, 2, 3)]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.fixture(scope="module")
def motley(tmp_path_factory, make_shards, picture, encode):
    """64 samples: six that no decoder takes, and seven of rare kinds that it does. (folder, indices of the damaged)."""
    jpeg = encode(picture(0, 20, 24))
    bad = {5: b"", 11: jpeg[:len(jpeg) // 2], 17: b"<html>404</html>", 23: _bomb(),
           41: encode(picture(3, 20, 24), "PNG")[:200], 47: _moving("GIF", picture)[:90]}
    deep = (picture(4, 20, 24)[..., 0].astype(np.uint16) << 8) + 3
    fine = {2: encode(Image.fromarray(picture(1, 20, 24)).convert("CMYK")), 8: encode(Image.fromarray(deep), "PNG"),
            14: _moving("GIF", picture), 20: _moving("PNG", picture), 26: _moving("WEBP", picture),
            32: encode(Image.fromarray(picture(5, 20, 24)).convert("L")),
            38: encode(Image.fromarray(picture(6, 20, 24)).convert("P"), "PNG")}
    samples = [(f"{i:02d}", (bad | fine).get(i, encode(picture(i, 20, 24))), i % 2) for i in range(64)]
    return make_shards(tmp_path_factory.mktemp("motley") / "set", samples), sorted(bad)


def test_damage_counts_once_for_all_ranks_and_attempts(attempt, motley, tmp_path):
    """9 steps of 8 are more than an epoch: every damaged sample was met, on some rank of some attempt."""
    shards, bad = motley
    given = [f"data.train={shards.root}", f"data.damaged_limit={len(bad)}", "schedule.steps=9"]
    torn = attempt(tmp_path / "torn", given, [2], [{"kill_at": 3}, {"kill_at": 6}, {}])
    alone = attempt(tmp_path / "alone", given)
    assert torn["done"] and alone["done"], torn["log"] + alone["log"]
    found = [{line["index"]: line for line in read_lines(RunDir(tmp_path / n).damaged)} for n in ("torn", "alone")]
    assert sorted(found[0]) == sorted(found[1]) == bad
    assert found[0] == found[1], "the same samples at the same steps"
    assert len(read_lines(RunDir(tmp_path / "torn").damaged)) == len(bad)
    assert "more pixels than the limit" in found[0][23]["reason"] and found[0][5]["reason"] == "no bytes"
    assert found[0][17]["key"] == "17" and found[0][17]["shard"] == "shard-000002.tar"


def test_one_damaged_sample_too_many_ends_the_run_on_every_rank(attempt, motley, tmp_path, capfd):
    shards, bad = motley
    given = [f"data.train={shards.root}", f"data.damaged_limit={len(bad) - 1}"]
    result = attempt(tmp_path / "run", given, [2], [{"kill_at": 4}, {}, {}])
    assert result["codes"][1:] == [[1, 1], [1, 1]] and not result["done"]
    said = f"got {len(bad)} damaged: 05 (sample 5, shard-000000.tar): no bytes; 11"
    told = capfd.readouterr().err
    assert told.count(said) == 4 and f"expected at most {len(bad) - 1} damaged samples" in told
    ends = [line["why"] for line in read_lines(RunDir(tmp_path / "run").attempts) if line["event"] == "end"]
    assert any(said in why for why in ends)


def test_a_disk_that_is_full_stops_no_run_for_a_damaged_sample(many, tmp_path, caplog):
    from types import SimpleNamespace

    from hpcssl.data.reader import Loss
    from hpcssl.train.data import Damage
    from hpcssl.world import World

    damage = Damage(RunDir(tmp_path), World.alone(), many, 1)
    RunDir(tmp_path).damaged.mkdir()
    batch = SimpleNamespace(lost=[Loss(3, "003", "shard-000000.tar", "no bytes")])
    damage.note(1, batch)
    assert "sample 3 is not noted there" in caplog.text and not damage.news(batch)
    batch.lost.append(Loss(4, "004", "shard-000000.tar", "no bytes"))
    with pytest.raises(HpcsslError, match=r"got 2 damaged: 003 .*; 004 .*at most 1"):
        damage.note(2, batch)


# -- shards that change ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, pytest.param(11, marks=pytest.mark.full)])
@pytest.mark.parametrize("how", ["in place", pytest.param("renamed", marks=pytest.mark.full)])
def test_a_shard_replaced_while_the_job_runs_is_named(many, tmp_path, step, how):
    """By other images that decode well: found at the end of the epoch, or before the last step."""
    folder = shutil.copytree(many.root, tmp_path / "set")

    def replace(now):
        if now == step:
            body = bytearray((folder / "shard-000004.tar").read_bytes())
            body[-700] ^= 1
            target = folder / ("shard-000004.tar" if how == "in place" else "other")
            with open(target, "r+b" if how == "in place" else "wb") as file:
                file.write(body)
            target.rename(folder / "shard-000004.tar")

    code, said = _train(tmp_path / "run", [f"data.train={folder}"], before=replace)
    if step == 11:  # the last step had its images before
        assert code == 0
    else:
        assert code == 1 and "shard-000004.tar: got another file than when it was opened" in said
        assert not RunDir(tmp_path / "run").done.exists()


def _flip(path):
    body = bytearray(path.read_bytes())
    body[-700] ^= 1
    path.write_bytes(body)


def test_changed_shards_are_found_on_demand_before_training(attempt, many, tmp_path, capfd):
    folder = shutil.copytree(many.root, tmp_path / "set")
    _flip(folder / "shard-000031.tar")
    result = attempt(tmp_path / "run", [f"data.train={folder}", "data.verify=sha256"], [2], [{}])
    assert result["codes"] == [[1, 1]]
    said = "got other bytes than 1 of them had when their index was written: shard-000031.tar"
    assert capfd.readouterr().err.count(said) == 2
    os.truncate(folder / "shard-000007.tar", 1000)
    code, said = _train(tmp_path / "run", [f"data.train={folder}"])
    assert code == 1 and "shard-000007.tar: got 1000 bytes; expected" in said


@pytest.mark.parametrize("kind", ["remote", pytest.param("local", marks=pytest.mark.full)])
def test_a_staged_shard_that_rotted_is_brought_anew(many, serve, tmp_path, kind):
    source = f"file://{many.root}" if kind == "remote" else str(many.root)
    given = [f"data.train={source}", f"data.stage={tmp_path}/stage", "data.verify=sha256", "schedule.steps=2"]
    assert _train(tmp_path / "a", given) == (0, "")
    staged = next((tmp_path / "stage").glob("*/shard-*.tar"))
    _flip(staged)
    assert _train(tmp_path / "b", given) == (0, "")
    assert staged.read_bytes() == (many.root / staged.name).read_bytes()


# -- commands, and mistakes -----------------------------------------------------------------------------------


def test_a_command_runs_only_where_it_was_allowed(many, tmp_path):
    command = f"pipe:echo {{}} >> {tmp_path}/ran; cat {many.root}/{{}}"
    given = [f"data.train={command}", f"data.stage={tmp_path}/stage"]
    for allowed in ("", "pipe:cat another/{}"):
        code, said = _train(tmp_path / "run", given, allow_pipe=allowed)
        assert code == 2 and "give --allow-pipe if this shell command is your own" in said
    with pytest.raises(HpcsslError, match="--allow-pipe"):
        runs.resolve("digits_msf", given, RunDir(tmp_path / "run"))
    with pytest.raises(HpcsslError, match="unknown key 'allow_pipe'"):
        runs.resolve("digits_msf", [*given, "data.allow_pipe=true"], RunDir(tmp_path / "run"))
    assert not (tmp_path / "ran").exists()
    assert _train(tmp_path / "run", given, allow_pipe=command) == (0, "")
    assert "index.npy" in (tmp_path / "ran").read_text()


def test_the_permission_is_for_one_text_and_the_last_one(tmp_path):
    from slurm import options, records

    run = RunDir(tmp_path)
    assert records.allowed_pipe(run) == ""
    records.allow_pipe(run, "pipe:a {}")
    records.allow_pipe(run, "pipe:b {}")
    assert records.allowed_pipe(run) == "pipe:b {}" and records.submitted(run) == {}
    assert options.split(["digits_msf", "--allow-pipe", "--nodes", "2"]).ours == ["digits_msf", "--allow-pipe"]


MISTAKES = {
    "no such folder": (["data.train={tmp}/nowhere"], r"shard folder .*nowhere: got no such folder"),
    "empty folder": (["data.train={tmp}/empty"], r"got no index.json \(it holds nothing\)"),
    "the folder above": (["data.train={tmp}/above"], r"OUT/train and OUT/val are the folders to name"),
    "a server without an index": (["data.train=file://{tmp}/empty", "data.stage={tmp}/s"],
                                  r"index.json of file://.*empty"),
    "a misspelt scheme": (["data.train=htps://host/x", "data.stage={tmp}/s"],
                          r"data.train: got 'htps://host/x' \(htps\)"),
    "nowhere to put it": (["data.train=https://host/x"], r"data.stage: got no folder, with data.train at an address"),
    "a password": (["data.train=https://ann:pw@host/x", "data.stage=/tmp"], r"a user name or a password.*netrc"),
    "a limit for a folder": (["data.train={many}", "data.stage_gb=3"],
                             r"data.stage_gb: got 3 with data.train in a folder"),
    "a typo": (["data.train={many}", "data.verfy=sha256"], r"unknown key 'verfy'.*did you mean 'verify'"),
    "another check": (["data.train={many}", "data.verify=md5"],
                      r"data.verify: got 'md5'; expected one of sizes, sha256"),
    "no tries": (["data.train={many}", "data.tries=0"], r"data.tries: got 0"),
    "val without a place": (["data.train={many}", "data.val=http://x/y"], r"data.stage: got no folder, with data.val"),
    "a command for val": (["data.train={many}", "data.val=pipe:x {{}}", "data.stage=/tmp"], r"data.val: got .*another"),
    "k-NN of a part": (["data.train=file://{many}", "data.stage={tmp}/s", "data.stage_gb=1", "data.val={many}",
                        "evals.every_epochs=1"], r"evals.every_epochs: got 1 with data.stage_gb=1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(many, tmp_path, mistake):
    given, said = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "above" / "train").mkdir(parents=True)
    with pytest.raises(HpcsslError, match=said) as caught:
        runs.resolve("digits_msf", [text.format(tmp=tmp_path, many=many.root) for text in given],
                     RunDir(tmp_path / "run"))
    assert "\n" not in str(caught.value) and "pw" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_label_is_told_where_it_is_needed(tmp_path, make_shards, picture, encode):
    shards = make_shards(tmp_path / "set", [(f"{i:03d}", encode(picture(i, 20, 24)), -1 if i == 9 else i % 2)
                                            for i in range(64)])
    given = [*BASE, f"data.train={shards.root}", f"data.val={shards.root}", "evals.every_epochs=1"]
    assert json.loads((shards.root / "index.json").read_text())["samples"] == 64
    code, said = _train_with_watch(tmp_path / "run", given)
    assert code == 1 and "got 1 images without a label; expected a label for each image" in said


def _train_with_watch(folder, given):
    from hpcssl.evals.watch import watch
    from hpcssl.train import recipe
    from hpcssl.world import World

    try:
        watch(recipe.compose("digits_msf", given), RunDir(folder), World.alone(), lambda: False)
    except HpcsslError as error:
        return error.exit_code, str(error)
    return 0, ""
