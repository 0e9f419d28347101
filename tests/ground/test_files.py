"""Files that are whole or absent, whatever happens in between."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hpcssl import files
from hpcssl.files import RunDir
from hpcssl.journal import cut_back


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.json"
    files.atomic_write(path, "old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_kill_9_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    files.atomic_write(path, b"old")
    code = ("import sys, time; from hpcssl import files\n"
            f"with files.atomic_file({str(path)!r}) as f:\n"
            "    f.write(b'x' * 100000); f.flush(); print('half', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.read_bytes() == b"old"


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_dir(tmp_path / "d") as part:
        (part / "x").write_text("1")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with files.atomic_dir(tmp_path / "d") as part:
        (part / "x").write_text("1")
    assert (tmp_path / "d" / "x").read_text() == "1"


def test_lines_of_many_writers_do_not_mix_and_a_torn_one_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (f"from hpcssl import files\nfor i in range(50): files.append_line({str(path)!r}, "
            "{'i': i, 'pad': 'x' * 500})")
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [w.wait() for w in writers] == [0, 0, 0]
    with open(path, "a") as file:
        file.write('{"i": 5')
    assert len(files.read_lines(path)) == 150
    assert files.read_lines(tmp_path / "none.jsonl") == []


def test_a_journal_is_cut_back_to_its_checkpoint(tmp_path):
    path = tmp_path / "journal.jsonl"
    for step in range(1, 8):
        files.append_line(path, {"step": step})
    cut_back(path, 4)
    assert [r["step"] for r in files.read_lines(path)] == [1, 2, 3, 4]


def test_the_runs_lock_dies_with_its_owner(tmp_path):
    from hpcssl.errors import ResumeError
    from hpcssl.train.lock import RunLock

    run = RunDir(tmp_path / "run")
    code = ("import time; from hpcssl.files import RunDir; from hpcssl.train.lock import RunLock\n"
            f"lock = RunLock(RunDir({str(run.root)!r}), 'job 17'); lock.take()\n"
            "print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ResumeError, match=f"job 17, process {holder.pid} on"):
        RunLock(run, "job 18").take(patience_s=0)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    RunLock(run, "job 18").take(patience_s=5)
    assert time.monotonic() - began < 5
