"""Checkpoints survive kills at any file operation, damaged bits, full disks and read-only file systems."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpcssl import files, rng
from hpcssl.checkpoint import host_copy, manager
from hpcssl.checkpoint.manager import CheckpointManager, CheckpointState
from hpcssl.checkpoint.reader import MANIFEST, folders, latest_valid
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.world import World
from hpcssl.errors import ResumeError, WorldError
from hpcssl.files import append_line, atomic_dir, atomic_write, read_lines, temporaries
from hpcssl.journal import Journal
from hpcssl.json_lines import JsonLinesWriter
from hpcssl.run_dir import RunDir
from hpcssl.train.attempt.run_lock import RunLock

ALL_CASES = [
    (world, k, every, fault)
    for world, every in ((1, 2), (2, 6))
    for k in range(1, every + 1)
    for fault in ("kill", "power", "quota")
]


@pytest.fixture
def memory(tmp_path):
    """A folder in memory, if the machine has one.

    The loss of unsynced data is simulated, and hundreds of real fsyncs would take minutes.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("world", "first", "every", "fault"),
    [
        (1, 5, 10, "power"),
        (2, 25, 60, "kill"),
        (1, 3, 10, "quota"),
        *(pytest.param(*case, marks=pytest.mark.full) for case in ALL_CASES),
    ],
)
def test_a_fault_at_any_file_operation_loses_no_durable_checkpoint(memory, world, first, every, fault):
    """The next attempt finds the last durable checkpoint or its successor, and ends like an undisturbed run."""
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("killed_writers.py")),
            str(memory),
            *map(str, (world, first, every, fault)),
        ],
        text=True,
        capture_output=True,
        timeout=1700,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(attempts) >= 100 // every
    assert not [attempt for attempt in attempts if attempt["why"]], done.stderr[-2000:]
    # whichever of two ranks is first creates the folder: the other one may have fewer operations than were counted.
    # Without space, lines of the journal wait in memory, and the attempt fails only at the next save
    share = 0.5 if fault == "quota" else 0.9
    assert sum(attempt["failed"] for attempt in attempts) >= share * len(attempts)


