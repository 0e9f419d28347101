"""Local jobs: real processes and signals, the supervisor in place of SLURM, and the stub trainer."""

import os
import signal

import pytest

from hpcssl.errors import EXIT_STOPPED, SubmitError
from hpcssl.files import read_lines
from slurm.backend import local, processes, scheduler
from slurm.log import attempts, job_log, retry
from slurm.manage import control, status, wait
from tests.printed import numbers_in
from tests.slurm.stubs import CRASH_MESSAGE, change_settings
from tests.waiting import wait_until

ENDLESS = 100_000


def launch(run, evals=(), **sbatch):
    """Start a supervisor for a training of two tasks and for evaluations; the training's job."""
    options = {"train": {"ntasks-per-node": "2", **sbatch}} | {name: {"nodes": "1"} for name in evals}
    return local.launch(run, options)[0]


def wait_for_jobs(run):
    """Wait for all jobs of the run, and return the exit code."""
    return wait.wait_for_jobs(run, lambda text: None)


def wait_for_step(run, step):
    wait_until(lambda: attempts.last_known_step(run) >= step, f"step {step}", pause=0.05)


def find_task_pids(run, job):
    return [task.pid for task in processes.find_tasks(local.find_supervisor(run, job)["pid"])]


def read_causes(run):
    return [attempt.cause for attempt in attempts.read_attempts(run)]


def test_each_evaluation_runs_once_after_the_training(make_stub_run):
    run = make_stub_run()
    job = launch(run, ["knn", "linear"])
    assert local.query_job(run, job).is_active
    assert wait_for_jobs(run) == 0
    assert read_causes(run) == ["done"]
    for name in ("knn", "linear"):
        assert read_lines(run.eval_rows(name)) == [{"eval": name, "trained": True}]
    ranks = read_lines(run.root / "ranks.jsonl")
    assert sorted(rank["RANK"] for rank in ranks) == sorted(rank["LOCAL_RANK"] for rank in ranks) == ["0", "1"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"2"}
    assert len({(rank["MASTER_PORT"], rank["HPCSSL_TOKEN"]) for rank in ranks}) == 1
    supervisor = local.find_supervisor(run, job)["pid"]
    wait_until(lambda: not processes.find_session_members(supervisor), "end of all processes", pause=0.05)


def test_a_training_that_is_preempted_three_times_continues_by_itself(make_stub_run):
    run = make_stub_run(steps=120, hold_at=100)
    job = launch(run, ["knn"])
    for number in (1, 2, 3):
        wait_until(
            lambda n=number: len(read_causes(run)) == n and attempts.last_known_step(run) >= n * 25,
            f"attempt {number}",
            pause=0.05,
        )
        message = control.preempt(run)
        assert job.id in message and 2 in numbers_in(message.replace(job.id, "")), "both tasks got the signals"
    wait_until(lambda: read_causes(run)[2:3] == ["preempted"], "end of attempt 3", pause=0.05)
    change_settings(run, hold_at=None)
    assert wait_for_jobs(run) == 0
    assert read_causes(run) == ["preempted", "preempted", "preempted", "done"]
    last_steps = [attempt.last_step for attempt in attempts.read_attempts(run)]
    assert [attempt.first_step for attempt in attempts.read_attempts(run)] == [0, *last_steps[:3]]
    ranks = read_lines(run.root / "ranks.jsonl")
    assert len({rank["HPCSSL_TOKEN"] for rank in ranks}) == len({rank["MASTER_PORT"] for rank in ranks}) == 4
    assert len(read_lines(run.eval_rows("knn"))) == 1
    assert {line["refused"] for line in read_lines(run.root / "requeues.jsonl")} == {None}
    report = status.query_run(run)
    assert (report.last_end, report.job) == ("done", job.id)
    assert "last=done" in report.line() and job.id in report.line()


