"""The state machine without SLURM: real processes and real signals, a trainer that takes no time."""

import json
import os
import signal

import pytest

from hpcssl.errors import SubmitError
from hpcssl.files import read_lines
from slurm import attempts, control, local, procs, records, sched, watch

TWO = {"ntasks-per-node": "2"}


def launch(run, evals=(), **more):
    sbatch = TWO | more
    wanted = {"train": sbatch} | {name: {"nodes": "1"} for name in evals}
    return local.launch(run, wanted)[0]


def training(run, step):
    return lambda: attempts.reached(run) >= step


def task_pids(run, job):
    return [p.pid for p in procs.tasks(local.supervisor(run, job)["pid"])]


def causes(run):
    return [a.cause for a in attempts.history(run)]


def test_training_then_each_evaluation_once(stand_in, until):
    run = stand_in()
    job = launch(run, ["knn", "linear"])
    assert local.ask(run, job).live
    assert watch.wait(run, lambda text: None) == 0
    assert causes(run) == ["done"]
    for name in ("knn", "linear"):
        assert read_lines(run.eval_rows(name)) == [{"eval": name, "trained": True}]
    places = read_lines(run.root / "places.jsonl")
    assert sorted(p["RANK"] for p in places) == sorted(p["LOCAL_RANK"] for p in places) == ["0", "1"]
    assert {p["WORLD_SIZE"] for p in places} == {"2"}
    assert len({(p["MASTER_PORT"], p["HPCSSL_TOKEN"]) for p in places}) == 1
    until(lambda: not procs.session(local.supervisor(run, job)["pid"]), "end of all processes")


def test_preempted_three_times_it_goes_on_by_itself(stand_in, until):
    run = stand_in(steps=120)
    job = launch(run, ["knn"])
    for attempt in (1, 2, 3):
        until(lambda n=attempt: len(causes(run)) == n and attempts.reached(run) >= n * 25, f"attempt {attempt}")
        assert "2 tasks" in control.preempt(run)
    assert watch.wait(run, lambda text: None) == 0
    assert causes(run) == ["preempted", "preempted", "preempted", "done"]
    last = [a.last_step for a in attempts.history(run)]
    assert [a.first_step for a in attempts.history(run)] == [0, *last[:3]]
    places = read_lines(run.root / "places.jsonl")
    assert len({p["HPCSSL_TOKEN"] for p in places}) == len({p["MASTER_PORT"] for p in places}) == 4
    assert len(read_lines(run.eval_rows("knn"))) == 1
    assert {x["answer"] for x in read_lines(run.root / "answers.jsonl")} == {None}
    assert "last=done" in watch.report(run).line()
    assert job.job in watch.report(run).line()


