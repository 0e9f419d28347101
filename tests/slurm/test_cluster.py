"""On a real SLURM of two nodes with two tasks each: preemption, time limits, crashes, cancels and dependent jobs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loopback
from hpcssl.errors import SubmitError
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from slurm import submit
from slurm.backend import batch_script, processes, reasons, scheduler
from slurm.backend.profiles import Profile
from slurm.log import attempts, job_log, retry
from slurm.manage import control, evaluations, status, wait
from tests.slurm.job_runner import JOB_TIMEOUT_S, skip_requeue_delay
from tests.slurm.stubs import change_settings

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

ENDLESS = 100_000
FOUR_TASKS = {"nodes": "2", "ntasks-per-node": "2"}
OVERRIDES = [
    "optim.batch=64",
    "bank.size=128",
    "schedule.steps=90",
    "machine.log_steps=1",
    "machine.devices=cpu",
    "machine.checkpoint_steps=7",
    "evals.linear.epochs=1",
]


def run_module(*words):
    """Run ``python -m``, and return its standard output."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_causes(run):
    return [attempt.cause for attempt in attempts.read_attempts(run)]


def read_digest(run):
    """Digest of the last checkpoint, by the command."""
    return run_module("hpcssl", "digest", "--run", str(run.root))


def wait_until(cluster, condition, message, job=None):
    """Wait until a condition holds, and meanwhile start a requeued job without SLURM's delay."""

    def poll():
        if job is not None:
            skip_requeue_delay(cluster, job)
        return condition()

    cluster.wait_until(poll, message, JOB_TIMEOUT_S)


def wait_for_step(cluster, run, step, job=None):
    wait_until(cluster, lambda: attempts.last_known_step(run) >= step, f"step {step}", job)


def wait_for_state(cluster, job, state="COMPLETED"):
    """Wait until a job has a state, however often it is requeued before."""
    wait_until(cluster, lambda: cluster.field(job, "JobState") == state, f"job {job} {state}", job)


def find_tasks(job):
    tasks = map(processes.read_process, loopback.find_task_pids(job).values())
    return [task for task in tasks if task is not None]


def is_pending_or_gone(task, number):
    """Whether a signal is pending for a process, or the process has ended."""
    if processes.read_process(task.pid) is None:
        return True
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{task.pid}/status").read_text().splitlines())
    return bool(int(lines["ShdPnd"], 16) & 1 << (number - 1))


def submit_preemptor(cluster):
    """Submit a job that preempts every job of the other partitions, and ends at once."""
    cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")


def set_time_limit(cluster, job, minutes):
    cluster("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")


# -- the real trainer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_command(digits):
    """``make_command(run, *words)``: the words that submit the same small training."""

    def make(run, *words):
        data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
        size = ["-N2", "--ntasks-per-node=2"]
        return ["slurm", "digits_msf", "--run", str(run.root), *size, *words, *OVERRIDES, *data]

    return make


@pytest.fixture(scope="module")
def submit_training(cluster, make_command, tmp_path_factory):
    """``submit_training(*words)`` submits the training: its run folder, and ids of its jobs by name."""

    def submit_run(*words):
        run = RunDir(tmp_path_factory.mktemp("runs") / "run")
        out = run_module(*make_command(run, *words))
        jobs = job_log.latest_jobs(run)
        assert out.splitlines()[0] == f"Submitted batch job {jobs['train'].id}"
        return run, {what: job.id for what, job in jobs.items()}

    return submit_run


@pytest.fixture(scope="module")
def undisturbed(submit_training):
    """The same training, submitted once, which nothing disturbs."""
    return submit_training("--time", "10")


@pytest.mark.full
def test_the_time_limit_does_not_change_the_result(cluster, submit_training, undisturbed):
    run, jobs = submit_training("--time", "10")
    job = jobs["train"]
    wait_for_step(cluster, run, 3)
    tasks = find_tasks(job)
    assert len(tasks) == 4
    # stopped until SLURM's warning has come, whose time is SLURM's choice; it may send CONT itself
    processes.send_signals(tasks, signal.SIGSTOP)
    hours, minutes, _ = map(int, cluster.field(job, "RunTime").split(":"))
    set_time_limit(cluster, job, 60 * hours + minutes + 2)  # for this attempt: the next one may need longer to start
    wait_until(cluster, lambda: all(is_pending_or_gone(task, signal.SIGUSR2) for task in tasks), "time limit's warning")
    processes.send_signals(tasks, signal.SIGCONT)
    wait_until(cluster, lambda: read_causes(run)[0], "end of attempt 1")
    set_time_limit(cluster, job, 10)
    wait_for_state(cluster, job)
    assert read_causes(run) == ["timeout", "done"]
    assert attempts.read_attempts(run)[0].error == "SIGUSR2"
    wait_for_state(cluster, undisturbed[1]["train"])
    assert read_digest(run) == read_digest(undisturbed[0])


