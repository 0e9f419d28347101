"""What installing and importing the package promises."""

import configparser
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hpcssl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup():
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def test_two_builds_of_faiss_are_refused_with_one_sentence(monkeypatch):
    monkeypatch.setattr(hpcssl._metadata, "version", lambda name: {"faiss-cpu": "1.9", "faiss-gpu": "1.7"}[name])
    with pytest.raises(ImportError, match=r"both faiss-cpu 1\.9 and faiss-gpu 1\.7; expected one.*to mend: pip"):
        hpcssl._refuse_two_faiss()


@pytest.mark.parametrize("there", ["faiss-cpu", "faiss-gpu", None])
def test_one_build_or_none_is_fine(monkeypatch, there):
    def version(name):
        if name != there:
            raise metadata.PackageNotFoundError(name)
        return "1.9"

    monkeypatch.setattr(hpcssl._metadata, "version", version)
    hpcssl._refuse_two_faiss()


def test_apex_is_nvidias_by_commit(setup):
    apex = setup["options.extras_require"]["apex"]
    assert re.fullmatch(r"apex @ git\+https://github\.com/NVIDIA/apex@[0-9a-f]{40}", apex.strip())


def test_the_three_doors_answer(setup):
    doors = setup["options.entry_points"]["console_scripts"].split("\n")
    for door in filter(None, doors):
        name, target = (part.strip() for part in door.split("="))
        module, function = target.split(":")
        said = subprocess.run([sys.executable, "-c", f"from {module} import {function} as door; door(['--help'])"],
                              capture_output=True, text=True)
        assert said.returncode == 0 and name in said.stdout, said.stderr


def test_looking_after_runs_never_imports_torch():
    """status, cancel and logs answer at once, on a login node too."""
    code = "import sys; import slurm.cli, slurm.control, slurm.watch, slurm.sched; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
