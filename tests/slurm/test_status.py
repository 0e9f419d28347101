"""``hpcssl-submit status``: one call of squeue for all runs, JSON by its schema, and refreshes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from hpcssl import files
from hpcssl.errors import EXIT_USAGE
from hpcssl.run_dir import RunDir
from slurm import cli
from slurm.log import job_log
from slurm.manage import status, status_json
from slurm.manage.queue_snapshot import QueueSnapshot
from tests.slurm.recorded_runs import Squeue, make_run, row, submit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    stub = Squeue(tmp_path / "stub")
    monkeypatch.setenv("PATH", str(stub.bin), prepend=os.pathsep)
    return stub


def test_one_call_of_squeue_serves_any_number_of_runs(tmp_path, squeue):
    runs, rows = [], []
    for k in range(1, 31):
        run, token = make_run(tmp_path / f"r{k}", k)
        token_of_evaluation = submit(run, 100 + k, "knn")
        runs.append(run)
        rows += [row(k, token, run), row(100 + k, token_of_evaluation, run, "PENDING", "Dependency")]
    squeue.answer(*rows)
    states = status.query_runs(runs)
    assert len(squeue.calls) == 1 and squeue.calls[0].split(" -j ")[1].split()[0].count(",") == 59
    assert {state.state for state in states} == {"RUNNING"}
    assert states[4].evals == {"knn": "PENDING (Dependency) job 105"}
    run, _ = make_run(tmp_path / "elsewhere", 7)
    submit(run, 7, clusters="other")
    status.query_runs([*runs, run])
    assert len(squeue.calls) == 3 and "-M other" in squeue.calls[1] + squeue.calls[2], "one call per cluster"


def test_requests_without_an_answer_cost_one_more_call(tmp_path, squeue):
    runs = [make_run(tmp_path / f"r{k}", k)[0] for k in range(1, 6)]
    for run in runs:
        job_log.record_request(run, token="ab" * 8, what="train", kind="slurm", options={})
    status.query_runs(runs)
    assert len(squeue.calls) == 2


def test_another_job_with_the_same_number_is_not_ours(tmp_path, squeue):
    (run, token), (copy, _) = make_run(tmp_path / "run"), make_run(tmp_path / "copy")
    squeue.answer(row(7, "0" * 16, run))
    assert status.query_runs([run])[0].state == "GONE"
    squeue.answer(row(7, token, run))
    assert [state.state for state in status.query_runs([run, copy])] == ["RUNNING", "GONE"]
    squeue.answer()
    assert status.query_runs([run])[0].state == "GONE"
    (squeue.folder / "down").touch()
    state = status.query_runs([run])[0]
    assert state.state == "UNKNOWN" and "contact" in state.hint


def test_the_reason_is_shown_as_long_as_it_holds(tmp_path, squeue):
    run, token = make_run(tmp_path / "run")
    squeue.answer(row(7, token, run, "PENDING", "launch failed requeued held", "2030-01-02T03:04:05"))
    (state,) = status.query_runs([run])
    assert state.state == "PENDING (launch_failed_requeued_held)" and "scontrol release 7" in state.hint
    assert time.localtime(state.expected_start)[:6] == (2030, 1, 2, 3, 4, 5)
    squeue.answer(row(7, token, run, "FAILED", "Priority", "2030-01-02T03:04:05"))
    (state,) = status.query_runs([run])
    assert state.state == "FAILED" and state.expected_start is None


def test_the_json_output_follows_its_schema(tmp_path, squeue, capsys, monkeypatch):
    run, token = make_run(tmp_path / "run")
    other = RunDir(tmp_path / "new")
    other.root.mkdir()
    files.atomic_write(other.config, "seed: 0\n")
    squeue.answer(row(7, token, run, "PENDING", "Priority", "2030-01-02T03:04:05"))
    assert cli.cli_runner.run(cli.app, ["status", str(run.root), str(other.root), "--json"], "hpcssl-submit") == 0
    document = json.loads(capsys.readouterr().out)
    assert cli.cli_runner.run(cli.app, ["status", "--schema"], "hpcssl-submit") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == status_json.SCHEMA
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    first, second = document["runs"]
    expected = {"run": str(run.root), "job": "7", "state": "PENDING", "reason": "Priority", "step": 31, "steps": 100}
    expected |= {"loss": None, "images_per_s": 40.0, "epoch": 2.1, "scores": {"knn20": 88.5}, "finished": False}
    expected["seconds_left"] = 69 * 8 / 40
    assert {name: first[name] for name in expected} == expected
    assert (second["state"], second["job"], second["seconds_left"]) == ("NONE", None, None)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"runs": [first | {"step": "31"}]}, schema)
    code = cli.cli_runner.run(cli.app, ["status", str(run.root), "--json", "--time"], "hpcssl-submit")
    assert code == EXIT_USAGE


def test_the_documentation_names_every_field():
    text = (ROOT / "docs" / "reference" / "status_json.md").read_text()
    fields = status_json.SCHEMA["properties"]["runs"]["items"]["properties"]
    assert [name for name in fields if f"| `{name}` |" not in text] == []


def test_watch_refreshes_until_it_is_interrupted(tmp_path, squeue, capsys, monkeypatch):
    run, token = make_run(tmp_path / "run")
    squeue.answer(row(7, token, run))
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "sleep", sleep)
    words = ["status", str(run.root), "--json", "--watch", "--every", "2"]
    assert cli.cli_runner.run(cli.app, words, "hpcssl-submit") == 75
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 == len(squeue.calls) and naps == [2.0, 2.0, 2.0]
    assert {json.loads(line)["runs"][0]["state"] for line in lines} == {"RUNNING"}


def test_status_imports_no_torch(tmp_path, squeue):
    run, _ = make_run(tmp_path / "run")
    code = f"""
import sys
from slurm import cli
assert cli.cli_runner.run(cli.app, ["status", {str(run.root)!r}, "--json"], "hpcssl-submit") == 0
assert not {{"torch", "matplotlib", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_slurm_itself_answers_as_for_a_single_job(cluster, make_stub_run):
    """The format of squeue's answer, on a real cluster."""
    from slurm.backend import batch_script
    from slurm.backend.profiles import Profile

    run = make_stub_run(steps=100_000)
    options = {"ntasks": "1", "cpus-per-task": "1", "mem": "0", "time": "10"}
    parent = batch_script.submit(run, "train", options, Profile())
    batch_script.submit(run, "knn", options | {"dependency": f"afterok:{parent}"}, Profile())
    try:
        cluster.wait_until(lambda: status.query_run(run).state == "RUNNING", "start of the job")
        (together,) = status.query_runs([run])
        alone = status.query_run(run)
        assert (together.state, together.evals) == (alone.state, alone.evals)
        jobs = job_log.latest_jobs(run)
        snapshot = QueueSnapshot(jobs.values())
        assert all(snapshot.query(job).owner.token == job.token != "" for job in jobs.values())
        assert [snapshot.query(job).name for job in jobs.values()] == ["RUNNING", "PENDING"]
    finally:
        cluster("scancel", *[job.id for job in job_log.latest_jobs(run).values()])
