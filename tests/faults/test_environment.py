"""Faults of the machine around a training: its clock, and its folders for temporary files."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from hpcssl.timing.uptime import measure_uptime
from tests.faults.trained import BASE, train


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards, picture, encode):
    samples = [(f"{i:03d}", encode(picture(i, 20, 24)), i % 2) for i in range(64)]
    return make_shards(tmp_path_factory.mktemp("shards"), samples)


def test_jumps_of_the_clock_change_nothing(tmp_path, shards, monkeypatch):
    """Before each step the clock jumps by an hour, forward and back in turn."""
    hours, real = itertools.cycle([1, 0]), time.time
    overrides = [f"data.train={shards.root}"]

    def jump(_step):
        offset_s = 3600 * next(hours)
        monkeypatch.setattr(time, "time", lambda: real() + offset_s)

    assert train(tmp_path / "steady", overrides) is None
    assert train(tmp_path / "jumping", overrides, before=jump) is None
    steady, jumping = RunDir(tmp_path / "steady"), RunDir(tmp_path / "jumping")
    assert checkpoint_digest(jumping) == checkpoint_digest(steady)
    _, end = read_lines(jumping.attempts)
    assert end["cause"] == "done" and end["last_step"] == 12
    uptime = measure_uptime(jumping, real())
    assert 0 <= uptime.share <= 1 and uptime.lost >= 0


def test_full_folders_for_temporary_files_do_not_stop_a_training(tmp_path, shards):
    """/dev/shm and TMPDIR are full in the training's own view of the file system."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and the right to mount")
    full = tmp_path / "full"
    full.mkdir()
    words = [sys.executable, "-m", "hpcssl", "train", "digits_msf", "--run", str(tmp_path / "run"), *BASE]
    words += ["schedule.steps=4", f"data.train={shards.root}"]
    script = """
        for folder in /dev/shm "$TMPDIR"; do
            mount -t tmpfs -o size=64k tmpfs "$folder" || exit 99
            head -c 100k /dev/zero > "$folder/filler" 2> /dev/null && exit 98
        done
        exec "$@"
    """
    environ = os.environ | {"TMPDIR": str(full), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *words], capture_output=True, text=True, env=environ
    )
    if done.returncode == 99:
        pytest.skip("no right to mount a tmpfs")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "done.json").read_text())["step"] == 4
