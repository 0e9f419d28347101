"""Jobs run only code that nobody else can write, weights execute nothing, and no secret is written to a run folder."""

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
from hpcssl.files import append_line, atomic_write
from hpcssl.nets import unpack
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, code_snapshot, permissions
from slurm.backend.profiles import Profile
from tests.printed import printed_error

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def group_umask():
    """The umask of a group whose members share folders."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.fixture
def run(tmp_path, group_umask):
    """A run folder that its group can write, as inside a folder with setgid."""
    run = RunDir(tmp_path / "group" / "run")
    run.root.mkdir(parents=True)
    run.root.chmod(0o2775)
    atomic_write(run.config, "seed: 0\n")
    (run.root / "jobs.jsonl").touch()
    permissions.secure_run_folder(run.root)
    code_snapshot.create_snapshot(run)
    return run


def writable_by_others(folder):
    """Return the paths at and below a folder that other users can write."""
    return [str(p) for p in (folder, *folder.rglob("*")) if p.stat().st_mode & permissions.WRITE_BY_OTHERS]


def test_the_code_and_logs_of_a_group_writable_run_are_writable_by_the_owner_only(run):
    permissions.check(run.root)
    assert not writable_by_others(run.code) and not writable_by_others(run.logs)
    assert all(p.stat().st_mode & stat.S_IRGRP for p in run.code.rglob("*"))  # others may read
    mode = run.root.stat().st_mode
    assert mode & stat.S_IWGRP and mode & stat.S_ISVTX and mode & stat.S_ISGID
    assert not (run.jobs.stat().st_mode | run.config.stat().st_mode) & permissions.WRITE_BY_OTHERS
    append_line(run.root / "new.jsonl", {})
    atomic_write(run.root / "new", "")
    for name in ("new.jsonl", "new"):
        assert not (run.root / name).stat().st_mode & permissions.WRITE_BY_OTHERS


def test_bytecode_that_a_job_compiles_is_writable_by_the_owner_only(run):
    subprocess.run(
        [sys.executable, "-c", "import slurm.job.bootstrap"],
        check=True,
        umask=0o002,
        env=os.environ | {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": ""},
    )
    compiled = list((run.code / "slurm" / "job" / "__pycache__").iterdir())
    assert compiled and not writable_by_others(run.code)


@pytest.mark.parametrize("name", permissions.TRUSTED_PATHS)
def test_code_that_others_can_write_is_not_run(run, name):
    path = run.root / name
    if not path.exists():
        path.touch()
    path.chmod(path.stat().st_mode | stat.S_IWGRP)
    command = ["-S", "-m", "slurm.job.bootstrap", "-u", "-m", "slurm.job.task", str(run.root), "train"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    error = printed_error(done.stderr)
    assert (error.program, error.what) == ("hpcssl", str(path))
    assert f"{stat.S_IMODE(path.stat().st_mode):o}" in error.got and f"chmod -R go-w {path}" in error.fix
    if path.is_file() or name == "logs":
        permissions.secure_run_folder(run.root)
    else:
        permissions.make_private(path)
    permissions.check(run.root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "code", "logs", "config.yaml"])
def test_code_of_another_user_is_not_run(run, name, monkeypatch):
    os.chown(run.root / name, 12345, -1)
    for check in (permissions.check, permissions.secure_run_folder):
        with pytest.raises(SubmitError) as caught:
            check(run.root)
        assert caught.value.what == str(run.root / name) and "12345" in caught.value.got and "--run" in caught.value.fix
    if name in (".", "code"):  # the code of another user would not refuse to run
        done = run_setup_lines(run)
        assert done.returncode == 1 and not done.stdout and done.stderr.startswith(f"hpcssl: {run.root}: ")


def run_setup_lines(run):
    """Run the lines of the batch script that check the code, and then ``echo ran``."""
    script = batch_script._setup_lines(run, Profile(), "0123456789abcdef")[0] + "\necho ran"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


def test_the_batch_script_runs_no_code_that_others_can_write(run):
    done = run_setup_lines(run)
    assert done.stdout == "ran\n" and done.returncode == 0
    (run.code / "slurm" / "job" / "epilogue.py").chmod(0o664)  # the batch script runs it after the tasks have refused
    done = run_setup_lines(run)
    assert done.returncode == 1 and not done.stdout and done.stderr.startswith(f"hpcssl: {run.root}: ")


def test_every_torch_load_reads_only_tensors():
    calls = []
    folders = [ROOT / name for name in ("hpcssl", "slurm", "data_prep", "benchmarks")]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_state_dict_from_url"):
                only = [k.value for k in node.keywords if k.arg == "weights_only"]
                calls.append((path.name, len(only) == 1 and getattr(only[0], "value", None) is True))
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"cloudpickle", "dill", "shelve", "marshal"}, path
    assert calls and all(safe for _, safe in calls), calls


class Malicious:
    """An object whose unpickling creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_reading_weights_executes_nothing(tmp_path, legacy):
    trap, path = tmp_path / "trap", tmp_path / "weights.pth"
    torch.save(
        {"state_dict": {"w": torch.ones(2), "x": Malicious(str(trap))}}, path, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(EvalError) as caught:
        unpack.read_checkpoint(path)
    assert str(path) in caught.value.what and f"{os.mkdir.__module__}.mkdir" in caught.value.got
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the object is really malicious
    assert trap.exists()


SECRET = "hunter2-s3cret"


def test_secrets_are_not_written_to_a_run_folder(run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with pytest.raises(ConfigError) as caught:
        config.load(Profile, {"account": "${oc.env:WANDB_API_KEY}"})
    assert caught.value.what.endswith("account") and "${oc.env:WANDB_API_KEY}" in caught.value.got
    assert SECRET not in str(caught.value)
    text = batch_script.render(run, "train", {"time": "1:00:00", "nodes": "2", "ntasks-per-node": "2"}, Profile())
    assert SECRET not in text and "WANDB" not in text and "slurm.job.task" in text
