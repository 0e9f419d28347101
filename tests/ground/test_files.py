"""Atomic writes, JSON lines and the run lock when processes are killed."""

import os
import signal
import subprocess
import sys

import pytest

from hpcssl import files
from hpcssl.errors import ResumeError
from hpcssl.json_lines import read_scored_steps, truncate_after
from hpcssl.run_dir import RunDir
from hpcssl.storage import tail
from hpcssl.train.attempt.run_lock import RunLock


def test_an_error_leaves_the_old_file_and_no_temporary_file(tmp_path):
    path = tmp_path / "a.json"
    files.atomic_write(path, "old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    files.atomic_write(path, b"old")
    code = (
        "import sys; from hpcssl import files\n"
        f"with files.atomic_file({str(path)!r}) as f:\n"
        "    f.write(b'x' * 100000); f.flush(); print('half', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.read_bytes() == b"old"


def test_a_directory_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_dir(tmp_path / "d") as part:
        (part / "x").write_text("1")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with files.atomic_dir(tmp_path / "d") as part:
        (part / "x").write_text("1")
    assert (tmp_path / "d" / "x").read_text() == "1"


def test_lines_of_several_writers_do_not_mix_and_an_incomplete_line_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        f"from hpcssl import files\nfor i in range(50): files.append_line({str(path)!r}, {{'i': i, 'pad': 'x' * 500}})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [w.wait() for w in writers] == [0, 0, 0]
    with open(path, "a") as file:
        file.write('{"i": 5')
    assert len(files.read_lines(path)) == 150
    assert files.read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("end", ["", '{"step": 9', "\n\x00\xff\n"], ids=["whole", "torn", "damaged"])
def test_a_journal_is_truncated_after_the_step_of_the_checkpoint(tmp_path, end):
    path = tmp_path / "journal.jsonl"
    truncate_after(path, 4)
    assert not path.exists()
    for step in (1, 2, 3, 4, 4, 5, 6, 7):
        files.append_line(path, {"step": step})
    with open(path, "a", encoding="latin-1") as file:
        file.write(end)
    truncate_after(path, 4)
    assert [r["step"] for r in files.read_lines(path)] == [1, 2, 3, 4, 4] and path.read_bytes().count(b"\n") == 5
    truncate_after(path, 0)
    assert path.read_bytes() == b""


def test_of_a_long_journal_only_the_end_is_read(tmp_path):
    path, line = tmp_path / "journal.jsonl", b'{"step": 7, "loss": 0.123456789, "images_per_s": 1234.5}\n'
    path.write_bytes(line * (16_000_000 // len(line)) + b'{"step": 8, "eval": true}\n{"step": 9}\n')
    before = bytes_read()
    truncate_after(path, 8)
    assert read_scored_steps(path, 8) == {8}
    assert bytes_read() - before < 1_000_000
    assert path.read_bytes().endswith(b'{"step": 8, "eval": true}\n')


def bytes_read():
    """Bytes that this process has read from files so far."""
    with open("/proc/self/io") as io:
        return int(next(line for line in io if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 16])
def test_lines_are_read_from_the_last_to_the_first(tmp_path, monkeypatch, block):
    path = tmp_path / "lines"
    for text in (b"", b"\n", b"a", b"a\n", b"\n\na\nbc\n\ndef", b"abcdefghijk\nb\n", b"a\nabcdefghijk"):
        path.write_bytes(text)
        lines = list(tail.read_backward(path, block))
        assert [line for _, line in lines] == [line for line in text.split(b"\n") if line][::-1]
        assert all(text[offset : offset + len(line)] == line for offset, line in lines)
    monkeypatch.setattr(tail, "MAX_LINE_BYTES", 8)
    assert [line for _, line in tail.read_backward(path, 4)] == [b"", b"a"], "a line that is too long"
    path.write_bytes(b"bbbacccccccccccb\nc")
    assert [line for _, line in tail.read_backward(path, block)] == [b"c", b""]


def test_the_run_lock_is_released_when_its_holder_dies(tmp_path):
    run = RunDir(tmp_path / "run")
    code = (
        "import sys; from hpcssl.run_dir import RunDir; from hpcssl.train.attempt.run_lock import RunLock\n"
        f"lock = RunLock(RunDir({str(run.root)!r}), 'job 17'); lock.take()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ResumeError) as caught:
        RunLock(run, "job 18").take(patience_s=0)
    assert str(run.root) in caught.value.what
    assert f"job 17, process {holder.pid} on " in caught.value.got
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    # the kernel releases the lock when the process ends: there is no heartbeat to watch, and nothing to wait for
    RunLock(run, "job 18").take(patience_s=0)