def test_a_preemption_does_not_change_the_result_and_evaluations_run_once(
    cluster, submit_training, undisturbed, make_command
):
    words = ["--time", "10", "--evals", "knn:k=1+20,linear", "--eval-every", "4"]  # the fourth epoch ends at step 88
    run, jobs = submit_training(*words)
    names = jobs.keys() - {"train"}
    assert names == {"knn:k=[1,20]", "linear"}
    wait_for_step(cluster, run, 5)
    # stopped until the preemption, which sends CONT before TERM: a fast machine would finish before it
    processes.send_signals(find_tasks(jobs["train"]), signal.SIGSTOP)
    wait_for_state(cluster, undisturbed[1]["train"])  # it would be preempted as well
    assert read_causes(undisturbed[0]) == ["done"]
    submit_preemptor(cluster)
    wait_until(cluster, lambda: cluster.field(jobs["train"], "Restarts") == "1", "requeue")
    for name in names:
        assert cluster.field(jobs[name], "JobState") == "PENDING"
    wait_for_state(cluster, jobs["train"])
    assert wait.wait_for_jobs(run, lambda text: None) == 0
    assert read_causes(run) == ["preempted", "done"]
    assert attempts.read_attempts(run)[0].error == "SIGTERM"
    assert cluster.field(jobs["train"], "Restarts") == "1"
    for name in names:
        assert [attempt.cause for attempt in attempts.read_attempts(run, name)] == ["done"]
        assert sorted(row["step"] for row in read_lines(run.eval_rows(name.partition(":")[0]))) == [0, 88, 90]
    assert read_digest(run) == read_digest(undisturbed[0])
    line = run_module("slurm", "status", str(run.root)).strip()
    assert "\n" not in line
    fields = [f"job={jobs['train']}", "state=COMPLETED", "attempt=2", "step=90/90"]
    assert {*fields, f"linear=COMPLETED job {jobs['linear']}"} <= set(line.split("\t"))
    before = run.jobs.read_text()
    assert run_module(*make_command(run, *words)) == "", "a finished run gets no new job"
    assert run.jobs.read_text() == before


# -- the stubs ------------------------------------------------------------------------------------------------------


def submit_stubs(run):
    """Submit the stub trainer on four ranks, and an evaluation that depends on it; the ids of both jobs."""
    parent = batch_script.submit(run, "train", FOUR_TASKS, Profile())
    return parent, batch_script.submit(run, "knn", {"dependency": f"afterok:{parent}"}, Profile())