def test_a_signal_during_start_up_waits_for_the_handlers(stand_in, until):
    run = stand_in()
    slow = run.code / "slurm" / "job.py"
    slow.write_text("import time\ntime.sleep(1)\n" + slow.read_text().replace("from __future__", "# from __future__"))
    job = launch(run)
    until(lambda: len(task_pids(run, job)) == 2, "two tasks")
    control.preempt(run)
    assert watch.wait(run, lambda text: None) == 0
    assert causes(run) == ["preempted", "done"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_task_ends_the_attempt_and_costs_one_crash(stand_in, until, rank):
    run = stand_in(steps=60)
    (run.code / "slurm" / "supervise.py").write_text(
        (run.code / "slurm" / "supervise.py").read_text().replace("CRASH_WAIT_S = 5.0", "CRASH_WAIT_S = 0.3"))
    job = launch(run)
    until(training(run, 10), "step 10")
    victim = [p for p in task_pids(run, job) if procs.environment(p)["SUBMITIT_LOCAL_GLOBALID"] == str(rank)]
    os.kill(victim[0], signal.SIGKILL)
    assert watch.wait(run, lambda text: None) == 0
    assert causes(run) == ["killed", "done"]
    assert f"rank {rank} died" in attempts.history(run)[0].error


def test_two_crashes_at_the_same_step_end_the_run_with_the_cause(stand_in):
    run = stand_in(crash_at=5)
    launch(run, ["knn"])
    said = []
    assert watch.wait(run, said.append) == 1
    assert causes(run) == ["error", "error"]
    report = watch.report(run)
    assert report.state.startswith("FAILED (two crashes in a row at the same step")
    assert "the stand-in was told to crash" in report.note
    assert "DependencyNeverSatisfied" in report.evals["knn"]
    assert not run.eval_rows("knn").exists()
    assert any("attempt 2 starts at step 0" in line for line in said)


def test_cancel_saves_and_nothing_starts_again(stand_in, until):
    run = stand_in(steps=10_000)
    job = launch(run, ["knn"])
    until(training(run, 5), "step 5")
    assert control.cancel(run) == [job.job, f"{job.job}.knn"]
    assert watch.wait(run, lambda text: None) == 75
    assert causes(run) == ["cancelled"]
    assert int((run.root / "state-0").read_text()) == attempts.history(run)[0].last_step
    assert read_lines(run.root / "answers.jsonl") == [{"answer": "the job was cancelled"}]
    assert local.ask(run, job).name == "CANCELLED"
    assert watch.report(run).evals["knn"].startswith("CANCELLED")
    with pytest.raises(SubmitError, match="no job in the queue"):
        control.cancel(run)
    with pytest.raises(SubmitError, match="no job that runs"):
        control.preempt(run)


def test_the_end_of_the_time_is_a_stop_and_never_a_crash(stand_in):
    run = stand_in(steps=250)
    launch(run, time="0:04", signal="USR2@1")
    assert watch.wait(run, lambda text: None) == 0
    assert set(causes(run)[:-1]) == {"timeout"}
    assert causes(run)[-1] == "done"
    assert {a.error for a in attempts.history(run)[:-1]} == {"SIGUSR2"}


def test_a_dead_supervisor_is_seen_and_the_run_can_go_on(stand_in, until):
    run = stand_in(steps=10_000)
    job = launch(run)
    until(training(run, 5), "step 5")
    leader = local.supervisor(run, job)["pid"]
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    assert "its tasks live on" in watch.report(run).note
    control.cancel(run)
    state = local.ask(run, job)
    assert (state.name, state.live) == (local.LOST, False)
    assert "submit again" in state.note
    (run.root / "told.json").write_text(json.dumps({"steps": 12}))
    again = launch(run)
    assert again.job != job.job
    assert watch.wait(run, lambda text: None) == 0
    assert causes(run)[-1] == "done"


def test_logs_are_those_of_the_newest_attempt(stand_in, until):
    run = stand_in(crash_at=5)
    launch(run)
    watch.wait(run, lambda text: None)
    lines = []
    for path in control.logs(run, "train", 0):
        control.tail(path, 40, lines.append)
    assert any("RuntimeError: told to crash" in line for line in lines)
    assert len({x["logs"] for x in records.of(run, "controller", records.submitted(run)["train"].job)}) == 2
    with pytest.raises(SubmitError, match="a job that has started"):
        control.logs(run, "knn", 0)


def test_following_a_log_gives_whole_lines_once(tmp_path):
    path, lines = tmp_path / "log", []
    path.write_text("one\ntwo\nthr")
    place = control.since(path, 0, lines.append)
    path.write_text("one\ntwo\nthree\n")
    control.since(path, place, lines.append)
    assert lines == ["one", "two", "three"]


def test_gpus_of_the_shell_reach_the_tasks(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.gpus({}) == "all"
    assert local.gpus({"gpus-per-node": "2"}) == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert local.gpus({}) == "GPU-a,GPU-b,GPU-c"
    assert local.gpus({"gres": "gpu:2"}) == "GPU-a,GPU-b"


def test_a_state_slurm_has_forgotten_is_read_from_the_run_folder(stand_in, monkeypatch):
    run = stand_in()
    job = records.Job("12", "train", "slurm", {})
    monkeypatch.setattr(sched, "ask_quietly", lambda job, cluster=None: sched.State(sched.GONE))
    assert watch.state_of(run, job).name == sched.GONE
    run.done.write_text('{"step": 3}')
    assert watch.state_of(run, job).name == "COMPLETED"
