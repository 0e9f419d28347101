"""Evaluations with options, during and after the training: which are due, and what a repeated submission submits."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from hpcssl.errors import EXIT_FAILED, SubmitError
from hpcssl.files import atomic_write, read_lines
from hpcssl.run_dir import RunDir
from slurm import submit
from slurm.backend import batch_script, local, partitions, processes, scheduler
from slurm.backend.profiles import Profile
from slurm.job import concurrent_evals
from slurm.log import attempts, job_log
from slurm.manage import control, evaluations, status, wait
from tests.slurm.stubs import CRASH_MESSAGE, change_settings
from tests.waiting import wait_until

# -- the text of an evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "requests"),
    [
        ("knn,linear:protocol=moco,transfer:sets=dtd+pets", ["knn", "linear:protocol=moco", "transfer:sets=dtd+pets"]),
        ("knn:temperature=0.1:k=[1,5], linear,", ["knn:k=[1,5]:temperature=0.1", "linear"]),
        ("linear:val='/a,b:c':lr=1", ["linear:lr=1:val='/a,b:c'"]),
        ("knn@220:k=[1]", ["knn@220:k=[1]"]),
    ],
)
def test_the_text_of_a_request_is_parsed_to_an_equal_request(text, requests):
    parsed = evaluations.parse_requests(text)
    assert [str(request) for request in parsed] == requests
    assert [evaluations.parse_request(str(request)) for request in parsed] == parsed


def test_lists_get_brackets_and_folders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "list").mkdir(parents=True)
    request = evaluations.parse_request("transfer:sets=dtd+pets:k=1:lr=1e+3:train=a:names=a/list:val='b c'")
    normalized = evaluations.normalize(request, {"sets": True, "k": True})
    assert normalized.overrides == ["k=[1]", "lr=1e+3", f"names={tmp_path}/a/list", "sets=[dtd,pets]"]
    assert normalized.shards == {"train": f"{tmp_path}/a", "val": f"{tmp_path}/b c"}
    assert evaluations.normalize(normalized, {"sets": True, "k": True}) == normalized
    remote = evaluations.normalize(evaluations.parse_request("knn:val='https://host/a/val'"), {})
    assert remote.shards == {"val": "https://host/a/val"} and evaluations.parse_request(str(remote)) == remote


# -- local jobs of the stubs ----------------------------------------------------------------------------------------


@pytest.fixture
def make_planned_run(make_stub_run):
    """Create a run of the stubs whose plan evaluates the weights of steps 10 and 20, of 30, during the training."""

    def make(**settings):
        run = make_stub_run(export=[5, 10, 20], **settings)
        entry = {"every": 10, "sbatch": {"nodes": "1"}}
        entries = {"knn": entry, "linear:lr=1": entry}
        evaluations.write_plan(run, entries, last=settings.get("steps", 30), kind="local", profile=Profile())
        return run

    return make


def read_rows(run, name):
    """The texts of the evaluations that have a row."""
    return sorted(row["eval"] for row in read_lines(run.eval_rows(name)))


def test_each_export_is_evaluated_once_and_the_last_one_after_the_training(make_planned_run):
    run = make_planned_run(step_s=0.1, crash=["linear@10:lr=1"], hold_at=15)
    local.launch(run, {"train": {}, "knn": {}, "linear:lr=1": {}})
    wait_until(lambda: job_log.latest_jobs(run).keys() >= {"knn@10", "linear@10:lr=1"}, "concurrent evaluations")
    change_settings(run, hold_at=None)
    assert wait.wait_for_jobs(run, lambda text: None) == 1
    assert [a.cause for a in attempts.read_attempts(run)] == ["done"]
    # by jobs of their own, or by the evaluation of the last weights if that comes first
    assert read_rows(run, "knn") == ["knn", "knn@10", "knn@20"]
    assert read_rows(run, "linear") == ["linear:lr=1", "linear@20:lr=1"]
    jobs = job_log.latest_jobs(run)
    assert "knn@10" in jobs and "knn@5" not in jobs
    # the training may end before these are submitted; the evaluation of the last weights has scored them then
    assert {str(request) for request in evaluations.due_requests(run)} <= {"knn@20", "linear@20:lr=1"}
    assert 10 not in evaluations.remaining_steps(run, evaluations.parse_request("linear:lr=1"))
    report = status.query_run(run)
    assert report.evals["knn"].startswith("COMPLETED") and report.evals["knn@*"].endswith(" COMPLETED")
    assert "linear:lr=1=COMPLETED" in report.line() and "1 FAILED" in report.evals["linear@*:lr=1"]
    assert jobs["linear@10:lr=1"].id in report.hint and CRASH_MESSAGE in report.hint


def test_evaluations_of_a_killed_supervisor_are_scored_after_the_training(make_planned_run):
    run = make_planned_run(steps=30, step_s=0.15, hold_at=15)
    train = local.launch(run, {"train": {}, "knn": {}})[0]
    job = wait_until(lambda: job_log.latest_jobs(run).get("knn@10"), "concurrent job")
    assert local.query_job(run, job).is_active
    supervisor = wait_until(lambda: local.find_supervisor(run, job), "supervisor of the concurrent job")["pid"]
    os.kill(supervisor, signal.SIGKILL)
    processes.kill_session(supervisor)
    assert local.query_job(run, train).is_active
    change_settings(run, hold_at=None)
    jobs = [train, job_log.latest_jobs(run)["knn"]]
    assert wait.wait_for_jobs(run, lambda text: None, jobs=jobs) in (0, EXIT_FAILED)
    assert read_rows(run, "knn") == ["knn", "knn@10", "knn@20"]


def test_no_evaluation_is_due_after_the_training_was_cancelled(make_planned_run):
    run = make_planned_run()
    job_log.record_event(run, "submit", "7", what="train", kind="slurm", options={})
    for step in (5, 10, 30):
        atomic_write(run.weights_at(step), "weights")
    assert [str(request) for request in evaluations.due_requests(run)] == ["knn@10", "linear@10:lr=1"]
    job_log.record_event(run, "cancel", "7")
    assert evaluations.due_requests(run) == []
    job_log.record_event(run, "cancel", "7", refused=True)
    assert len(evaluations.due_requests(run)) == 2


def test_a_cancel_that_slurm_refuses_leaves_the_job_uncancelled(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    job_log.record_event(run, "submit", "7", what="train", kind="slurm", options={})
    refusal = scheduler.subprocess.CompletedProcess([], 1, "", "Access denied")
    monkeypatch.setattr(status, "query_job", lambda run, job: scheduler.JobState("RUNNING"))
    monkeypatch.setattr(scheduler, "run_command", lambda *words, cluster: refusal)
    with pytest.raises(SubmitError) as caught:
        control.cancel(run)
    assert "scancel 7" in caught.value.what and caught.value.got == "Access denied"
    assert not job_log.is_cancelled(run, "7")


@pytest.mark.parametrize(
    ("devices", "sbatch", "spare"),
    [
        ("auto", {}, None),
        ("auto", {"gpus-per-node": "1"}, "GPU-b"),
        ("auto", {"gpus-per-node": "2"}, None),
        ("cpu", {}, ""),
    ],
)
def test_a_concurrent_local_evaluation_gets_a_gpu_that_the_training_does_not_use(
    tmp_path, monkeypatch, devices, sbatch, spare
):
    run = RunDir(tmp_path)
    atomic_write(run.config, f"machine: {{devices: {devices}}}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert local.find_spare_gpu(run, sbatch) == spare


# -- repeated submissions, to a scheduler that only keeps a list ----------------------------------------------------


@pytest.fixture
def fake_slurm(monkeypatch):
    """A scheduler that numbers jobs from 1 and starts none.

    ``sbatch``: options of each job by id. ``states``: state of a job by id, set by the test; PENDING by default.
    ``missing_rows``: texts of the evaluations without a row, set by the test. ``cancelled``: ids of cancelled jobs.
    """
    fake = SimpleNamespace(sbatch={}, states={}, missing_rows=set(), cancelled=[])

    def submit_job(run, what, sbatch, profile, avoided=None):
        job = str(len(fake.sbatch) + 1)
        fake.sbatch[job] = sbatch
        job_log.record_event(run, "submit", job, what=what, kind="slurm", options=sbatch)
        return job

    def query_job(run, job):
        return scheduler.JobState(fake.states.get(job.id, "PENDING"))

    def has_missing_rows(run, request, evaluation):
        return str(request) in fake.missing_rows

    monkeypatch.setattr(batch_script, "submit", submit_job)
    monkeypatch.setattr(partitions, "check_limits", lambda *_: None)
    monkeypatch.setattr(scheduler, "require_slurm", lambda: None)
    monkeypatch.setattr(submit.code_snapshot, "create_snapshot", lambda run: None)
    monkeypatch.setattr(status, "query_job", query_job)
    monkeypatch.setattr(submit, "_has_missing_rows", has_missing_rows)
    monkeypatch.setattr(control, "cancel_job", lambda run, job: fake.cancelled.append(job.id))
    return fake


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def submit_digits(fake_slurm, run, digits):
    """``submit_digits(evals, every, *overrides, **options)``: the new jobs, their ids by name."""

    def submit_run(evals="knn,linear:lr=1", every=0, *overrides, **options):
        data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", "schedule.epochs=3"]
        request = submit.SubmissionRequest(
            run=str(run.root),
            recipe="digits_msf",
            evals=evals,
            eval_every=every,
            overrides=[*data, *overrides],
            **options,
        )
        return {job.what: job.id for job in submit.submit(request)}

    return submit_run


def test_a_repeated_submission_submits_no_job_that_is_queued_or_running(fake_slurm, submit_digits):
    assert submit_digits() == {"train": "1", "knn": "2", "linear:lr=1": "3"}
    assert fake_slurm.sbatch["2"]["dependency"] == fake_slurm.sbatch["3"]["dependency"] == "afterok:1"
    assert submit_digits() == {}
    fake_slurm.states["1"] = "RUNNING"
    assert submit_digits() == submit_digits("knn") == {}
    assert submit_digits("knn,linear:lr=2") == {"linear:lr=2": "4"}
    assert fake_slurm.sbatch["4"]["dependency"] == "afterok:1"


def test_a_running_job_refuses_a_submission_with_other_values_or_elsewhere(fake_slurm, submit_digits, run):
    submit_digits()
    fake_slurm.states["1"] = "RUNNING"
    with pytest.raises(SubmitError) as caught:
        submit_digits("knn", 0, "machine.log_steps=3")
    assert "machine.log_steps" in caught.value.got and "job 1 " in caught.value.got
    with pytest.raises(SubmitError) as caught:
        submit_digits("knn", local=True)
    assert "--local" in caught.value.got and "job 1 " in caught.value.got
    assert caught.value.what == f"run {run.root}"


def test_a_submission_is_refused_while_slurm_does_not_answer(fake_slurm, submit_digits):
    submit_digits()
    fake_slurm.states["1"] = "UNKNOWN"
    with pytest.raises(SubmitError) as caught:
        submit_digits()
    assert caught.value.what == "job 1 (train)"


def test_evaluations_of_a_failed_training_are_submitted_again_with_it(fake_slurm, submit_digits):
    submit_digits()
    fake_slurm.states |= {"1": "FAILED", "2": "CANCELLED"}  # job 3 is still in the queue and depends on job 1
    assert submit_digits() == {"train": "4", "knn": "5", "linear:lr=1": "6"}
    assert fake_slurm.cancelled == ["3"]
    assert fake_slurm.sbatch["6"]["dependency"] == "afterok:4"


def test_a_finished_run_gets_only_evaluations_without_a_row(fake_slurm, submit_digits, run):
    submit_digits("knn,linear:lr=1", 1)
    fake_slurm.states |= dict.fromkeys("123", "COMPLETED")
    for step in (0, 11, 22, 33):
        atomic_write(run.weights_at(step), "weights")
    atomic_write(run.done, json.dumps({"step": 33, "weights": str(run.weights_at(33))}))
    assert submit_digits("knn,linear:lr=1", 1) == submit_digits("") == {}
    fake_slurm.missing_rows = {"linear:lr=1", "knn@22", "linear@11:lr=1", "linear@22:lr=1"}
    assert submit_digits("knn") == {}
    assert submit_digits("knn,linear:lr=1", 1) == {
        "linear:lr=1": "4",
        "linear@11:lr=1": "5",
        "knn@22": "6",
        "linear@22:lr=1": "7",
    }
    assert "dependency" not in fake_slurm.sbatch["4"] and fake_slurm.sbatch["6"]["nice"] == "10000"
    assert submit_digits("knn,linear:lr=1", 1) == {}
    fake_slurm.states["6"] = "FAILED"
    assert submit_digits("knn", 1) == {"knn@22": "8"}


def test_a_running_training_submits_a_due_evaluation_once(fake_slurm, submit_digits, run, capfd):
    sbatch = {"gres": "gpu:h100:4", "hold": True}
    eval_sbatch = {"": {"dependency": "singleton", "time": "9"}, "knn": {"time": "30"}}
    submit_digits("knn", 2, "machine.export_epochs=3", sbatch=sbatch, eval_sbatch=eval_sbatch)
    common = {"nodes": "1", "gpus-per-node": "h100:1", "time": "30"}
    assert fake_slurm.sbatch["2"] == common | {"dependency": "afterok:1,singleton"}
    assert "export_epochs: 1" in run.config.read_text()
    for step in (11, 22):
        atomic_write(run.weights_at(step), "weights")
    assert concurrent_evals.main(run.root) == 0
    assert concurrent_evals.main(run.root) == 0
    assert "job 3 (knn@22)" in capfd.readouterr().err
    assert fake_slurm.sbatch["3"] == common | {"dependency": "singleton", "nice": "10000"}
    assert len(fake_slurm.sbatch) == 3
    fake_slurm.missing_rows = {"knn@22"}
    fake_slurm.states["3"] = "FAILED"
    assert submit_digits("knn", 2, "machine.export_epochs=3", sbatch=sbatch) == {"knn@22": "4"}


def test_an_evaluation_stays_due_when_the_queue_is_full(submit_digits, run, monkeypatch, capfd):
    submit_digits("knn", 1)
    atomic_write(run.weights_at(11), "weights")

    def refuse(*_):
        raise SubmitError("sbatch", got="QOSMaxSubmitJobPerUserLimit", expected="a job id", fix="wait")

    with monkeypatch.context() as patched:
        patched.setattr(batch_script, "submit", refuse)
        assert concurrent_evals.main(run.root) == 1
    assert "QOSMaxSubmitJobPerUserLimit" in capfd.readouterr().err
    assert [str(request) for request in evaluations.due_requests(run)] == ["knn@11"]
