"""The checkpoint store: whole or absent, newest valid first, any number of ranks, nothing lost to a full disk."""

import errno
import os

import pytest
import torch

from hpcssl import files
from hpcssl.errors import ResumeError
from hpcssl.files import RunDir
from hpcssl.train import checkpoint
from hpcssl.train.checkpoint import MANIFEST, Rows, Saved, State, Store, digest_of, folders, newest_valid
from hpcssl.world import World


def state(step, seed=0):
    made = torch.Generator().manual_seed(seed + step)
    tensors = {"net.weight": Rows(torch.randn(5, 4, generator=made)), "net.scale": Rows(torch.tensor(float(step))),
               "net.half": Rows(torch.randn(3, generator=made).bfloat16()),
               "bank.index": Rows(torch.arange(7) + step, 0, 7)}
    return State(step, tensors, {"pointer": step}, "f" * 8, {"seed": 0}, {"world": 1})


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def saved_steps(run, *steps, **options):
    store = Store(run, World.alone(), **{"keep": 9} | options)
    for step in steps:
        assert store.save(state(step)) is None
    return store


def test_round_trip_is_bit_for_bit(run):
    saved_steps(run, 3)
    found, skipped = newest_valid(run)
    assert found.step == 3 and not skipped and found.manifest["numbers"] == {"pointer": 3}
    for name, rows in state(3).tensors.items():
        assert torch.equal(found.rows(name), rows.local) and found.rows(name).dtype == rows.local.dtype
    assert found.rows("bank.index", 2, 3).tolist() == [5, 6, 7]
    assert found.rows("bank.index", 7, 0).shape == (0,)


def test_digest_tells_contents_and_not_their_place(run, tmp_path):
    saved_steps(run, 3)
    other = RunDir(tmp_path / "other")
    saved_steps(other, 1, 3)
    assert digest_of(run) == digest_of(other)
    changed = RunDir(tmp_path / "changed")
    body = state(3)
    body.tensors["net.half"].local[0] += 1
    Store(changed, World.alone()).save(body)
    assert digest_of(changed) != digest_of(run)


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda f: (f / MANIFEST).unlink(), "no manifest: the save was cut short"),
    (lambda f: (f / MANIFEST).write_text("{"), "the manifest cannot be read"),
    (lambda f: (f / "part-0.safetensors").unlink(), "part-0.safetensors is missing"),
    (lambda f: os.truncate(f / "part-0.safetensors", 100), "has 100 bytes, not"),
    (lambda f: flip(f / "part-0.safetensors"), "another sha256"),
], ids=["no-manifest", "torn-manifest", "missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_named(run, caplog, damage, reason):
    store = saved_steps(run, 2, 4)
    damage(run.checkpoint(4))
    found, skipped = newest_valid(run)
    assert found.step == 2
    assert skipped[0][0].name == "step-00000004" and reason in skipped[0][1]
    with caplog.at_level("WARNING", logger="hpcssl"):
        checkpoint.LOG.propagate = True
        assert store.newest().step == 2
    assert "step-00000004 skipped" in caplog.text and reason in caplog.text


def flip(path):
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)


def test_none_left_is_one_sentence(run):
    saved_steps(run, 2)
    flip(run.checkpoint(2) / "part-0.safetensors")
    assert newest_valid(run)[0] is None
    with pytest.raises(ResumeError, match=r"step-00000002: part-0\.safetensors has another sha256"):
        digest_of(run)


def test_the_last_ones_and_every_nth_are_kept(run):
    saved_steps(run, *range(1, 9), keep=2, keep_every=3)
    assert [step for step, _ in folders(run)] == [3, 6, 7, 8]


@pytest.mark.parametrize("full_at", ["part", "manifest"])
def test_a_full_disk_loses_nothing(run, monkeypatch, full_at):
    store = saved_steps(run, 2, keep=1)
    honest = files.atomic_file

    def no_room(path):
        if full_at in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return honest(path)

    monkeypatch.setattr(files, "atomic_file", no_room)
    failed = store.save(state(4))
    assert "No space left on device" in failed and "step-00000004" in failed
    assert newest_valid(run)[0].step == 2 and not run.checkpoint(4).exists()
    monkeypatch.undo()
    assert store.save(state(6)) is None
    assert newest_valid(run)[0].step == 6


def test_a_really_full_disk_loses_nothing(tmp_path):
    """A tmpfs of 1 MB: the second save does not fit, and the first is still whole."""
    import subprocess

    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)],
                                           capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        store, run = Store(RunDir(mount / "run"), World.alone()), RunDir(mount / "run")
        assert store.save(state(2)) is None
        large = state(4)
        large.tensors["net.large"] = Rows(torch.zeros(1 << 19))
        assert "No space left on device" in store.save(large)
        assert newest_valid(run)[0].step == 2
        assert store.save(state(6)) is None
        assert newest_valid(run)[0].step == 6
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_save_goes_on_beside_the_training(run, monkeypatch):
    """``begin`` copies and returns; what the training changes meanwhile is not in the checkpoint."""
    import threading

    gate, honest = threading.Event(), files.atomic_file

    def slow(path):
        assert gate.wait(30)
        return honest(path)

    monkeypatch.setattr(files, "atomic_file", slow)
    store, body = Store(run, World.alone()), state(5)
    expected = body.tensors["net.weight"].local.clone()
    store.begin(body)
    assert store.busy and store.saving
    body.tensors["net.weight"].local.zero_()
    gate.set()
    assert store.finish() is None and not store.busy
    assert torch.equal(Saved.open(run.checkpoint(5)).rows("net.weight"), expected)


def test_no_pickle_anywhere(run):
    saved_steps(run, 2)
    assert sorted(p.name for p in run.checkpoint(2).iterdir()) == [MANIFEST, "part-0.safetensors"]
