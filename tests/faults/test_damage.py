"""Damaged files that still look valid: each is noticed when it is read, and none changes a result."""

import json
import os
import shutil
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

from hpcssl import config, files, rng
from hpcssl.checkpoint.manager import CheckpointManager, CheckpointState
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import DataError, EvalError, ResumeError
from hpcssl.evals.common import state
from hpcssl.evals.rows import store_row
from hpcssl.nets import importers, resnet, weights
from hpcssl.nets.resnet import Arch
from hpcssl.run_dir import RunDir
from hpcssl.storage import folders, records
from hpcssl.storage.records import RecordError, parse_record, seal
from hpcssl.train import recipe
from hpcssl.train.attempt import shard_check
from hpcssl.train.data import DataPipeline
from hpcssl.train.start.state import load_state
from slurm.log import attempts, job_log
from slurm.manage import control, status

SINGLE = World.single_process()
TINY = Arch(arch="resnet_tiny", stem="small")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def flip_bit(path, bit):
    body = bytearray(path.read_bytes())
    body[bit // 8] ^= 1 << bit % 8
    path.write_bytes(body)


# -- tensors ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights_file(tmp_path):
    backbone = resnet.build(TINY)
    resnet.initialize(backbone, 0)
    about = {"mean": [0.5] * 3, "std": [0.2] * 3, "size": 16, "fingerprint": "f" * 64, "step": 5, "method": "msf"}
    weights.save(tmp_path / "w.safetensors", backbone, TINY, **about)
    return tmp_path / "w.safetensors"


def test_no_flipped_bit_of_exported_weights_gives_another_encoder(weights_file):
    """A flip in the name of the checksum itself leaves the encoder as it was."""
    body, (backbone, about) = weights_file.read_bytes(), importers.load(weights_file)
    header = 8 * (8 + int.from_bytes(body[:8], "little"))
    draws = [(0, header)] * 100 + [(header, 8 * len(body))] * 20
    for number, (first, last) in enumerate(draws):
        weights_file.write_bytes(body)
        flip_bit(weights_file, first + int(rng.raw(rng.key(0, "flip", number), 1)[0]) % (last - first))
        try:
            loaded, header_read = importers.load(weights_file)
        except EvalError as error:
            assert error.what == f"weights {weights_file}"
        else:
            assert header_read == about and first == 0
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), backbone.parameters(), strict=True))


def test_a_zeroed_block_of_exported_weights_is_refused(weights_file):
    body = bytearray(weights_file.read_bytes())
    body[-70_000:-4_464] = bytes(65_536)
    weights_file.write_bytes(body)
    with pytest.raises(EvalError) as caught:
        weights.load(weights_file)
    assert caught.value.what == f"weights {weights_file}" and "checksum" in caught.value.got


def test_weights_without_a_checksum_are_read(weights_file):
    body = weights_file.read_bytes()
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    del header["__metadata__"][records.CHECKSUM]
    text = json.dumps(header).encode()
    rest = body[8 + int.from_bytes(body[:8], "little") :]
    weights_file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    assert weights.load(weights_file)[1]["step"] == 5


def test_a_damaged_state_of_an_evaluation_is_not_resumed(tmp_path, caplog):
    path = tmp_path / "knn.safetensors"
    state.write(path, "id", {"table": torch.arange(9.0)}, {"epoch": 3})
    assert state.read(path, "id")[1] == {"epoch": 3}
    flip_bit(path, 8 * path.stat().st_size - 7)
    assert state.read(path, "id") is None and str(path) in caplog.text


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_record_is_refused_if_its_content_or_a_type_is_wrong():
    sealed = json.dumps(seal({"step": 12, "scores": {10: 1.5, 9: [1, 2]}}))
    assert parse_record(sealed, {"step": int}) == {"step": 12, "scores": {"10": 1.5, "9": [1, 2]}}
    for text, fields in (
        (sealed.replace("12", "13"), {}),
        ("5", {}),
        ("{}", {"step": int}),
        ('{"step": null}', {"step": int}),
        ('{"step": true}', {"step": int}),
        ('{"step": 1e400}', {"step": int}),
        (f'{{"step": {10**30}}}', {"step": float}),
        ('{"step": "x"}', {"step": int | None}),
        ('{"names": ["a", 1]}', {"names": list[str]}),
        ('{"ranks": {"a": "b"}}', {"ranks": dict[str, int]}),
        ("[" * 100_000, {}),
    ):
        with pytest.raises(RecordError):
            parse_record(text, fields)
    assert parse_record('{"a": null, "b": 2, "c": {"x": true}}', {"a": int | None, "b": float, "c": dict[str, bool]})


