"""What a job writes down of the shell that submitted it, and what it refuses to run."""

import os

import pytest

from hpcssl.files import read_lines
from slurm import local, trust, watch

SECRET = "hunter2-s3cret"


@pytest.fixture
def lab():
    """The umask of a lab whose members share folders."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_the_environment_reaches_no_file_of_a_run_and_others_can_write_none(runner, stand_in, monkeypatch, lab):
    monkeypatch.setenv("A_SERVICE_TOKEN", SECRET)
    run = stand_in(steps=3)
    body = (run.code / "hpcssl" / "run.py").read_text()
    seen = 'append_line(run.root / "seen.jsonl", {"length": len(os.environ["A_SERVICE_TOKEN"])})'
    (run.code / "hpcssl" / "run.py").write_text(body.replace('    told = json.', f"    {seen}\n    told = json.", 1))
    trust.secure(run.root)
    runner.submit(run)
    assert runner.end() == "COMPLETED"
    assert {line["length"] for line in read_lines(run.root / "seen.jsonl")} == {len(SECRET)}  # the job had it
    files = [path for path in run.root.rglob("*") if path.is_file() and run.code not in path.parents]
    assert any(path.parent == run.logs for path in files)
    told = [path for path in files if SECRET in path.read_text(errors="replace")
            or "A_SERVICE_TOKEN" in path.read_text(errors="replace")]
    assert not told
    assert not [path for path in (run.logs, *files) if path.stat().st_mode & trust.OTHERS]


def test_an_attempt_with_code_that_others_can_write_is_refused(stand_in):
    run = stand_in()
    os.chmod(run.code / "slurm", 0o775)
    job = local.launch(run, {"train": {}})[0]
    assert watch.wait(run, lambda text: None) == 1
    assert f"{run.code / 'slurm'}: got mode 0775: others can write it" in local.ask(run, job).reason
    assert not run.attempts.exists()
