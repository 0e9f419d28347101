"""Habits that reviews forget: each is a pattern that must not stand in the packages, with the files that may."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [p for package in ("hpcssl", "slurm", "data_prep") for p in sorted((ROOT / package).rglob("*.py"))]

FORBIDDEN = {
    r"\.cuda\(": (),  # a device written into the maths cannot be tested without it
    r"torch\.manual_seed|np\.random\.seed|random\.seed\(": (),  # randomness is addressed: hpcssl/rng.py
    r"import random\b|from random import": (),
    r"builtins\.": (),
    r"ArgumentParser|argparse": ("hpcssl/nets/unpack.py",),  # names a class that stands in others' files
    r"weights_only=False|pickle\.load": (),
    r"shell=True|os\.system\(": (),
    r"torch\.distributed|import distributed": ("hpcssl/world.py",),
    r"^\s*print\(": ("hpcssl/cli.py", "hpcssl/door.py", "slurm/cli.py", "slurm/demo.py", "data_prep/cli.py",
                     "slurm/job.py", "slurm/after.py"),  # a job's log is its terminal
    r"except( Exception)?:\s*pass": (),
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_pattern_stands_only_where_allowed(pattern):
    found = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path in FILES
             if str(path.relative_to(ROOT)) not in FORBIDDEN[pattern]
             for number, line in enumerate(path.read_text().splitlines(), 1)
             if re.search(pattern, line) and not line.lstrip().startswith("#")]
    assert not found, "\n".join(found)


def test_no_package_is_shadowed_by_tests():
    inits = list((ROOT / "tests").rglob("__init__.py"))
    assert not inits, f"{inits}: a package tests/slurm would shadow slurm"


def test_dependencies_have_their_reason():
    import configparser

    text = (ROOT / "setup.cfg").read_text()
    setup = configparser.ConfigParser()
    setup.read_string(text)
    for line in setup["options"]["install_requires"].split("\n"):
        name = re.split(r"[<>=\[ ]", line.strip())[0]
        if name:
            assert re.search(rf"^#.*\b{re.escape(name)}\b", text, re.M), f"{name} has no reason in setup.cfg"
