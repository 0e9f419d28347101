"""The checkpoint store under attack: killed anywhere, rotten anywhere, on full disks and on disks that only read."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from hpcssl import files, rng
from hpcssl.errors import ResumeError, WorldError
from hpcssl.files import LineFile, RunDir, append_line, atomic_dir, atomic_write, read_lines, temporaries
from hpcssl.journal import Journal
from hpcssl.train import checkpoint, part
from hpcssl.train.checkpoint import MANIFEST, Rows, State, Store, folders, newest_valid
from hpcssl.train.lock import RunLock
from hpcssl.world import World

EACH = [(world, k, every, power) for world, every in ((1, 2), (2, 6)) for k in range(1, every + 1) for power in (0, 1)]


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: what an fsync means is played, and hundreds of real ones take minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("world", "first", "every", "power"), [
    (1, 5, 10, 1), (2, 25, 60, 0), *(pytest.param(*case, marks=pytest.mark.full) for case in EACH)])
def test_a_kill_between_any_two_file_operations_loses_nothing(memory, world, first, every, power):
    """A new life finds the checkpoint that was last reported durable, or the next; it clears up and ends alike."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("lives.py")), str(memory),
                           *map(str, (world, first, every, power))], text=True, capture_output=True, timeout=560,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.returncode == 0, done.stderr[-2000:]
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lives) >= 100 // every
    assert not [life for life in lives if life["why"]], done.stderr[-2000:]
    # of two ranks, whoever is first makes the folder: the other has fewer operations than when they were counted
    assert sum(life["killed"] for life in lives) >= 0.9 * len(lives)


def state(step, size=300):
    made = torch.Generator().manual_seed(step)
    tensors = {"net.weight": Rows(torch.randn(size, generator=made)),
               "net.half": Rows(torch.randn(4, 3, 2, 2, generator=made).bfloat16().contiguous(
                   memory_format=torch.channels_last)),
               "net.on": Rows(torch.tensor([True, False])), "net.step": Rows(torch.tensor(step)),
               "net.none": Rows(torch.empty(0, 3)), "bank.index": Rows(torch.arange(7) + step, 0, 7)}
    return State(step, tensors, {"pointer": step}, "f" * 8, {"seed": 0}, {"world": 1})


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def saved(run, *steps, **options):
    store = Store(run, World.alone(), **options)
    for step in steps:
        assert store.save(state(step)) is None
    return store


def flip(path, bit):
    body = bytearray(path.read_bytes())
    body[bit // 8] ^= 1 << bit % 8
    path.write_bytes(body)


def test_the_library_reads_what_is_streamed(run):
    from safetensors.torch import load_file

    store, body = saved(run, 3), state(3)
    path = run.checkpoint(3) / "part-0.safetensors"
    read = load_file(path)
    assert read.keys() == body.tensors.keys()
    for name, rows in body.tensors.items():
        assert torch.equal(read[name], rows.local) and read[name].dtype == rows.local.dtype, name
    assert path.stat().st_size == store._copy.bytes
    assert {torch.float16, torch.float64, torch.int32, torch.uint8} <= part.DTYPES.keys()


def test_a_save_takes_no_second_copy_of_the_state(run):
    """The file is written from the host copy, whose memory the next save takes again."""
    import tracemalloc

    store, large = Store(run, World.alone()), state(1, size=1 << 20)
    tracemalloc.start()
    assert store.save(large) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # bytes of Python objects; the state has 4 << 20
    tracemalloc.stop()
    kept = store._copy._body.data_ptr()
    assert store.save(state(2, size=1 << 20)) is None
    assert store._copy._body.data_ptr() == kept


@pytest.mark.parametrize("name", ["part-0.safetensors", MANIFEST])
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.full) for s in range(1, 20))])
def test_any_flipped_bit_and_any_lost_end_is_named(run, name, seed):
    saved(run, 2, 4)
    path = run.checkpoint(4) / name
    whole = path.read_bytes()
    for place in (rng.uniform(rng.key(seed, name), 40) * len(whole) * 8).astype(int):
        flip(path, int(place))
        meant = name == MANIFEST and _same(path.read_bytes(), whole)  # a blank for a blank
        found, skipped = newest_valid(run)
        assert found.step == (4 if meant else 2), place
        assert meant or (skipped[0][0].name == "step-00000004" and skipped[0][1]), place
        path.write_bytes(whole)
    for place in (rng.uniform(rng.key(seed, name, "end"), 10) * len(whole)).astype(int):
        path.write_bytes(whole[:place])
        found, skipped = newest_valid(run)
        assert found.step == 2 and skipped, place
    path.write_bytes(whole + b" " * 8)
    assert newest_valid(run)[0].step == (4 if name == MANIFEST else 2)


def _same(body, whole):
    try:
        return json.loads(body) == json.loads(whole)
    except ValueError:
        return False


def test_damaged_checkpoints_count_for_nothing_when_old_ones_go(run):
    """Newest of two is found rotten: the other one stays until two whole ones stand again."""
    saved(run, 2, 4, keep=2)
    flip(run.checkpoint(4) / "part-0.safetensors", 5000)
    store = Store(run, World.alone(), keep=2)
    assert store.newest().step == 2
    assert store.save(state(5)) is None
    assert [step for step, _ in folders(run)] == [2, 5]
    os.truncate(run.checkpoint(5) / "part-0.safetensors", 50)  # while the training goes on: seen by its size
    assert store.save(state(6)) is None
    assert [step for step, _ in folders(run)] == [2, 6]
    assert store.save(state(7)) is None
    assert [step for step, _ in folders(run)] == [6, 7]