def test_the_commands_preempt_and_cancel(cluster, make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    job, child = submit_stubs(run)
    assert [active.what for active in control.active_jobs(run)] == ["train", "knn"]
    wait_for_step(cluster, run, 5)
    assert job in control.preempt(run)
    wait_until(cluster, lambda: len(read_causes(run)) == 2 and attempts.last_known_step(run) >= 60, "attempt 2", job)
    ranks = read_lines(run.root / "ranks.jsonl")
    assert len({rank["MASTER_PORT"] for rank in ranks}) == len({rank["HPCSSL_TOKEN"] for rank in ranks}) == 2
    assert sorted(rank["RANK"] for rank in ranks if rank["attempt"] == 2) == ["0", "1", "2", "3"]
    assert control.cancel(run) == [job, child]
    wait_for_state(cluster, job, "CANCELLED")
    assert read_causes(run) == ["preempted", "cancelled"]
    assert [line["refused"] is None for line in read_lines(run.root / "requeues.jsonl")] == [True, False]


def test_a_job_that_scancel_cancelled_is_not_requeued(cluster, make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    job, child = submit_stubs(run)
    wait_for_step(cluster, run, 5)
    cluster("scancel", job)
    wait_for_state(cluster, job, "CANCELLED")
    wait_for_state(cluster, child, "CANCELLED")
    assert read_causes(run) == ["cancelled"]
    report = status.query_run(run)
    assert report.last_end.startswith("cancelled") and "last=cancelled" in report.line()
    assert [line["refused"] is None for line in read_lines(run.root / "requeues.jsonl")] == [False]
    assert reasons.HINTS["dependencyneversatisfied"].format(job=child) in report.hint
    assert not control.active_jobs(run)


def test_a_crash_is_followed_by_an_attempt_in_the_same_allocation(cluster, make_stub_run):
    """The job is not requeued, and the evaluation behind it waits for the last attempt."""
    run = make_stub_run(steps=60, hold_at=50)
    job, child = submit_stubs(run)
    wait_for_step(cluster, run, 5)
    os.kill(loopback.find_task_pids(job)[0], signal.SIGKILL)
    wait_until(cluster, lambda: read_causes(run)[0], "end of attempt 1")
    change_settings(run, hold_at=None)
    wait_for_state(cluster, job)
    wait_for_state(cluster, child)
    assert read_causes(run) == ["killed", "done"]
    assert [(a.job, a.restart, a.launch) for a in attempts.read_attempts(run)] == [(job, 0, 0), (job, 0, 1)]
    assert cluster.field(job, "Restarts") == "0"
    tokens = {rank["HPCSSL_TOKEN"] for rank in read_lines(run.root / "ranks.jsonl")}
    assert len(tokens) == 2, "a rank that is left over from the first attempt must not join the second"
    assert len(read_lines(run.eval_rows("knn"))) == 1


def test_two_crashes_at_one_step_fail_the_job_and_the_jobs_that_depend_on_it(cluster, make_stub_run):
    run = make_stub_run(crash_at=5, crash_rank=0)
    job, child = submit_stubs(run)
    wait_for_state(cluster, job, "FAILED")
    wait_for_state(cluster, child, "CANCELLED")
    assert read_causes(run) == ["error", "error"]
    decision = retry.decide_retry(attempts.read_attempts(run))
    assert not decision.retry and decision.reason in status.query_run(run).hint
    assert wait.wait_for_jobs(run, lambda text: None) == 1
    assert not run.eval_rows("knn").exists()


def test_a_job_that_its_partition_cancels_to_preempt_it_continues(cluster, make_stub_run):
    """Concurrent evaluations are submitted from inside the job, in whichever attempt it is."""
    run = make_stub_run(steps=150, step_s=0.05, export=[10, 80], hold_at=60)
    module = run.code / "slurm" / "job" / "concurrent_evals.py"
    assert "POLL_S = 5.0" in module.read_text()
    module.write_text(module.read_text().replace("POLL_S = 5.0", "POLL_S = 0.2"))
    entries = {"knn": {"every": 10, "sbatch": {"nice": "1"}}}
    evaluations.write_plan(run, entries, last=150, kind="slurm", profile=Profile(python=sys.executable))
    job = batch_script.submit(run, "train", FOUR_TASKS | {"partition": "cancel"}, Profile())
    child = batch_script.submit(run, "knn", {"dependency": f"afterok:{job}"}, Profile())
    wait_until(cluster, lambda: "knn@10" in job_log.latest_jobs(run), "concurrent evaluation")
    submit_preemptor(cluster)
    wait_until(cluster, lambda: read_causes(run)[0], "end of attempt 1")
    change_settings(run, hold_at=None)
    wait_for_state(cluster, job)
    wait_for_state(cluster, child)
    assert read_causes(run) == ["preempted", "done"]
    assert cluster.field(job, "Restarts") == "1"
    for what in ("knn@10", "knn@80"):
        wait_for_state(cluster, job_log.latest_jobs(run)[what].id)
    assert status.query_run(run).evals["knn@*"] == "2 COMPLETED"
    assert sorted(row["eval"] for row in read_lines(run.eval_rows("knn"))) == ["knn", "knn@10", "knn@80"]


def test_a_refusal_by_sbatch_cancels_the_other_jobs_of_the_submission(cluster, make_stub_run):
    run = make_stub_run()
    with pytest.raises(SubmitError) as caught:
        submit._submit_to_slurm(run, {"train": {"time": "1"}, "knn": {"partition": "nowhere"}}, Profile())
    assert caught.value.what == "sbatch" and "partition" in caught.value.got and caught.value.fix
    job = job_log.latest_jobs(run)["train"].id
    wait_until(cluster, lambda: not scheduler.query_job(job).is_active, "cancel of the first job")


def test_variables_of_the_surrounding_job_do_not_reach_the_new_one(cluster, make_stub_run, monkeypatch):
    """A submission from inside another job, whose sizes would otherwise become those of the new one."""
    outside = {"SLURM_NTASKS": "9", "SLURM_JOB_ID": "99", "SLURM_PROCID": "3", "RANK": "5", "WORLD_SIZE": "9"}
    for name, value in outside.items():
        monkeypatch.setenv(name, value)
    run = make_stub_run()
    job = batch_script.submit(run, "train", {"ntasks-per-node": "2", "export": "NONE"}, Profile())
    wait_for_state(cluster, job)
    assert {rank["WORLD_SIZE"] for rank in read_lines(run.root / "ranks.jsonl")} == {"2"}
    assert os.environ["SLURM_NTASKS"] == "9"
