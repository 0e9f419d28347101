"""What is run, read and written in our name: nothing of others, and no secret of ours."""

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcssl import config
from hpcssl.errors import ConfigError, EvalError, SubmitError
from hpcssl.files import RunDir, append_line, atomic_write
from hpcssl.nets import unpack
from slurm import freeze, script, trust
from slurm.cluster import Profile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lab():
    """The umask of a lab whose members share folders."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.fixture
def run(tmp_path, lab):
    """A run folder that a group can write, as in a folder with setgid."""
    run = RunDir(tmp_path / "group" / "run")
    run.root.mkdir(parents=True)
    run.root.chmod(0o2775)
    atomic_write(run.config, "seed: 0\n")
    (run.root / "jobs.jsonl").touch()
    trust.secure(run.root)
    freeze.freeze(run)
    return run


def open_to_others(folder):
    return [str(p) for p in (folder, *folder.rglob("*")) if p.stat().st_mode & trust.OTHERS]


def test_a_group_writable_run_keeps_working_with_its_code_and_logs_ours_alone(run):
    trust.check(run.root)
    assert not open_to_others(run.code) and not open_to_others(run.logs)
    assert all(p.stat().st_mode & stat.S_IRGRP for p in run.code.rglob("*"))  # others may read
    mode = run.root.stat().st_mode
    assert mode & stat.S_IWGRP and mode & stat.S_ISVTX and mode & stat.S_ISGID
    assert not (run.jobs.stat().st_mode | run.config.stat().st_mode) & trust.OTHERS
    append_line(run.root / "new.jsonl", {})
    atomic_write(run.root / "new", "")
    assert not ((run.root / "new.jsonl").stat().st_mode | (run.root / "new").stat().st_mode) & trust.OTHERS


def test_what_python_compiles_in_a_job_is_ours_alone(run):
    subprocess.run([sys.executable, "-c", "import slurm.start"], check=True, umask=0o002,
                   env=os.environ | {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": ""})
    compiled = list((run.code / "slurm" / "__pycache__").iterdir())
    assert compiled and not open_to_others(run.code)


@pytest.mark.parametrize("name", trust.RUN_FROM)
def test_what_others_can_write_is_not_run(run, name):
    path = run.root / name
    if not path.exists():
        path.touch()
    path.chmod(path.stat().st_mode | stat.S_IWGRP)
    done = subprocess.run([sys.executable, "-S", "-m", "slurm.start", "-u", "-m", "slurm.job", str(run.root), "train"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"hpcssl: {path}: got mode" in done.stderr and f"chmod -R go-w {path}" in done.stderr
    trust.secure(run.root) if path.is_file() or name == "logs" else trust.close(path)
    trust.check(run.root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "code", "logs", "config.yaml"])
def test_what_belongs_to_another_is_not_run(run, name, monkeypatch):
    os.chown(run.root / name, 12345, -1)
    for looks in (trust.check, trust.secure):
        with pytest.raises(SubmitError, match=r"an owner with user id 12345.*use a --run folder of your own"):
            looks(run.root)
    if name in (".", "code"):  # code of another would not refuse itself
        done = subprocess.run(["bash", "-c", script._setup(run, Profile())[0]], capture_output=True, text=True)
        assert done.returncode == 1 and "is not of the user of this job" in done.stderr


def test_the_shell_lets_our_own_code_pass_and_none_that_others_can_write(run):
    def shell():
        return subprocess.run(["bash", "-c", script._setup(run, Profile())[0] + "\necho ran"], capture_output=True,
                              text=True)

    assert shell().stdout == "ran\n" and shell().returncode == 0
    (run.code / "slurm" / "after.py").chmod(0o664)  # what the batch script runs when the tasks have refused
    assert shell().returncode == 1 and "or others can write this code, and it is not run" in shell().stderr


def test_every_torch_load_opens_tensors_alone():
    found = []
    folders = [ROOT / name for name in ("hpcssl", "slurm", "data_prep", "benchmarks")]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_state_dict_from_url"):
                only = [k.value for k in node.keywords if k.arg == "weights_only"]
                found.append((path.name, len(only) == 1 and getattr(only[0], "value", None) is True))
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"cloudpickle", "dill", "shelve", "marshal"}, path
    assert found and all(safe for _, safe in found), found


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_strangers_run_nothing(tmp_path, legacy):
    trap, path = tmp_path / "trap", tmp_path / "weights.pth"
    torch.save({"state_dict": {"w": torch.ones(2), "x": Malicious(str(trap))}}, path,
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(EvalError, match=r"an object of \w+\.mkdir, which reading would execute"):
        unpack.read(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trap.exists()


SECRET = "hunter2-s3cret"


def test_secrets_reach_no_file_of_a_run(run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with pytest.raises(ConfigError, match="where an environment variable's secret must not land"):
        config.load(Profile, {"account": "${oc.env:WANDB_API_KEY}"})
    text = script.text(run, "train", {"time": "1:00:00", "nodes": "2", "ntasks-per-node": "2"}, Profile())
    assert SECRET not in text and "WANDB" not in text and "slurm.job" in text