def state(step, size=300):
    """Return the state of a step, with tensors of several dtypes, shapes and memory formats."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "net.weight": TensorShard(torch.randn(size, generator=generator)),
        "net.half": TensorShard(
            torch.randn(4, 3, 2, 2, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
        ),
        "net.on": TensorShard(torch.tensor([True, False])),
        "net.step": TensorShard(torch.tensor(step)),
        "net.none": TensorShard(torch.empty(0, 3)),
        "bank.index": TensorShard(torch.arange(7) + step, 0, 7),
    }
    return CheckpointState(step, tensors, {"pointer": step}, "f" * 8, {"seed": 0}, {"world": 1})


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


def save_steps(run, *steps, **options):
    """Save the states of some steps and return the manager."""
    checkpoints = CheckpointManager(run, World.single_process(), **options)
    for step in steps:
        assert checkpoints.save(state(step)) is None
    return checkpoints


def flip_bit(path, bit):
    body = bytearray(path.read_bytes())
    body[bit // 8] ^= 1 << bit % 8
    path.write_bytes(body)


def test_safetensors_reads_the_files_that_are_streamed(run):
    checkpoints, body = save_steps(run, 3), state(3)
    path = run.checkpoint(3) / "part-0.safetensors"
    tensors = load_file(path)
    assert tensors.keys() == body.tensors.keys()
    for name, shard in body.tensors.items():
        assert torch.equal(tensors[name], shard.tensor) and tensors[name].dtype == shard.tensor.dtype, name
    assert path.stat().st_size == checkpoints._copy.bytes
    assert {torch.float16, torch.float64, torch.int32, torch.uint8} <= host_copy.DTYPES.keys()


def test_a_save_makes_no_second_copy_of_the_state(run):
    """The file is written from the host copy, whose memory the next save reuses."""
    checkpoints, large = CheckpointManager(run, World.single_process()), state(1, size=1 << 20)
    tracemalloc.start()
    assert checkpoints.save(large) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # bytes of Python objects; the state has 4 << 20
    tracemalloc.stop()
    address = checkpoints._copy._body.data_ptr()
    assert checkpoints.save(state(2, size=1 << 20)) is None
    assert checkpoints._copy._body.data_ptr() == address


@pytest.mark.parametrize("name", ["part-0.safetensors", MANIFEST])
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.full) for s in range(1, 20))])
def test_any_flipped_bit_and_any_truncation_is_detected_and_named(run, name, seed):
    save_steps(run, 2, 4)
    path = run.checkpoint(4) / name
    original = path.read_bytes()
    for position in (rng.uniform(rng.key(seed, name), 40) * len(original) * 8).astype(int):
        flip_bit(path, int(position))
        # one kind of white space in place of another changes nothing in JSON
        harmless = name == MANIFEST and is_same_json(path.read_bytes(), original)
        saved, skipped = latest_valid(run)
        assert saved.step == (4 if harmless else 2), position
        assert harmless or (skipped[0][0].name == "step-00000004" and skipped[0][1]), position
        path.write_bytes(original)
    for length in (rng.uniform(rng.key(seed, name, "end"), 10) * len(original)).astype(int):
        path.write_bytes(original[:length])
        saved, skipped = latest_valid(run)
        assert saved.step == 2 and skipped, length
    path.write_bytes(original + b" " * 8)
    assert latest_valid(run)[0].step == (4 if name == MANIFEST else 2)


def is_same_json(body, original):
    try:
        return json.loads(body) == json.loads(original)
    except ValueError:
        return False


def test_damaged_checkpoints_do_not_count_when_old_ones_are_deleted(run):
    """If the newer of two checkpoints is damaged, the other one is kept until there are two valid ones again."""
    save_steps(run, 2, 4, keep=2)
    flip_bit(run.checkpoint(4) / "part-0.safetensors", 5000)
    checkpoints = CheckpointManager(run, World.single_process(), keep=2)
    assert checkpoints.latest().step == 2
    assert checkpoints.save(state(5)) is None
    assert [step for step, _ in folders(run)] == [2, 5]
    os.truncate(run.checkpoint(5) / "part-0.safetensors", 50)  # damaged during the training: noticed by its size
    assert checkpoints.save(state(6)) is None
    assert [step for step, _ in folders(run)] == [2, 6]
    assert checkpoints.save(state(7)) is None
    assert [step for step, _ in folders(run)] == [6, 7]


def test_a_run_with_damaged_checkpoints_does_not_restart(run):
    save_steps(run, 2, 4)
    for step in (2, 4):
        flip_bit(run.checkpoint(step) / "part-0.safetensors", 4000)
    checkpoints = CheckpointManager(run, World.single_process())
    with pytest.raises(ResumeError) as caught:
        checkpoints.latest()
    assert str(run.root) in caught.value.what and str(run.checkpoints) in caught.value.fix
    for step in (4, 2):
        assert f"step-{step:08d}: part-0.safetensors" in caught.value.got
    assert [step for step, _ in folders(run)] == [2, 4]
    (run.checkpoint(2) / MANIFEST).unlink()
    (run.checkpoint(4) / MANIFEST).unlink()
    # no save was ever completed: nothing is lost by a restart
    assert CheckpointManager(run, World.single_process()).latest() is None


def test_only_files_of_killed_writers_are_removed(run):
    save_steps(run, 2)
    leftovers = [
        run.root / ".config.yaml.0123abcd.tmp",
        run.checkpoints / ".step-00000001.0123abcd.tmp" / "part",
        run.weights / ".step-00000002.safetensors.0123abcd.tmp",
        run.checkpoint(9) / "part-0.safetensors",
        run.checkpoint(4) / ".part-0.safetensors.0123abcd.tmp",
        run.checkpoint(4) / "part-3.safetensors",
    ]
    others = [run.root / ".chain.json.0123abcd.tmp", run.root / "notes.tmp", run.checkpoints / "other.txt"]
    for path in leftovers + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    checkpoints = CheckpointManager(run, World.single_process())
    assert checkpoints.latest().step == 2
    assert checkpoints.save(state(4)) is None
    assert [path for path in leftovers + others if path.exists()] == others


def test_a_checkpoint_that_cannot_be_read_is_skipped_and_named(run, monkeypatch):
    save_steps(run, 2, 4)
    original = manager.files.sha256_of_file

    def fail_to_read(path):
        if "00000004" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(manager.files, "sha256_of_file", fail_to_read)
    saved, skipped = latest_valid(run)
    assert saved.step == 2
    folder, reason = skipped[0]
    assert folder.name == "step-00000004" and "part-0.safetensors" in reason and "Input/output error" in reason


def test_a_save_without_memory_for_the_host_copy_fails_and_the_next_one_succeeds(run, monkeypatch):
    checkpoints = save_steps(run, 2)

    def fail_to_allocate(*_):
        raise RuntimeError("alloc_cpu: no memory")

    monkeypatch.setattr(host_copy.HostCopy, "take", fail_to_allocate)
    failure = checkpoints.save(state(4))
    assert "rank 0" in failure and "alloc_cpu: no memory" in failure
    monkeypatch.undo()
    assert checkpoints.save(state(6)) is None and latest_valid(run)[0].step == 6


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Write a file until the file system is full."""
    with open(folder / "fill", "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_a_full_disk_neither_stops_the_training_nor_loses_a_line(small_disk, caplog):
    run = RunDir(small_disk / "run")
    manager.LOG.propagate = True
    journal = Journal(run, World.single_process(), first_step=0, last_step=1000, every=1, batch=1)
    checkpoints = CheckpointManager(run, World.single_process())
    no_space = os.strerror(errno.ENOSPC)

    def run_steps(*steps):
        for step in steps:
            journal.write(step, loss=float(step))
            journal.write_sample_ids(step, torch.arange(2000), BatchLayout(2000))
        journal.sync()
        return checkpoints.save(state(steps[-1], size=1 << 18))

    assert run_steps(*range(1, 5)) is None
    fill(small_disk)
    failure = run_steps(*range(5, 200))
    assert "step-00000199" in failure and no_space in failure
    assert latest_valid(run)[0].step == 4 and not run.checkpoint(199).exists()
    with pytest.raises(OSError) as caught:
        for _ in range(200):
            append_line(run.attempts, {"event": "end", "why": "w" * 100})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(run.attempts))
    messages = [record.getMessage() for record in caplog.records]
    assert sum(str(run.journal) in text and no_space in text for text in messages) == 1, "reported more than once"
    (small_disk / "fill").unlink()
    assert run_steps(200, 201) is None
    journal.close()
    append_line(run.attempts, {"event": "end"})
    for path in (run.journal, run.samples):
        assert [line["step"] for line in read_lines(path)] == list(range(1, 202)), path
    assert latest_valid(run)[0].step == 201 and read_lines(run.attempts)[-1] == {"event": "end"}
    assert not temporaries(run.checkpoints) and [step for step, _ in folders(run)] == [4, 201]


