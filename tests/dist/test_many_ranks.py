"""Sixty-four processes of a tiny training: start-up, rendezvous, agreement at each step, and the report of a hang.

The ranks need some GB beside what they share, and some minutes on two cores.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from tests.dist import many_ranks

SIZE, NEEDED_GB = 64, 6

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]


def find_available_gb():
    """GB of memory that new processes can take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if (available := find_available_gb()) < NEEDED_GB:
        pytest.skip(f"{SIZE} ranks need {NEEDED_GB} GB of free memory, and {available:.1f} GB are available")
    folder = tmp_path_factory.mktemp("many")
    data = folder / "data"
    subprocess.run([sys.executable, "-m", "data_prep", "digits", str(data)], check=True, capture_output=True)
    command = [sys.executable, many_ranks.__file__, str(folder), str(data / "train"), str(SIZE)]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return folder, json.loads((folder / "outcomes.json").read_text())


def test_all_ranks_meet_train_and_end_together(outcomes):
    folder, measured = outcomes
    whole = measured["whole"]
    assert whole["codes"] == [0] * SIZE, next(filter(None, whole["logs"]))[-3000:]
    assert [end["cause"] for end in whole["ends"]] == ["done"] and len(measured["start_cpu_s"]) == SIZE
    steps = [line["step"] for line in read_lines(RunDir(folder / "whole").journal) if "loss" in line]
    assert steps == list(range(1, many_ranks.STEPS + 1)), "each step was agreed on once"


def test_a_suspended_rank_is_blamed_by_one_report_and_all_others_leave(outcomes):
    hung, target = outcomes[1]["hung"], many_ranks.get_target(SIZE)
    codes = dict(enumerate(hung["codes"]))
    assert hung["in_time"] and codes.pop(target) < 0, "it was suspended, and killed at the end"
    assert set(codes.values()) == {1}
    (end,) = hung["ends"]
    # a slow machine has a long limit, before which the silence of a rank shows that it is gone or stopped
    assert end["cause"] in ("hang", "killed")
    assert re.findall(r"rank (\d+) on (\w+) \(process \d+\)", end["why"]) == [(str(target), f"n{target}")]
    assert sum(end["why"][:60] in log for log in hung["logs"]) == SIZE - 1, "every other rank reports the same sentence"