def test_a_run_never_begins_anew_over_damaged_checkpoints(run):
    saved(run, 2, 4)
    for step in (2, 4):
        flip(run.checkpoint(step) / "part-0.safetensors", 4000)
    store = Store(run, World.alone())
    with pytest.raises(ResumeError, match=r"step-00000004: part-0\.safetensors has another.*step-00000002: .*again"):
        store.newest()
    assert [step for step, _ in folders(run)] == [2, 4]
    (run.checkpoint(2) / MANIFEST).unlink()
    (run.checkpoint(4) / MANIFEST).unlink()
    assert Store(run, World.alone()).newest() is None  # no save was ever whole: there is nothing to lose


def test_what_killed_writers_left_is_cleared_and_nothing_else(run):
    saved(run, 2)
    left = [run.root / ".config.yaml.0123abcd.tmp", run.checkpoints / ".step-00000001.0123abcd.tmp" / "part",
            run.weights / ".step-00000002.safetensors.0123abcd.tmp", run.checkpoint(9) / "part-0.safetensors",
            run.checkpoint(4) / ".part-0.safetensors.0123abcd.tmp", run.checkpoint(4) / "part-3.safetensors"]
    others = [run.root / ".chain.json.0123abcd.tmp", run.root / "notes.tmp", run.checkpoints / "mine.txt"]
    for path in left + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    store = Store(run, World.alone())
    assert store.newest().step == 2
    assert store.save(state(4)) is None
    assert [path for path in left + others if path.exists()] == others


def test_a_failed_read_is_named_and_passed_over(run, monkeypatch):
    saved(run, 2, 4)
    honest = checkpoint.files.digest

    def broken(path):
        if "00000004" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return honest(path)

    monkeypatch.setattr(checkpoint.files, "digest", broken)
    found, skipped = newest_valid(run)
    assert found.step == 2 and skipped[0][1] == "part-0.safetensors cannot be read (Input/output error)"


def test_no_memory_for_the_copy_is_a_failed_save(run, monkeypatch):
    store = saved(run, 2)
    monkeypatch.setattr(part.HostCopy, "take", lambda *_: (_ for _ in ()).throw(RuntimeError("alloc_cpu: no memory")))
    assert "no host copy of its part: alloc_cpu" in store.save(state(4))
    monkeypatch.undo()
    assert store.save(state(6)) is None and newest_valid(run)[0].step == 6


@pytest.fixture
def small(tmp_path):
    """A tmpfs of 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)],
                                           capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    with open(folder / "fill", "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer dies of it
def test_a_full_disk_stops_no_training_and_loses_no_line(small, caplog):
    run = RunDir(small / "run")
    checkpoint.LOG.propagate = True
    journal = Journal(run, World.alone(), first_step=0, last_step=1000, every=1, batch=1)
    store = Store(run, World.alone())

    def steps(*numbers):
        for step in numbers:
            journal.write(step, loss=float(step))
            journal.sample_ids(step, torch.arange(2000))
        journal.sync()
        return store.save(state(numbers[-1], size=1 << 18))

    assert steps(*range(1, 5)) is None
    fill(small)
    failed = steps(*range(5, 200))
    assert "step-00000199" in failed and "No space left on device" in failed
    assert newest_valid(run)[0].step == 4 and not run.checkpoint(199).exists()
    with pytest.raises(OSError, match=r"No space left on device.*attempts\.jsonl"):
        for _ in range(200):
            append_line(run.attempts, {"event": "end", "why": "w" * 100})
    assert caplog.text.count(f"{run.journal}: No space left on device; the training goes on") == 1
    (small / "fill").unlink()
    assert steps(200, 201) is None
    journal.close()
    append_line(run.attempts, {"event": "end"})
    for path in (run.journal, run.samples):
        assert [line["step"] for line in read_lines(path)] == list(range(1, 202)), path
    assert newest_valid(run)[0].step == 201 and read_lines(run.attempts)[-1] == {"event": "end"}
    assert not temporaries(run.checkpoints) and [step for step, _ in folders(run)] == [4, 201]


def test_a_line_file_tears_nothing(tmp_path, monkeypatch):
    lines, honest = LineFile(tmp_path / "l.jsonl"), os.write
    assert lines.add({"i": 0}) is None
    monkeypatch.setattr(os, "write", lambda fd, body: honest(fd, body[:5]))
    assert lines.add({"i": 1}) == os.strerror(errno.ENOSPC)
    assert lines.sync() and read_lines(lines.path) == [{"i": 0}]
    monkeypatch.undo()
    assert lines.close() is None and lines.path.read_text() == '{"i": 0}\n{"i": 1}\n'


def test_without_locks_nobody_waits_to_write_an_end(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("there is nobody to wait for"))
    with files.alone(tmp_path / "attempts.jsonl"):
        pass


def test_a_folder_that_only_reads_is_one_sentence(small):
    run = RunDir(small / "run")
    store = saved(run, 2)
    lock = RunLock(run, "job")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    world = World.alone()
    for work in (lambda: RunLock(run, "job").take(0), lambda: RunLock(RunDir(small / "new"), "job").take(0),
                 lambda: atomic_write(run.config, ""), lambda: append_line(run.attempts, {}),
                 lambda: atomic_dir(run.code).__enter__()):
        with pytest.raises(WorldError, match=r"got Read-only file system; expected a path that can be") as told:
            world.on_main(work)
        assert str(small) in str(told.value) and ".tmp" not in str(told.value)
    assert "Read-only file system" in store.save(state(4))
    assert newest_valid(run)[0].step == 2
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    lock.take(0)
    lock.release()
    assert store.save(state(6)) is None
