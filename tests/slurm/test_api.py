"""``hpcssl.submit``: from Python to jobs on this machine, and the options of sbatch as a dict."""

from __future__ import annotations

import os
import signal

import pytest

import hpcssl
from hpcssl.errors import ConfigError, Stopped, SubmitError
from hpcssl.run_dir import RunDir
from slurm import api
from slurm.backend import local

TINY = {"machine.devices": "cpu", "views.size": 16, "optim.batch": 8, "schedule.steps": 2, "bank.size": 16}


def test_a_local_submission_is_cancelled_and_continued_to_the_digest_of_a_call(shards, tmp_path):
    values = TINY | {"data": {"train": shards.root}}
    submission = {"run": tmp_path / "jobs", "local": True, "sbatch": {"ntasks-per-node": 1}}
    first = hpcssl.submit("digits_msf", **submission, **values)
    assert first.is_new and [job.what for job in first.jobs] == ["train"] and first.ids == [first.jobs[0].id]
    supervisor = local.find_supervisor(RunDir(submission["run"]), first.jobs[0])["pid"]
    os.kill(supervisor, signal.SIGSTOP)  # it must not be finished, however long the next line takes
    assert hpcssl.submit("digits_msf", **submission, **values).ids == first.ids, "found again, not submitted twice"
    os.kill(supervisor, signal.SIGCONT)
    assert first.cancel() == first.ids
    with pytest.raises(Stopped):
        first.wait()
    assert first.wait(check=False) == Stopped.exit_code
    lines: list[str] = []
    second = hpcssl.submit("digits_msf", **submission, **values)
    assert second.is_new and second.wait(write=lines.append) == 0 and lines
    assert second.status().state == "COMPLETED" and second.run.finished
    assert second.run.digest == hpcssl.train("digits_msf", run=tmp_path / "call", **values).digest
    done = hpcssl.submit("digits_msf", **submission, **values)
    assert not done.is_new and done.ids == [] and done.wait() == 0
    with pytest.raises(SubmitError):
        done.cancel()


def test_options_of_sbatch_are_those_of_the_command_line():
    options = api._parse_sbatch({"nodes": 2, "gpus_per_node": 8, "--time": "2-0", "exclusive": True, "qos": None})
    assert options == {"nodes": "2", "gpus-per-node": "8", "time": "2-0", "exclusive": True}
    by_name = api._parse_eval_sbatch({"time": 30, "detect": {"gpus-per-node": 8}})
    assert by_name == {"": {"time": "30"}, "detect": {"gpus-per-node": "8"}}
    assert api._parse_eval_sbatch({}) == {}


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"sbatch": {"gpus-per-nod": 1}}, "--gpus-per-node"),
        ({"sbatch": {"run": "x"}}, "argument"),
        ({"evals": ["knm"]}, "knn"),
        ({"optim.lrr": 1}, "'lr'"),
        ({"cluster": "nowhere"}, "yaml"),
    ],
)
def test_mistakes_are_refused_before_a_job_exists(wrong, word, shards, tmp_path):
    with pytest.raises(ConfigError) as caught:
        hpcssl.submit(
            "digits_msf", **{"run": tmp_path / "run", "local": True, "data.train": shards.root} | TINY | wrong
        )
    assert word in caught.value.fix and not (tmp_path / "run").exists()
