"""The environment of the shell reaches no file of a run, and code that others can write is not run."""

import os

import pytest

from hpcssl.files import read_lines
from slurm.backend import local, permissions
from slurm.manage import status, wait

SECRET = "hunter2-s3cret"
VARIABLE = "A_SERVICE_TOKEN"


@pytest.fixture
def group_umask():
    """The umask of a group whose members share folders."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_no_file_of_a_run_has_the_environment_or_is_writable_by_others(runner, make_stub_run, monkeypatch, group_umask):
    monkeypatch.setenv(VARIABLE, SECRET)
    run = make_stub_run(steps=3)
    trainer = run.code / "hpcssl" / "run.py"
    body, first_line = trainer.read_text(), "    settings = read_settings()"
    assert first_line in body
    record = f'append_line(run.root / "lengths.jsonl", {{"length": len(os.environ["{VARIABLE}"])}})'
    trainer.write_text(body.replace(first_line, f"    {record}\n{first_line}", 1))
    permissions.secure_run_folder(run.root)
    runner.submit(run)
    assert runner.wait_for_end() == "COMPLETED"
    lengths = {line["length"] for line in read_lines(run.root / "lengths.jsonl")}
    assert lengths == {len(SECRET)}, "the job itself has the variable"
    files = [path for path in run.root.rglob("*") if path.is_file() and run.code not in path.parents]
    assert any(path.parent == run.logs for path in files)
    texts = {path: path.read_text(errors="replace") for path in files}
    assert [path for path, text in texts.items() if SECRET in text or VARIABLE in text] == []
    assert [path for path in (run.logs, *files) if path.stat().st_mode & permissions.WRITE_BY_OTHERS] == []


def test_an_attempt_whose_code_others_can_write_is_refused(make_stub_run):
    run = make_stub_run()
    code = run.code / "slurm"
    os.chmod(code, 0o775)
    job = local.launch(run, {"train": {}})[0]
    assert wait.wait_for_jobs(run, lambda text: None) == 1
    reason = local.query_job(run, job).reason
    assert str(code) in reason and "0775" in reason
    assert status.query_run(run).attempt == 0 and not run.attempts.exists()