def test_a_line_that_was_not_written_completely_is_written_again(tmp_path, monkeypatch):
    lines, original = JsonLinesWriter(tmp_path / "l.jsonl"), os.write
    assert lines.add({"i": 0}) is None
    monkeypatch.setattr(os, "write", lambda fd, body: original(fd, body[:5]))
    assert lines.add({"i": 1}) == os.strerror(errno.ENOSPC)
    assert lines.sync() and read_lines(lines.path) == [{"i": 0}]
    monkeypatch.undo()
    assert lines.close() is None and lines.path.read_text() == '{"i": 0}\n{"i": 1}\n'


def test_without_file_locks_a_line_is_written_without_waiting(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waits for a lock that does not exist"))
    with files.exclusive_lock(tmp_path / "attempts.jsonl"):
        pass


def test_a_read_only_file_system_is_reported_with_its_path(small_disk):
    run = RunDir(small_disk / "run")
    checkpoints = save_steps(run, 2)
    lock = RunLock(run, "job")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    world = World.single_process()
    for write in (
        lambda: RunLock(run, "job").take(0),
        lambda: RunLock(RunDir(small_disk / "new"), "job").take(0),
        lambda: atomic_write(run.config, ""),
        lambda: append_line(run.attempts, {}),
        lambda: atomic_dir(run.code).__enter__(),
    ):
        with pytest.raises(WorldError) as caught:
            world.run_on_main(write)
        assert caught.value.got == os.strerror(errno.EROFS)
        assert caught.value.what.startswith(str(small_disk)) and ".tmp" not in str(caught.value)
    assert os.strerror(errno.EROFS) in checkpoints.save(state(4))
    assert latest_valid(run)[0].step == 2
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    lock.take(0)
    lock.release()
    assert checkpoints.save(state(6)) is None
