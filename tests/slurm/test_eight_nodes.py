"""A training on eight nodes with two tasks each, preempted and resumed, has the result of an undisturbed one."""

import pytest

from benchmarks import loopback
from hpcssl.run_dir import RunDir
from slurm.log import attempts, job_log
from tests.slurm.job_runner import skip_requeue_delay
from tests.slurm.test_cluster import OVERRIDES, find_tasks, read_causes, read_digest, run_module

pytestmark = [pytest.mark.slurm, pytest.mark.full, pytest.mark.timeout(3600)]

NODES, TASKS = 8, 2
PATIENCE_S = 1700
"""Sixteen processes import torch and take turns on the cores of this machine."""


@pytest.fixture(scope="module")
def large_cluster(tmp_path_factory):
    if reason := loopback.explain_unavailable():
        pytest.skip(reason)
    with loopback.running_cluster(tmp_path_factory.mktemp("large"), NODES) as started:
        yield started


def submit(root, digits):
    run = RunDir(root)
    words = ["slurm", "digits_msf", "--run", str(root), f"-N{NODES}", f"--ntasks-per-node={TASKS}", "--time", "60"]
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    # a step waits for the slowest of sixteen processes, and each sharded exchange for all of them
    more = ["schedule.steps=24", "bank.placement=sharded", "machine.hang_minutes=20", "machine.timeout_minutes=25"]
    run_module(*words, *OVERRIDES, *more, *data)
    return run, job_log.latest_jobs(run)["train"].id


def wait_for_end(cluster, job):
    def has_ended():
        skip_requeue_delay(cluster, job)
        return cluster.field(job, "JobState") == "COMPLETED"

    cluster.wait_until(has_ended, f"end of job {job}", PATIENCE_S)


def test_eight_nodes_resume_after_a_preemption_with_an_equal_digest(large_cluster, digits, tmp_path):
    cluster = large_cluster
    whole, job = submit(tmp_path / "whole", digits)
    wait_for_end(cluster, job)
    run, job = submit(tmp_path / "preempted", digits)
    cluster.wait_until(lambda: attempts.last_known_step(run) >= 9, "step 9", PATIENCE_S)
    assert len(find_tasks(job)) == NODES * TASKS
    cluster("sbatch", "-p", "high", f"-N{NODES}", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    cluster.wait_until(lambda: cluster.field(job, "Restarts") == "1", "requeue", PATIENCE_S)
    wait_for_end(cluster, job)
    assert read_causes(whole) == ["done"] and read_causes(run) == ["preempted", "done"]
    first, second = attempts.read_attempts(run)
    assert 0 < first.last_step < 24 and second.last_step == 24
    assert read_digest(run) == read_digest(whole)