def test_lines_that_cannot_be_used_are_skipped_and_reported(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    for step in (1, 2, 3):
        files.append_line(path, {"step": step})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace("2", "7", 1), "5", lines[2], '{"step": "x"}', ""]))
    assert files.read_lines(path, {"step": int}) == [{"step": 1}, {"step": 3}]
    assert str(path) in caplog.text and "skipped: 3" in caplog.text and "line 2" in caplog.text


def test_a_long_line_takes_no_memory(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"a": "')
        file.writelines(b"x" * 1_000_000 for _ in range(50))
        file.write(b'"}\n{"a": "y"}\n')
    tracemalloc.start()
    try:
        assert files.read_lines(path, {"a": str}, max_bytes=100_000) == [{"a": "y"}]
        assert tracemalloc.get_traced_memory()[1] < 10 * 100_000
    finally:
        tracemalloc.stop()
    assert "skipped: 1" in caplog.text and "line 1" in caplog.text


def test_a_changed_mark_of_the_end_is_not_believed(run, caplog):
    files.write_record(run.done, {"step": 12, "weights": "weights/step-00000012.safetensors"})
    assert run.finished["step"] == 12
    run.done.write_text(run.done.read_text().replace("12,", "18,"))
    assert run.finished is None and str(run.done) in caplog.text


WRONG_TYPES = (
    "5",
    "[]",
    '{"event": "start", "attempt": null}',
    '{"event": "start", "attempt": 1, "restart": [], "what": "train"}',
    '{"event": "end", "attempt": 1, "signals": 5, "cause": 3}',
    '{"event": "submit", "job": 7, "what": "train", "kind": "slurm", "time": 5}',
    '{"event": "submit", "job": "8", "what": null, "kind": "slurm", "time": "now"}',
    '{"event": "submit", "job": "9", "what": "train", "kind": "local", "time": "now", "options": 4}',
    '{"event": "cancel", "job": {}}',
    '{"event": null}',
)


def test_records_of_the_wrong_type_stop_no_command(run):
    run.attempts.write_text("\n".join(WRONG_TYPES) + "\n")
    run.jobs.write_text("\n".join(WRONG_TYPES) + "\n")
    run.journal.write_text('{"step": 3}\n{"step": []}\n5\n')
    start = {"attempt": 4, "job": "j", "restart": 0, "host": "h"}
    files.append_line(run.attempts, {**start, "event": "start", "first_step": 0, "time": 1.0})
    assert [attempt.number for attempt in attempts.read_attempts(run)] == [4]
    assert attempts.next_number(run) == 5 and attempts.last_known_step(run) == 3
    assert job_log.all_jobs(run) == [] and status.query_run(run).step == 3
    assert control.active_jobs(run) == []


# -- checkpoints, rows -----------------------------------------------------------------------------------------------


def make_state(step, fingerprint):
    return CheckpointState(step, {"w": TensorShard(torch.full((3,), float(step)))}, {}, fingerprint, {}, {})


def test_a_newer_checkpoint_of_another_recipe_is_passed_over_and_kept(run, caplog):
    own = CheckpointManager(run, SINGLE, keep=1)
    assert own.save(make_state(2, "own")) is None
    other = RunDir(run.root / "other")
    assert CheckpointManager(other, SINGLE).save(make_state(6, "other")) is None
    shutil.copytree(other.checkpoint(6), run.checkpoint(6))
    resumed = CheckpointManager(run, SINGLE, keep=1)
    resumed.recipe_fingerprint = "own"
    assert resumed.latest().step == 2 and "step-00000006" in caplog.text
    for step in (3, 4):
        assert resumed.save(make_state(step, "own")) is None
    assert sorted(int(path.name[5:]) for path in run.checkpoints.iterdir()) == [4, 6]
    for step in (6, 7):  # the run reaches that step itself
        assert resumed.save(make_state(step, "own")) is None
    assert [int(path.name[5:]) for path in run.checkpoints.iterdir()] == [7]
    resumed.recipe_fingerprint = "a third one"  # without any of its own, the caller gets one to compare with
    assert resumed.latest().step == 7


def test_a_training_resumes_from_its_own_checkpoint(run):
    science, loaded = {"seed": 0}, []
    checkpoints = CheckpointManager(run, SINGLE)
    for step, fingerprint in ((2, config.fingerprint(science)), (6, "other")):
        assert checkpoints.save(make_state(step, fingerprint)) is None
    training = SimpleNamespace(world=SINGLE, science=science, step=0, load=lambda saved: loaded.append(saved.step))
    load_state(training, checkpoints)
    assert loaded == [2]


def make_row(writer):
    texts = ("identity", "eval", "weights_sha256", "fingerprint", "method", "arch", "train", "val", "commit", "time")
    return dict.fromkeys(texts, "x") | {"step": 1, "options": {}, "metrics": {"writer": writer}}


def test_an_equal_row_that_another_process_is_storing_is_returned(run, monkeypatch):
    path, lock_descriptor = run.eval_rows("knn"), files.lock_descriptor
    folders.make_folder(path.parent)
    reading, writing = os.pipe()
    with files.exclusive_lock(path):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(
                files, "lock_descriptor", lambda fd: lock_descriptor(fd) or bool(os.write(writing, b"waits") * 0)
            )
            os._exit(store_row(run, "knn", make_row(2), SINGLE)["metrics"]["writer"])
        os.close(writing)
        assert os.read(reading, 5) == b"waits"  # nothing if it ended without waiting
        files.append_line(path, make_row(1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert [row["metrics"]["writer"] for row in files.read_lines(path)] == [1]


# -- shards between attempts -----------------------------------------------------------------------------------------


@pytest.fixture
def shards(make_shards, picture, encode, tmp_path):
    """Two shards with pairs of images of one size."""
    samples = [(f"{i:03d}", encode(picture(i % 4, 20, 24)), i % 2) for i in range(16)]
    return make_shards(tmp_path / "shards", samples)


def swap_images(shards, number):
    """Swap two different images of equal size inside a shard, in place."""
    rows = [row for row in shards.rows if row["shard"] == number]
    with open(shards.path(number), "r+b", buffering=0) as file:
        bodies = [os.pread(file.fileno(), row["size"], row["offset"]) for row in rows]
        a, b = next((a, b) for a in range(len(rows)) for b in range(a) if bodies[a] != bodies[b])
        size = min(len(bodies[a]), len(bodies[b]))
        os.pwrite(file.fileno(), bodies[a][:size], rows[b]["offset"])
        os.pwrite(file.fileno(), bodies[b][:size], rows[a]["offset"])


def check(run, shards, **options):
    shard_check.check_shards(run, shards, SINGLE, **{"refuse": True} | options)


def test_shards_that_changed_between_two_attempts_are_refused(run, shards, caplog):
    check(run, shards)
    check(run, shards)
    swap_images(shards, 1)
    with pytest.raises(ResumeError) as caught:
        check(run, shards)
    assert shards.shards[1].name in caught.value.got and shards.shards[0].name not in caught.value.got
    assert "data.changed=warn" in caught.value.fix
    check(run, shards, refuse=False)
    assert shards.shards[1].name in caplog.text
    with pytest.raises(ResumeError):  # the warning does not make it the expected content
        check(run, shards)


def test_shards_that_were_repaired_after_the_first_attempt_are_accepted(run, shards):
    """The index decides: the images that were recorded are those of the damaged copy."""
    good = shards.path(1).read_bytes()
    swap_images(shards, 1)
    check(run, shards)
    shards.path(1).write_bytes(good)
    check(run, shards)
    swap_images(shards, 1)
    with pytest.raises(ResumeError):
        check(run, shards)


def test_recorded_images_are_compared_even_if_no_shard_may_be_read_as_a_whole(run, shards, monkeypatch):
    monkeypatch.setattr(shard_check, "HASHED_BYTES", 0)
    check(run, shards)
    for row in shards.rows:
        with open(shards.path(row["shard"]), "r+b") as file:
            file.seek(int(row["offset"]))
            file.write(b"?")
    with pytest.raises(ResumeError):
        check(run, shards)


def test_a_copy_of_the_shards_is_accepted_and_read_once(run, shards, tmp_path, monkeypatch):
    hashed, sha256_of_file = [], files.sha256_of_file
    monkeypatch.setattr(shard_check.files, "sha256_of_file", lambda path: hashed.append(path) or sha256_of_file(path))
    check(run, shards)
    copy = ShardSet.open(shutil.copytree(shards.root, tmp_path / "copy"))
    check(run, copy)
    assert len(hashed) == len(shards.shards)
    check(run, copy)
    assert len(hashed) == len(shards.shards)


def test_a_training_compares_the_shards_with_those_of_its_first_attempt(run, shards):
    values = [f"data.train={shards.root}", "optim.batch=4", "machine.devices=cpu"]
    DataPipeline(recipe.compose("digits_msf", values), run, SINGLE).close()
    swap_images(shards, 0)
    with pytest.raises(ResumeError):
        DataPipeline(recipe.compose("digits_msf", values), run, SINGLE)
    DataPipeline(recipe.compose("digits_msf", [*values, "data.changed=warn"]), run, SINGLE).close()


def test_an_index_with_other_sample_counts_is_refused(shards):
    index = shards.root / "index.json"
    meta = json.loads(index.read_text())
    meta["shards"][0]["samples"] += 1
    index.write_text(json.dumps(meta))
    with pytest.raises(DataError) as caught:
        ShardSet.open(shards.root)
    assert "samples per shard" in caught.value.got
