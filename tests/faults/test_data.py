"""Damaged data and failing servers in whole training runs.

A fault that training tolerates does not change a bit of its result. Any other fault ends it with an error that names
the file or the key.
"""

import io
import itertools
import json
import os
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hpcssl.data.decode import MAX_PIXELS
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, DataError, HpcsslError, ResumeError, Stopped
from hpcssl.files import read_lines, sha256_of_file
from hpcssl.preparation import branches
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe
from hpcssl.train.data import DataPipeline
from tests.faults.trained import BASE, train
from tests.printed import numbers_in, raised_errors


@pytest.fixture(scope="module")
def train_attempts():
    """train_attempts(folder, overrides, worlds=[1], attempts=[{}]) -> the result of tests/resume/attempts.py."""
    from tests.resume.attempts import run_scenario

    def run(folder, overrides, worlds=(1,), attempts=({},)):
        return run_scenario(
            {
                "run": str(folder),
                "recipe": "digits_msf",
                "overrides": [*BASE, *overrides],
                "worlds": list(worlds),
                "attempts": list(attempts),
            }
        )

    return run


@pytest.fixture(scope="module")
def forty_shards(tmp_path_factory, make_shards, picture, encode):
    """320 small images in 40 shards, so that a shuffle window of two shards reads a part of the set at a time."""
    samples = [(f"{i:03d}", encode(picture(i, 20, 24)), i % 2) for i in range(320)]
    return make_shards(tmp_path_factory.mktemp("forty_shards"), samples)


@pytest.fixture
def serve():
    """serve(folder) -> an HTTP server that fails on request (tests/data/conftest.py)."""
    from tests.data.conftest import Server

    if shutil.which("curl") is None:
        pytest.skip("webdataset reads http through curl")
    servers = []

    def start(folder):
        server = Server(folder)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing = True
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)])
def test_shards_from_a_failing_server_give_the_same_weights(train_attempts, forty_shards, serve, tmp_path, world):
    """The run is killed twice; the server stalls, cuts files and sends wrong bytes; the cache holds part of the set."""
    window = ["data.shuffle_window=2", "schedule.steps=8"]
    local = train_attempts(tmp_path / "local", [f"data.train={forty_shards.root}", *window], [world])
    server = serve(forty_shards.root)
    for number, kind in ((3, "cut"), (7, "other"), (11, "stall"), (20, "cut")):
        server.fail(forty_shards.shards[number].name, kind, 1)
    room = 16 * max(shard.bytes for shard in forty_shards.shards) / 1e9
    remote = train_attempts(
        tmp_path / "remote",
        [
            f"data.train={server.url}",
            f"data.stage_dir={tmp_path}/stage",
            f"data.stage_limit_gb={room}",
            "data.stall_timeout_seconds=3",
            *window,
        ],
        [world],
        [{"kill_at": 3}, {"kill_at": 6}, {}],
    )
    assert local["done"], local["log"]
    assert remote["done"], remote["log"]
    assert [any(code == -9 for code in codes) for codes in remote["codes"]] == [True, True, False]
    assert remote["digest"] == local["digest"]
    (stage,) = (tmp_path / "stage").iterdir()
    assert 0 < len(list(stage.glob("*.tar"))) <= 16
    assert str(server.url) in (tmp_path / "remote" / "config.yaml").read_text()


def test_resume_refuses_another_index_on_the_server(
    train_attempts, forty_shards, serve, tmp_path, make_shards, picture, encode
):
    folder = shutil.copytree(forty_shards.root, tmp_path / "set")
    server, staging = serve(folder), [f"data.stage_dir={tmp_path}/stage"]
    killed = train_attempts(tmp_path / "run", [f"data.train={server.url}", *staging], attempts=[{"kill_at": 5}])
    assert killed["codes"] == [[-9]]
    shutil.rmtree(folder)
    make_shards(folder, [(f"{i:03d}", encode(picture(i + 1, 20, 24)), i % 2) for i in range(320)])
    with pytest.raises(ResumeError) as caught:
        branches.resolve(
            "digits_msf", [*BASE, f"data.train={server.url}", *staging], RunDir(tmp_path / "run"), parent=None
        )
    assert "data.train=" in caught.value.got
    (tmp_path / "run2").mkdir()
    shutil.copy(tmp_path / "run" / "data.json", tmp_path / "run2")
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    error = train(tmp_path / "run2", [f"data.train={server.url}", *staging])
    assert isinstance(error, ResumeError) and error.exit_code == 1
    assert "data.train" in error.got and recorded["train"][:12] in error.expected


