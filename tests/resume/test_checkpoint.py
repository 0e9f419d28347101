"""Checkpoints are complete or absent; the newest valid one is found; a full disk loses none."""

import errno
import os
import subprocess
import threading

import pytest
import torch
from safetensors.torch import save_file

from hpcssl import files
from hpcssl.checkpoint import manager, reader
from hpcssl.checkpoint.manager import CheckpointManager, CheckpointState, checkpoint_digest
from hpcssl.checkpoint.reader import MANIFEST, SavedCheckpoint, folders, latest_valid
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.checkpoint.shared_reads import read_shared, row_reader
from hpcssl.distributed.world import World
from hpcssl.errors import ResumeError
from hpcssl.run_dir import RunDir
from tests.memory.threads import ThreadedRanks, run_ranks
from tests.waiting import PATIENCE_S


def state(step):
    """Return the state of a step, with tensors of several dtypes and shapes."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "net.weight": TensorShard(torch.randn(5, 4, generator=generator)),
        "net.scale": TensorShard(torch.tensor(float(step))),
        "net.half": TensorShard(torch.randn(3, generator=generator).bfloat16()),
        "bank.index": TensorShard(torch.arange(7) + step, 0, 7),
    }
    return CheckpointState(step, tensors, {"pointer": step}, "f" * 8, {"seed": 0}, {"world": 1})


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def save_steps(run, *steps, **options):
    """Save the states of some steps and return the manager."""
    checkpoints = CheckpointManager(run, World.single_process(), **{"keep": 9} | options)
    for step in steps:
        assert checkpoints.save(state(step)) is None
    return checkpoints


def test_saved_tensors_are_read_back_bit_for_bit(run):
    save_steps(run, 3)
    saved, skipped = latest_valid(run)
    assert saved.step == 3 and not skipped and saved.manifest["numbers"] == {"pointer": 3}
    for name, rows in state(3).tensors.items():
        assert torch.equal(saved.rows(name), rows.tensor) and saved.rows(name).dtype == rows.tensor.dtype
    assert saved.rows("bank.index", 2, 3).tolist() == [5, 6, 7]
    assert saved.rows("bank.index", 7, 0).shape == (0,)


def test_the_digest_depends_on_the_state_and_not_on_the_folder(run, tmp_path, monkeypatch):
    save_steps(run, 3)
    other = RunDir(tmp_path / "other")
    save_steps(other, 1, 3)
    assert checkpoint_digest(run) == checkpoint_digest(other)
    whole = checkpoint_digest(run)
    for entries in (1, 3, 10):  # read in pieces of other sizes
        monkeypatch.setattr(reader, "_CHUNK_ENTRIES", entries)
        assert checkpoint_digest(run) == whole
    changed = RunDir(tmp_path / "changed")
    changed_state = state(3)
    changed_state.tensors["net.half"].tensor[0] += 1
    CheckpointManager(changed, World.single_process()).save(changed_state)
    assert checkpoint_digest(changed) != checkpoint_digest(run)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / MANIFEST).unlink(), "no manifest"),
        (lambda f: (f / MANIFEST).write_text("{"), "JSONDecodeError"),
        (lambda f: (f / "part-0.safetensors").unlink(), "part-0.safetensors is missing"),
        (lambda f: os.truncate(f / "part-0.safetensors", 100), "part-0.safetensors has 100 bytes"),
        (lambda f: flip_bit(f / "part-0.safetensors"), "part-0.safetensors has another sha256"),
    ],
    ids=["no-manifest", "incomplete-manifest", "missing", "truncated", "flipped"],
)
def test_a_damaged_checkpoint_is_skipped_and_named(run, caplog, damage, reason):
    checkpoints = save_steps(run, 2, 4)
    damage(run.checkpoint(4))
    saved, skipped = latest_valid(run)
    assert saved.step == 2
    assert skipped[0][0].name == "step-00000004" and reason in skipped[0][1]
    with caplog.at_level("WARNING", logger="hpcssl"):
        manager.LOG.propagate = True
        assert checkpoints.latest().step == 2
    messages = [record.getMessage() for record in caplog.records]
    assert [text for text in messages if "step-00000004" in text and reason in text], messages


def flip_bit(path):
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)


def test_a_run_without_a_valid_checkpoint_has_no_digest(run):
    save_steps(run, 2)
    flip_bit(run.checkpoint(2) / "part-0.safetensors")
    assert latest_valid(run)[0] is None
    with pytest.raises(ResumeError) as caught:
        checkpoint_digest(run)
    assert str(run.root) in caught.value.what
    assert "step-00000002: part-0.safetensors" in caught.value.got and "sha256" in caught.value.got


def test_the_last_checkpoints_and_every_nth_are_kept(run):
    save_steps(run, *range(1, 9), keep=2, keep_every=3)
    assert [step for step, _ in folders(run)] == [3, 6, 7, 8]


@pytest.mark.parametrize("full_at", ["part", "manifest"])
def test_a_failed_write_keeps_earlier_checkpoints(run, monkeypatch, full_at):
    checkpoints = save_steps(run, 2, keep=1)
    original = files.atomic_file

    def raise_no_space(path):
        if full_at in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path)

    monkeypatch.setattr(files, "atomic_file", raise_no_space)
    failed = checkpoints.save(state(4))
    assert "No space left on device" in failed and "step-00000004" in failed
    assert latest_valid(run)[0].step == 2 and not run.checkpoint(4).exists()
    monkeypatch.undo()
    assert checkpoints.save(state(6)) is None
    assert latest_valid(run)[0].step == 6


def test_a_full_file_system_keeps_earlier_checkpoints(tmp_path):
    """A tmpfs of 1 MB: the second save does not fit, and the first one stays valid."""
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], capture_output=True).returncode
        != 0
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        run = RunDir(mount / "run")
        checkpoints = CheckpointManager(run, World.single_process())
        assert checkpoints.save(state(2)) is None
        large = state(4)
        large.tensors["net.large"] = TensorShard(torch.zeros(1 << 19))
        assert "No space left on device" in checkpoints.save(large)
        assert latest_valid(run)[0].step == 2
        assert checkpoints.save(state(6)) is None
        assert latest_valid(run)[0].step == 6
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_training_continues_while_a_checkpoint_is_written(run, monkeypatch):
    """``begin`` copies the state and returns; later changes of the state are not in the checkpoint."""
    may_write, original = threading.Event(), files.atomic_file

    def slow(path):
        assert may_write.wait(PATIENCE_S)
        return original(path)

    monkeypatch.setattr(files, "atomic_file", slow)
    checkpoints, body = CheckpointManager(run, World.single_process()), state(5)
    expected = body.tensors["net.weight"].tensor.clone()
    checkpoints.begin(body)
    assert checkpoints.busy and checkpoints.saving
    body.tensors["net.weight"].tensor.zero_()
    may_write.set()
    assert checkpoints.finish() is None and not checkpoints.busy
    assert torch.equal(SavedCheckpoint.open(run.checkpoint(5)).rows("net.weight"), expected)


def test_a_checkpoint_consists_of_a_manifest_and_safetensors(run):
    save_steps(run, 2)
    assert sorted(p.name for p in run.checkpoint(2).iterdir()) == [MANIFEST, "part-0.safetensors"]


def test_a_rank_opens_the_parts_with_its_own_rows_only(tmp_path, monkeypatch):
    rows, parts = torch.arange(24).view(12, 2), ((2, 0, 3), (0, 3, 5), (1, 8, 4))  # part, first row, number of rows
    for part, first, count in parts:
        save_file({"bank": rows[first : first + count].clone()}, tmp_path / f"part-{part}")
    entry = {"shape": [12, 2], "dtype": "int64", "pieces": [[part, first] for part, first, _ in parts[::-1]]}
    manifest = {"step": 1, "tensors": {"bank": entry}, "parts": [{"file": f"part-{part}"} for part in range(3)]}
    saved, opened = SavedCheckpoint(tmp_path, manifest), []
    real = saved._part_reader
    monkeypatch.setattr(saved, "_part_reader", lambda part: opened.append(part) or real(part))
    for first, count, expected in ((0, 3, [2]), (3, 5, [0]), (2, 2, [2, 0]), (7, 5, [0, 1]), (0, None, [2, 0, 1])):
        opened.clear()
        assert torch.equal(saved.rows("bank", first, count), rows[first : None if count is None else first + count])
        assert opened == expected
    opened.clear()
    assert saved.rows("bank", 12, 0).shape == (0, 2) and opened == []


class ReadingRanks(ThreadedRanks):
    """Ranks as threads, with the broadcasts of a ``World``."""

    @property
    def is_main(self):
        return self.rank == 0

    def broadcast(self, x, source):
        rows = self._exchange(x.clone())
        assert {(row.shape, row.dtype) for row in rows} == {(x.shape, x.dtype)}
        return rows[source]


def test_rank_0_reads_what_all_ranks_need(run, monkeypatch):
    save_steps(run, 3)
    saved, opened, real = latest_valid(run)[0], [], SavedCheckpoint._part_reader

    def open_part(self, part):
        opened.append(threading.current_thread())
        return real(self, part)

    monkeypatch.setattr(SavedCheckpoint, "_part_reader", open_part)
    spans = [
        ("bank.index", 2, 3),
        ("bank.index", 5, 9),
        ("bank.index", 7, 2),
        ("net.weight", 1, 2),
        ("bank.index", 1, 1),
    ]
    expected = {name: shard.tensor for name, shard in state(3).tensors.items()}

    def read_all(world):
        whole = {name: read_shared(world, saved, name) for name in expected}
        assert all(
            whole[name].dtype == rows.dtype and torch.equal(whole[name], rows) for name, rows in expected.items()
        )
        for name, first, count in spans:
            assert torch.equal(read_shared(world, saved, name, first, count), expected[name][first : first + count])
        return threading.current_thread()

    threads = run_ranks(3, read_all, ReadingRanks)
    assert set(opened) == {threads[0]}
    opened.clear()
    read = row_reader(ReadingRanks(1, 2, None, None), saved, "bank", whole=())
    assert read("index", 2, 4).tolist() == [5, 6] and len(opened) == 1, "rows of its own are read by each rank"
