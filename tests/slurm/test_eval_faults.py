"""Evaluation jobs that end in each of their states, and many submissions at once, on a real SLURM."""

from __future__ import annotations

import os
import signal

import pytest

from hpcssl import cli_runner
from hpcssl.files import atomic_write, read_lines
from hpcssl.run_dir import RunDir
from slurm import cli
from slurm.backend import batch_script, scheduler
from slurm.backend.profiles import Profile
from slurm.log import attempts, job_log
from tests.slurm.stubs import change_settings

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
full = pytest.mark.full
EVALUATION = "knn"


def submit_evaluation(run, **options):
    """Submit the evaluation of a finished training; its job id."""
    atomic_write(run.done, '{"step": 30, "weights": ""}')
    return batch_script.submit(run, EVALUATION, options, Profile())


def read_causes(run):
    """Causes of the attempts of the evaluation."""
    return [attempt.cause for attempt in attempts.read_attempts(run, EVALUATION)]


@pytest.mark.parametrize(
    ("place", "number", "causes"),
    [
        ("row", signal.SIGKILL, ["killed", "done"]),
        ("middle", signal.SIGTERM, ["stopped", "done"]),
        pytest.param("start", signal.SIGKILL, ["killed", "done"], marks=full),
        pytest.param("middle", signal.SIGKILL, ["killed", "done"], marks=full),
        pytest.param("start", signal.SIGTERM, ["stopped", "done"], marks=full),
        pytest.param("row", signal.SIGTERM, ["done"], marks=full),  # nothing is left to do
    ],
)
def test_an_evaluation_that_ends_in_any_state_has_one_row_in_the_end(
    slurm_runner, make_stub_run, place, number, causes
):
    run = make_stub_run(hold_evaluation=place)
    slurm_runner.run, slurm_runner.job = run, submit_evaluation(run)
    slurm_runner.wait_until(lambda: (run.root / f"held-{place}").exists() and slurm_runner.tasks, "evaluation")
    slurm_runner.signal(0, number)
    change_settings(run, hold_evaluation=None)
    slurm_runner.wait_until(lambda: not scheduler.query_job(slurm_runner.job).is_active, "end")
    assert read_causes(run) == causes
    assert [row["eval"] for row in read_lines(run.eval_rows(EVALUATION))] == [EVALUATION]


def test_an_evaluation_that_is_cancelled_in_the_queue_can_be_submitted_again(slurm_runner, make_stub_run):
    run, cluster = make_stub_run(), slurm_runner.cluster
    first = submit_evaluation(run, begin="now+1hour")
    cluster("scancel", first)
    cluster.wait_until(lambda: not scheduler.query_job(first).is_active, "cancelled job")
    slurm_runner.run, slurm_runner.job = run, submit_evaluation(run)
    slurm_runner.wait_until(lambda: not scheduler.query_job(slurm_runner.job).is_active, "end")
    assert slurm_runner.job != first and read_causes(run) == ["done"]
    assert len(read_lines(run.eval_rows(EVALUATION))) == 1


@pytest.mark.parametrize("submissions", [4, pytest.param(30, marks=full)])
def test_many_submissions_at_once_submit_one_job(cluster, shards, tmp_path, submissions):
    run, before = RunDir(tmp_path / "run"), set(cluster("squeue", "-h", "-o", "%i").split())
    options = ["--begin=now+1hour", "-N1", "--ntasks-per-node=1"]
    words = ["digits_msf", "--run", str(run.root), *options, f"data.train={shards.root}", "optim.batch=8"]
    children = [fork_command(words) for _ in range(submissions)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    queued = set(cluster("squeue", "-h", "-o", "%i").split()) - before
    cluster("scancel", *queued)
    assert codes == [0] * submissions
    assert [job.id for job in job_log.all_jobs(run)] == list(queued) and len(queued) == 1


def fork_command(words):
    """Run ``hpcssl-submit`` with these arguments in a child of this process; its process id."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            code = cli_runner.run(cli.app, words, "hpcssl-submit")
        finally:
            os._exit(code)
    return pid