def test_a_signal_during_the_start_of_a_task_waits_for_its_handlers(make_stub_run):
    run = make_stub_run()
    task, go = run.code / "slurm" / "job" / "task.py", run.root / "go"
    pause = f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.02)\n"
    task.write_text(pause + task.read_text().replace("from __future__", "# from __future__"))
    job = launch(run)
    wait_until(lambda: len(find_task_pids(run, job)) == 2, "two tasks", pause=0.05)
    control.preempt(run)
    go.touch()
    assert wait_for_jobs(run) == 0
    assert read_causes(run) == ["preempted", "done"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_task_ends_the_attempt_as_one_crash(make_stub_run, rank):
    run = make_stub_run(steps=60, hold_at=50)
    runner = run.code / "slurm" / "job" / "attempt_runner.py"
    assert "CRASH_WAIT_S = 5.0" in runner.read_text()
    runner.write_text(runner.read_text().replace("CRASH_WAIT_S = 5.0", "CRASH_WAIT_S = 0.3"))
    job = launch(run)
    wait_for_step(run, 10)
    ranks = {processes.read_environment(pid)["SUBMITIT_LOCAL_GLOBALID"]: pid for pid in find_task_pids(run, job)}
    os.kill(ranks[str(rank)], signal.SIGKILL)
    wait_until(lambda: read_causes(run)[0], "end of attempt 1", pause=0.05)
    change_settings(run, hold_at=None)
    assert wait_for_jobs(run) == 0
    assert read_causes(run) == ["killed", "done"]
    assert f"rank {rank} " in attempts.read_attempts(run)[0].error


def test_two_crashes_at_one_step_fail_the_job_and_its_evaluations(make_stub_run):
    run = make_stub_run(crash_at=5)
    launch(run, ["knn"])
    lines = []
    assert wait.wait_for_jobs(run, lines.append) == 1
    assert read_causes(run) == ["error", "error"]
    report = status.query_run(run)
    decision = retry.decide_retry(attempts.read_attempts(run))
    assert not decision.retry
    assert report.state.startswith("FAILED") and decision.reason in report.state
    assert CRASH_MESSAGE in report.hint
    assert "DependencyNeverSatisfied" in report.evals["knn"]
    assert not run.eval_rows("knn").exists()
    assert any(numbers_in(line)[:2] == [2, 0] for line in lines), "attempt 2 starts at step 0"


def test_cancel_saves_the_state_and_ends_all_jobs(make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    job = launch(run, ["knn"])
    wait_for_step(run, 5)
    assert control.cancel(run) == [job.id, f"{job.id}.knn"]
    assert wait_for_jobs(run) == EXIT_STOPPED
    assert read_causes(run) == ["cancelled"]
    assert int((run.root / "state-0").read_text()) == attempts.read_attempts(run)[0].last_step
    assert [line["refused"] is None for line in read_lines(run.root / "requeues.jsonl")] == [False]
    assert local.query_job(run, job).name == "CANCELLED"
    assert status.query_run(run).evals["knn"].startswith("CANCELLED")
    assert control.active_jobs(run) == []


@pytest.mark.parametrize("command", [control.cancel, control.preempt])
def test_cancel_and_preempt_are_refused_without_an_active_job(make_stub_run, command):
    run = make_stub_run(steps=3)
    launch(run)
    assert wait_for_jobs(run) == 0
    with pytest.raises(SubmitError) as caught:
        command(run)
    assert caught.value.what == f"run {run.root}"
    assert f"status {run.root}" in caught.value.fix


def test_the_time_limit_stops_an_attempt_and_is_no_crash(make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    launch(run, time="0:30", signal="USR2@24")  # six seconds to start, and 24 to leave
    wait_until(lambda: "timeout" in read_causes(run), "time limit", pause=0.05)
    change_settings(run, steps=1)
    assert wait_for_jobs(run) == 0
    assert set(read_causes(run)[:-1]) == {"timeout"}
    assert read_causes(run)[-1] == "done"
    assert {attempt.error for attempt in attempts.read_attempts(run)[:-1]} == {"SIGUSR2"}


def test_a_job_whose_supervisor_was_killed_is_lost_and_can_be_submitted_again(make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    job = launch(run)
    wait_for_step(run, 5)
    supervisor = local.find_supervisor(run, job)["pid"]
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    report = status.query_run(run)
    assert report.state == "RUNNING" and f"cancel {run.root}" in report.hint, "the tasks still run"
    control.cancel(run)
    state = local.query_job(run, job)
    assert (state.name, state.is_active) == (local.LOST, False)
    assert state.hint
    change_settings(run, steps=12)
    second = launch(run)
    assert second.id != job.id
    assert wait_for_jobs(run) == 0
    assert read_causes(run)[-1] == "done"


def test_logs_are_those_of_the_newest_attempt(make_stub_run):
    run = make_stub_run(crash_at=5)
    launch(run)
    wait_for_jobs(run)
    lines = []
    for path in control.find_logs(run, "train", 0):
        control.print_tail(path, 40, lines.append)
    assert any(f"RuntimeError: {CRASH_MESSAGE}" in line for line in lines)
    events = job_log.read_events(run, "controller", job_log.latest_jobs(run)["train"].id)
    assert len({event["logs"] for event in events}) == 2
    assert {path.name.partition("_")[0] for path in control.find_logs(run, "train", 0)} == {events[-1]["logs"]}
    with pytest.raises(SubmitError) as caught:
        control.find_logs(run, "knn", 0)
    assert caught.value.what == f"log of knn, rank 0, in {run.logs}"


def test_a_log_that_grows_is_printed_in_whole_lines_once(tmp_path):
    path, lines = tmp_path / "log", []
    path.write_text("one\ntwo\nthr")
    position = control.print_new_lines(path, 0, lines.append)
    path.write_text("one\ntwo\nthree\n")
    control.print_new_lines(path, position, lines.append)
    assert lines == ["one", "two", "three"]


def test_tasks_get_as_many_gpus_of_the_shell_as_they_request(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.select_gpus({}) == "all"
    assert local.select_gpus({"gpus-per-node": "2"}) == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert local.select_gpus({}) == "GPU-a,GPU-b,GPU-c"
    assert local.select_gpus({"gres": "gpu:2"}) == "GPU-a,GPU-b"


def test_the_state_of_a_job_that_slurm_has_forgotten_is_read_from_the_run_folder(make_stub_run, monkeypatch):
    run = make_stub_run()
    job = job_log.Job("12", "train", "slurm", {})
    gone = scheduler.JobState(scheduler.GONE)
    monkeypatch.setattr(scheduler, "query_job_or_unknown", lambda job, cluster=None: gone)
    assert status.query_job(run, job).name == scheduler.GONE
    run.done.write_text('{"step": 3}')
    assert status.query_job(run, job).name == "COMPLETED"
