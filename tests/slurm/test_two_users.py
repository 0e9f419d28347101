"""Two users with different umasks share a cluster and a folder of runs: one trains, the other can only look."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest

from hpcssl import cli_runner
from hpcssl.data.node_folder import make_private_folder
from slurm import cli
from slurm.backend import permissions
from slurm.log import attempts
from tests.slurm.stubs import change_settings, create_run

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
OTHER_USER = 65534  # nobody, on every system


def run_as_other_user(*words, umask=0o022):
    """Run ``hpcssl-submit`` as another user; its exit code and what it printed to stdout and to stderr.

    The command runs in a child of this process, and once in this process before: the other user may not be able to
    read the interpreter's files, so that every module must have been imported.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            become_other_user(umask)
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli_runner.run(cli.app, [str(word) for word in words], "hpcssl-submit")
            os.write(writer, json.dumps([out.getvalue(), err.getvalue()]).encode())
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return (code, *json.loads(text or '["", ""]'))


def become_other_user(umask):
    """Make this process, a child, one of the other user, who belongs to this user's group."""
    os.chdir("/")
    os.setgroups([])
    os.setgid(os.getgid())
    os.setuid(OTHER_USER)
    os.umask(umask)


def let_in(folder):
    """Let the other user enter a folder of pytest, and those that it lies in."""
    while folder != Path(tempfile.gettempdir()):
        folder.chmod(folder.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
        folder = folder.parent


def read_tree(folder):
    """Owner, mode and content of everything in a folder, by path; without what the running job changes itself."""
    return {
        str(path): (path.lstat().st_uid, path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
        if "logs" not in path.parts and not path.name.startswith(("journal", "ranks", ".", "lock"))
    }


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=["022", "002", "077"])
def shared_run(request, tmp_path_factory):
    """A run of this user with three umasks, in a folder that everybody can enter, and its group can write."""
    root = tmp_path_factory.mktemp("shared")
    root.chmod(0o2777)
    let_in(root.parent)
    before = os.umask(request.param)
    yield create_run(root / "run", steps=60, hold_at=30), request.param
    os.umask(before)


@pytest.fixture
def imported_modules(tmp_path):
    """Import what the commands of this file import while they run."""
    other = create_run(tmp_path / "other", steps=1)
    for words in (["status", other.root], ["cancel", other.root], ["preempt", other.root]):
        cli_runner.run(cli.app, list(map(str, words)), "hpcssl-submit")
    new = ["digits_msf", "--run", tmp_path / "new", "--dry-run", f"data.train={tmp_path}"]
    cli_runner.run(cli.app, list(map(str, new)), "hpcssl-submit")


@as_root
@pytest.mark.slurm
@pytest.mark.usefixtures("imported_modules")
def test_another_user_sees_what_the_umask_allows_and_changes_nothing(slurm_runner, shared_run, shards):
    run, umask = shared_run
    shards.root.chmod(0o755)
    let_in(shards.root.parent)
    permissions.secure_run_folder(run.root)  # as every submission does
    job = slurm_runner.submit(run)
    slurm_runner.wait_for_step(30)
    before = read_tree(run.root)
    code, shown, error = run_as_other_user("status", run.root)
    if umask == 0o077:
        assert code == 2 and not shown and str(run.root) in error
    else:
        assert code == 0 and {f"job={job}", "state=RUNNING"} <= set(shown.split()), (shown, error)
    submission = ("digits_msf", "--run", run.root, f"data.train={shards.root}", "optim.batch=8", "bank.size=32")
    for words in (("cancel", run.root), ("preempt", run.root), submission):
        code, shown, error = run_as_other_user(*words, umask=0o002)
        assert code in (1, 2) and not shown, (words, shown)
        assert error.startswith("hpcssl-submit: ") and (str(run.root) in error or job in error), (words, error)
        assert "unexpected" not in error, error
    assert read_tree(run.root) == before
    change_settings(run, hold_at=None)
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert [attempt.cause for attempt in attempts.read_attempts(run)] == ["done"]


@as_root
def test_two_users_stage_into_folders_of_their_own(tmp_path):
    """The folder of each user on a node's disk is closed to the other, also after a permissive umask."""
    tmp_path.chmod(0o1777)
    let_in(tmp_path.parent)
    before = os.umask(0)
    try:
        own = make_private_folder(tmp_path, "shards")
        pid = os.fork()
        if not pid:
            become_other_user(0)
            code = 1
            try:
                make_private_folder(tmp_path, "shards")
                os.listdir(own)
            except PermissionError as error:
                code = 0 if error.filename == str(own) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.umask(before)
    folders = {path.stat().st_uid: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert folders == {os.getuid(): 0o700, OTHER_USER: 0o700}