# -- damaged images -------------------------------------------------------------------------------------------


def huge_png():
    """A small PNG whose header declares 60,000 x 60,000 pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(bytes(9999))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def animation(kind, picture):
    out, frames = io.BytesIO(), [Image.fromarray(picture(i, 20, 24)) for i in (1, 2, 3)]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.fixture(scope="module")
def mixed_images(tmp_path_factory, make_shards, picture, encode):
    """(shards, indices of the damaged): 64 samples, of which six cannot be decoded and seven are of rare formats."""
    jpeg = encode(picture(0, 20, 24))
    damaged = {
        5: b"",
        11: jpeg[: len(jpeg) // 2],
        17: b"<html>404</html>",
        23: huge_png(),
        41: encode(picture(3, 20, 24), "PNG")[:200],
        47: animation("GIF", picture)[:90],
    }
    sixteen_bit = (picture(4, 20, 24)[..., 0].astype(np.uint16) << 8) + 3
    rare = {
        2: encode(Image.fromarray(picture(1, 20, 24)).convert("CMYK")),
        8: encode(Image.fromarray(sixteen_bit), "PNG"),
        14: animation("GIF", picture),
        20: animation("PNG", picture),
        26: animation("WEBP", picture),
        32: encode(Image.fromarray(picture(5, 20, 24)).convert("L")),
        38: encode(Image.fromarray(picture(6, 20, 24)).convert("P"), "PNG"),
    }
    samples = [(f"{i:02d}", (damaged | rare).get(i, encode(picture(i, 20, 24))), i % 2) for i in range(64)]
    return make_shards(tmp_path_factory.mktemp("mixed_images") / "set", samples), sorted(damaged)


def test_a_damaged_sample_is_logged_once_for_all_ranks_and_attempts(train_attempts, mixed_images, tmp_path):
    """9 steps of 8 samples are more than an epoch: some rank of some attempt has read every damaged sample."""
    shards, damaged = mixed_images
    overrides = [f"data.train={shards.root}", f"data.max_damaged={len(damaged)}", "schedule.steps=9"]
    killed = train_attempts(tmp_path / "killed", overrides, [2], [{"kill_at": 3}, {"kill_at": 6}, {}])
    undisturbed = train_attempts(tmp_path / "undisturbed", overrides)
    assert killed["done"] and undisturbed["done"], killed["log"] + undisturbed["log"]
    lines = {name: read_lines(RunDir(tmp_path / name).damaged) for name in ("killed", "undisturbed")}
    logged = {line["index"]: line for line in lines["killed"]}
    assert sorted(logged) == damaged and len(lines["killed"]) == len(damaged)
    assert logged == {line["index"]: line for line in lines["undisturbed"]}, "the same samples at the same steps"
    assert str(MAX_PIXELS) in logged[23]["reason"] and logged[5]["reason"] == "no bytes"
    assert logged[17]["key"] == "17" and logged[17]["shard"] == "shard-000002.tar"


def test_one_damaged_sample_too_many_ends_the_run_on_every_rank(train_attempts, mixed_images, tmp_path, capfd):
    shards, damaged = mixed_images
    overrides = [f"data.train={shards.root}", f"data.max_damaged={len(damaged) - 1}"]
    result = train_attempts(tmp_path / "run", overrides, [2], [{"kill_at": 4}, {}, {}])
    assert result["codes"][1:] == [[1, 1], [1, 1]] and not result["done"]
    errors = [error for error in raised_errors(capfd.readouterr().err) if error.program == "DataError"]
    assert len(errors) == 4  # of two ranks in two attempts
    for error in errors:
        assert error.what == f"samples of {shards.root}"
        assert numbers_in(error.got)[0] == len(damaged) and numbers_in(error.expected) == [len(damaged) - 1]
        assert "05 (sample 5, shard-000000.tar)" in error.got and "; 11 (sample 11, " in error.got
    ends = [line["why"] for line in read_lines(RunDir(tmp_path / "run").attempts) if line["event"] == "end"]
    assert any(errors[0].got[:60] in why for why in ends)


def test_a_damage_log_that_cannot_be_written_still_counts(forty_shards, tmp_path, caplog):
    from types import SimpleNamespace

    from hpcssl.data.reader import DamagedSample
    from hpcssl.distributed.world import World
    from hpcssl.train.damage_log import DamageLog

    damage = DamageLog(RunDir(tmp_path), World.single_process(), forty_shards, 1)
    RunDir(tmp_path).damaged.mkdir()
    batch = SimpleNamespace(damaged=[DamagedSample(3, "003", "shard-000000.tar", "no bytes")])
    damage.record(1, batch)
    assert any(str(RunDir(tmp_path).damaged) in message for message in caplog.messages)
    assert not damage.has_new(batch)
    batch.damaged.append(DamagedSample(4, "004", "shard-000000.tar", "no bytes"))
    with pytest.raises(DataError) as caught:
        damage.record(2, batch)
    assert numbers_in(caught.value.got)[0] == 2 and numbers_in(caught.value.expected) == [1]
    assert "003 (sample 3, " in caught.value.got and "; 004 (sample 4, " in caught.value.got


# -- shards that change ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, pytest.param(11, marks=pytest.mark.full)])
@pytest.mark.parametrize("change", ["in place", pytest.param("renamed", marks=pytest.mark.full)])
def test_a_shard_that_is_replaced_during_training_is_an_error_that_names_it(forty_shards, tmp_path, step, change):
    """The new images can be decoded. The change is noticed at the end of the epoch, or before the last step."""
    folder = shutil.copytree(forty_shards.root, tmp_path / "set")

    def replace(now):
        if now == step:
            body = bytearray((folder / "shard-000004.tar").read_bytes())
            body[-700] ^= 1
            target = folder / ("shard-000004.tar" if change == "in place" else "other")
            with open(target, "r+b" if change == "in place" else "wb") as file:
                file.write(body)
            target.rename(folder / "shard-000004.tar")

    error = train(tmp_path / "run", [f"data.train={folder}"], before=replace)
    if step == 11:  # the images of the last step were read before
        assert error is None
    else:
        assert isinstance(error, DataError) and error.what == f"shard {folder / 'shard-000004.tar'}"
        assert sha256_of_file(folder / "shard-000004.tar")[:12] in error.got
        assert not RunDir(tmp_path / "run").done.exists()


def flip_bit(path):
    body = bytearray(path.read_bytes())
    body[-700] ^= 1
    path.write_bytes(body)


def test_data_verify_finds_changed_shards_before_training(train_attempts, forty_shards, tmp_path, capfd):
    folder = shutil.copytree(forty_shards.root, tmp_path / "set")
    flip_bit(folder / "shard-000031.tar")
    result = train_attempts(tmp_path / "run", [f"data.train={folder}", "data.verify=sha256"], [2], [{}])
    assert result["codes"] == [[1, 1]]
    errors = raised_errors(capfd.readouterr().err)
    assert [(error.program, error.what) for error in errors] == [("DataError", f"shards of {folder}")] * 2
    assert all(numbers_in(error.got)[0] == 1 and "shard-000031.tar" in error.got for error in errors)
    os.truncate(folder / "shard-000007.tar", 1000)
    error = train(tmp_path / "truncated", [f"data.train={folder}"])
    assert isinstance(error, DataError) and error.what == f"shard {folder / 'shard-000007.tar'}"
    assert numbers_in(error.got) == [1000] and numbers_in(error.expected) == [forty_shards.shards[7].bytes]


@pytest.mark.parametrize("kind", ["remote", pytest.param("local", marks=pytest.mark.full)])
def test_a_staged_shard_that_changed_is_copied_again(forty_shards, serve, tmp_path, kind):
    source = f"file://{forty_shards.root}" if kind == "remote" else str(forty_shards.root)
    overrides = [f"data.train={source}", f"data.stage_dir={tmp_path}/stage", "data.verify=sha256", "schedule.steps=2"]
    assert train(tmp_path / "a", overrides) is None
    staged = next((tmp_path / "stage").glob("*/shard-*.tar"))
    flip_bit(staged)
    assert train(tmp_path / "b", overrides) is None
    assert staged.read_bytes() == (forty_shards.root / staged.name).read_bytes()


# -- shell commands and wrong keys -----------------------------------------------------------------------------------


def test_a_shell_command_runs_only_where_it_was_allowed(forty_shards, tmp_path):
    command = f"pipe:echo {{}} >> {tmp_path}/ran; cat {forty_shards.root}/{{}}"
    overrides = [f"data.train={command}", f"data.stage_dir={tmp_path}/stage"]
    for allowed in ("", "pipe:cat another/{}"):
        error = train(tmp_path / "run", overrides, allow_pipe=allowed)
        assert isinstance(error, ConfigError) and error.what == "data.train" and "--allow-pipe" in error.fix
    with pytest.raises(ConfigError) as caught:
        branches.resolve("digits_msf", overrides, RunDir(tmp_path / "run"), parent=None)
    assert caught.value.what == "data.train" and "--allow-pipe" in caught.value.fix
    with pytest.raises(ConfigError) as caught:  # a recipe cannot give the permission
        branches.resolve("digits_msf", [*overrides, "data.allow_pipe=true"], RunDir(tmp_path / "run"), parent=None)
    assert "allow_pipe" in caught.value.got
    assert not (tmp_path / "ran").exists()
    assert train(tmp_path / "run", overrides, allow_pipe=command) is None
    assert "index.npy" in (tmp_path / "ran").read_text()


def test_the_permission_is_for_the_command_that_was_allowed_last(tmp_path):
    from slurm.backend import sbatch_options
    from slurm.log import job_log

    run = RunDir(tmp_path)
    assert job_log.read_allowed_pipe(run) == ""
    job_log.record_allowed_pipe(run, "pipe:a {}")
    job_log.record_allowed_pipe(run, "pipe:b {}")
    assert job_log.read_allowed_pipe(run) == "pipe:b {}" and job_log.latest_jobs(run) == {}
    assert sbatch_options.split_command_line(["digits_msf", "--allow-pipe", "--nodes", "2"]).own == [
        "digits_msf",
        "--allow-pipe",
    ]


WRONG = {
    "no such folder": (["data.train={tmp}/nowhere"], "shard folder {tmp}/nowhere", "", ""),
    "empty folder": (["data.train={tmp}/empty"], "shard folder {tmp}/empty", "index.json", "hpcssl-shard images"),
    "the folder above": (["data.train={tmp}/above"], "shard folder {tmp}/above", "train", "OUT/train or OUT/val"),
    "a server without an index": (
        ["data.train=file://{tmp}/empty", "data.stage_dir={tmp}/s"],
        "index.json of file://{tmp}/empty",
        "",
        "index.json",
    ),
    "a misspelled scheme": (
        ["data.train=htps://host/x", "data.stage_dir={tmp}/s"],
        "data.train",
        "'htps://host/x' (htps)",
        "",
    ),
    "an address without a staging folder": (["data.train=https://host/x"], "data.stage_dir", "data.train", "/tmp"),
    "a password": (["data.train=https://ann:pw@host/x", "data.stage_dir=/tmp"], "data.train", "", "~/.netrc"),
    "a limit for a folder": (
        ["data.train={shards}", "data.stage_limit_gb=3"],
        "data.stage_limit_gb",
        "3, with data.train",
        "",
    ),
    "a misspelled key": (
        ["data.train={shards}", "data.verfy=sha256"],
        "recipe digits_msf, key data.verfy",
        "'verfy'",
        "'verify'",
    ),
    "an unknown check": (["data.train={shards}", "data.verify=md5"], "data.verify", "'md5'", "sha256, sizes"),
    "no attempts": (["data.train={shards}", "data.download_attempts=0"], "data.download_attempts", "0", ""),
    "val without a staging folder": (
        ["data.train={shards}", "data.val=http://x/y"],
        "data.stage_dir",
        "data.val",
        "data.stage_dir=FOLDER",
    ),
    "a shell command for val": (
        ["data.train={shards}", "data.val=pipe:x {{}}", "data.stage_dir=/tmp"],
        "data.val",
        "'pipe:x {{}}'",
        "",
    ),
    "k-NN with a part of the set": (
        [
            "data.train=file://{shards}",
            "data.stage_dir={tmp}/s",
            "data.stage_limit_gb=1",
            "data.val={shards}",
            "evals.knn_every_epochs=1",
        ],
        "evals.knn_every_epochs",
        "1 with data.stage_limit_gb=1",
        "data.stage_limit_gb=0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_keys_are_refused_in_one_line(forty_shards, tmp_path, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "above" / "train").mkdir(parents=True)
    overrides, *expected = WRONG[case]
    names = {"tmp": tmp_path, "shards": forty_shards.root}
    with pytest.raises(HpcsslError) as caught:
        branches.resolve(
            "digits_msf", [text.format(**names) for text in overrides], RunDir(tmp_path / "run"), parent=None
        )
    error, (what, in_got, in_fix) = caught.value, [text.format(**names) for text in expected]
    assert error.what == what and in_got in error.got and in_fix in error.fix, str(error)
    assert "\n" not in str(error) and "pw" not in str(error)
    assert not (tmp_path / "run").exists()


def test_online_knn_refuses_images_without_a_label(tmp_path, make_shards, picture, encode):
    from hpcssl.distributed.world import World
    from hpcssl.evals.online_knn import build_online_knn
    from hpcssl.train import recipe

    samples = [(f"{i:03d}", encode(picture(i, 20, 24)), -1 if i == 9 else i % 2) for i in range(64)]
    shards = make_shards(tmp_path / "set", samples)
    composed = recipe.compose(
        "digits_msf", [*BASE, f"data.train={shards.root}", f"data.val={shards.root}", "evals.knn_every_epochs=1"]
    )
    with pytest.raises(HpcsslError) as caught:
        build_online_knn(composed, RunDir(tmp_path / "run"), World.single_process(), lambda: False)
    assert caught.value.exit_code == 1 and caught.value.what == f"shard folder {shards.root}"
    assert numbers_in(caught.value.got) == [1] and "label" in caught.value.expected


def test_a_signal_while_shards_are_staged_stops_all_ranks_before_the_copy_ends(shards, tmp_path):
    """A rank that was not asked to stop has staged its shards, and learns of the stop from the others."""

    class WorldOfTwo(World):
        def any(self, flag):
            flags.append(flag)
            return True

        def all_gather_text(self, text):
            return [text]

        def barrier(self):
            pass

    composed = recipe.compose("digits_msf", [f"data.train={shards.root}", f"data.stage_dir={tmp_path / 'disk'}"])
    flags = []
    for answers in (iter([False, False, True]), itertools.repeat(False)):
        with pytest.raises(Stopped) as caught:
            world = WorldOfTwo(0, 2, 0, torch.device("cpu"))
            DataPipeline(composed, RunDir(tmp_path / "run"), world, stop=lambda source=answers: next(source))
        assert caught.value.what == f"staging to {tmp_path / 'disk'}"
        copies = list((tmp_path / "disk").rglob("*.tar"))
        assert len(copies) == (5 if flags[-1] is False else 2)
    assert flags == [True, False]
