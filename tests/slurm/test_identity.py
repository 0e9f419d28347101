"""A job is not mistaken for another one with its number, and a job that could not be recorded is found."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import loopback
from hpcssl.errors import ConfigError, SubmitError
from hpcssl.files import append_line, atomic_write, read_lines
from hpcssl.signals import hold_signals
from slurm import submit
from slurm.backend import batch_script, identity, partitions, scheduler
from slurm.backend.owner import TOKEN_VARIABLE
from slurm.backend.profiles import Profile
from slurm.backend.reasons import HINTS
from slurm.job import concurrent_evals, requeue, successor, task
from slurm.log import attempts, job_log
from slurm.manage import control, evaluations, status, wait
from tests.slurm.job_runner import JOB_TIMEOUT_S
from tests.waiting import wait_until

ENDLESS = 100_000
OTHER_TOKEN = "0123456789abcdef"
SUBMIT = """
import sys
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script
from slurm.backend.owner import TOKEN_VARIABLE
from slurm.backend.profiles import Profile
batch_script.submit(RunDir(sys.argv[1]), sys.argv[2], {"time": "9"}, Profile())
"""


def submit_in_process(run, what="train"):
    """Submit a job in another process; its exit code."""
    return subprocess.run([sys.executable, "-c", SUBMIT, str(run.root), what], capture_output=True).returncode


def submit_train(run, **sbatch):
    return batch_script.submit(run, "train", sbatch, Profile())


# -- a queue of stubs -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(make_stub_run):
    return make_stub_run()


@pytest.mark.parametrize(
    ("then", "seconds"),
    [
        ("kill -KILL $PPID; exit", 120.0),
        ("echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1", 120.0),
        ("exec sleep 1000", 0.5),
    ],
    ids=["the process is killed", "sbatch fails", "sbatch does not answer"],
)
def test_a_job_that_was_accepted_without_an_answer_is_found(queue, run, monkeypatch, then, seconds):
    monkeypatch.setattr(batch_script, "SBATCH_TIMEOUT_S", seconds)
    queue.set_sbatch(then)
    if "KILL" in then:
        assert submit_in_process(run) == -signal.SIGKILL
        assert queue.jobs == ["7"] and job_log.all_jobs(run) == []
        assert "job 7 (train)" in status.query_run(run).hint
        identity.record_unrecorded_jobs(run)
    else:
        assert submit_train(run) == "7"
    assert [job.id for job in control.active_jobs(run)] == ["7"]
    assert job_log.open_requests(run) == [] and "interrupted" not in status.query_run(run).hint
    assert control.cancel(run) == ["7"] and queue.jobs == []


def test_cancel_finds_a_job_that_was_not_recorded(queue, run):
    queue.set_sbatch("kill -KILL $PPID; exit")
    submit_in_process(run)
    assert control.cancel(run) == ["7"] and queue.jobs == []


def test_the_next_submission_finds_a_job_that_was_not_recorded(queue, run, digits):
    """By the command, with the real trainer's recipe."""
    values = [f"data.train={digits / 'train'}", "machine.devices=cpu"]
    queue.set_sbatch("kill -KILL $PPID; exit")
    command = [sys.executable, "-m", "slurm", "digits_msf", "--run", str(run.root), *values]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert job_log.all_jobs(run) == []
    queue.set_sbatch(":")
    request = submit.SubmissionRequest(run=str(run.root), recipe="digits_msf", overrides=values)
    assert submit.submit(request) == [] and queue.jobs == ["7"]
    assert job_log.latest_jobs(run)["train"].id == "7"


def test_a_job_beyond_the_limits_of_its_partition_is_not_submitted(queue, tmp_path, digits):
    limits = "PartitionName=main Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED TotalNodes=2\n"
    (queue.folder / "partitions").write_text(limits)
    request = submit.SubmissionRequest(
        run=str(tmp_path / "new"), recipe="digits_msf", overrides=[f"data.train={digits / 'train'}"]
    )
    with pytest.raises(ConfigError) as caught:
        submit.submit(replace(request, sbatch={"nodes": "4"}))
    assert (caught.value.what, caught.value.got) == ("option --nodes", "4")
    assert queue.jobs == [] and not (tmp_path / "new").exists()


def test_a_running_training_does_not_submit_an_evaluation_again_that_was_not_recorded(queue, run):
    entries = {"knn": {"every": 10, "sbatch": {}}}
    evaluations.write_plan(run, entries, last=30, kind="slurm", profile=Profile())
    atomic_write(run.weights_at(10), "weights")
    queue.set_sbatch("kill -KILL $PPID; exit")
    submit_in_process(run, "knn@10")
    queue.set_sbatch(":")
    assert concurrent_evals.main(run.root) == 0 and queue.jobs == ["7"]


def test_a_successor_of_a_job_that_was_not_recorded_has_its_options(queue, run):
    queue.set_sbatch("kill -KILL $PPID; exit")
    submit_in_process(run)
    queue.set_sbatch(":")
    assert successor.submit_successor(run, "train", "7") == "8"
    assert job_log.latest_jobs(run)["train"].options == {"time": "9", "dependency": "afterany:7"}


def test_a_job_that_appears_after_another_one_took_its_place_is_cancelled(queue, run):
    """SLURM may accept a job minutes after sbatch has given up."""
    queue.set_sbatch("kill -KILL $PPID; exit")
    submit_in_process(run)
    late = (queue.folder / "queue").read_text()
    queue.remove("7")
    queue.set_sbatch(":")
    assert submit_train(run) == "8"
    with open(queue.folder / "queue", "a") as file:
        file.write(late)
    identity.record_unrecorded_jobs(run)
    assert queue.jobs == ["8"] and job_log.latest_jobs(run)["train"].id == "8"
    assert job_log.open_requests(run) == []


def test_ctrl_c_between_sbatch_and_the_record_waits_for_the_record(queue, run):
    queue.set_sbatch("kill -INT $$ $PPID")  # a terminal sends it to both
    with pytest.raises(KeyboardInterrupt):
        submit_train(run)
    assert queue.jobs == [job.id for job in job_log.all_jobs(run)] == ["7"]


def test_a_signal_that_another_thread_takes_waits_as_well():
    """The threads of numerical libraries do not block signals."""
    with pytest.raises(KeyboardInterrupt), hold_signals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_a_job_that_cannot_be_recorded_is_cancelled(queue, run, monkeypatch):
    record = job_log.record_event

    def fill_disk(run, event, job, **values):
        if event == "submit":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        record(run, event, job, **values)

    monkeypatch.setattr(job_log, "record_event", fill_disk)
    with pytest.raises(OSError, match="No space"):
        submit_train(run)
    assert queue.jobs == [] and (queue.folder / "next").read_text() == "7\n"


def test_nothing_is_submitted_on_a_full_disk(queue, run, monkeypatch):
    def fill_disk(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(job_log, "append_line", fill_disk)
    with pytest.raises(OSError, match="No space"):
        submit_train(run)
    assert (queue.folder / "next").read_text() == "6\n"


def test_a_refused_job_leaves_nothing_to_find(queue, run):
    (queue.folder / "refuse").write_text("")
    with pytest.raises(SubmitError) as caught:
        submit_train(run)
    assert caught.value.what == "sbatch" and "Invalid qos" in caught.value.got
    assert status.query_run(run).hint == ""


FORGOTTEN = "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2"


@pytest.mark.parametrize(
    ("command", "running", "scancel"),
    [(control.cancel, 1, FORGOTTEN), (control.cancel, 1, "true"), (control.preempt, 2, FORGOTTEN)],
    ids=["cancel, forgotten", "cancel, ended", "preempt"],
)
def test_a_command_on_a_job_that_has_just_ended_says_so(queue, run, monkeypatch, command, running, scancel):
    submit_train(run)
    states = iter([*["RUNNING"] * running, "COMPLETED"])
    monkeypatch.setattr(status, "query_job", lambda run, job: scheduler.JobState(next(states)))
    (queue.bin / "scancel").write_text(f"#!/bin/sh\n{scancel}\n")
    with pytest.raises(SubmitError) as caught:
        command(run)
    assert "COMPLETED" in caught.value.got and "7" in f"{caught.value.what} {caught.value.got}"
    assert not job_log.is_cancelled(run, "7"), "the run that ended was not cancelled"


def test_commands_do_not_say_that_there_is_no_job_while_slurm_does_not_answer(queue, run):
    submit_train(run)
    (queue.bin / "scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(SubmitError) as caught:
        control.cancel(run)
    assert caught.value.what == "job 7 (train)" and queue.jobs == ["7"]


# -- whose job it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "user", "name", "folder", "is_same"),
    [
        ("own", "any", "any", "own", True),
        ("own", "root", "run", "copy", False),
        (OTHER_TOKEN, "root", "run", "own", False),
        ("", "root", "run", "own", True),
        ("", "other", "run", "own", False),
        ("", "root", "run-knn", "own", False),
        ("", "root", "run", "copy", False),
    ],
)
def test_the_token_decides_and_without_it_user_name_and_folder(run, tmp_path, token, user, name, folder, is_same):
    own = "fedcba9876543210"
    logs = run.logs if folder == "own" else tmp_path / "copy" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    comment = f" Comment=mine hpcssl={own if token == 'own' else token}" if token else ""
    line = (
        f"JobId=7 JobName={name} UserId={user}(0) JobState=RUNNING WorkDir=/{comment} StdErr=/x StdOut={logs}/7 Power="
    )
    job = job_log.Job("7", "train", "slurm", {}, token=own, user="root")
    assert identity.is_same_job(run, job, scheduler.parse_job("7", line)) is is_same


def test_a_long_evaluation_does_not_make_a_job_name_that_slurm_refuses(run):
    name = identity.format_job_name(run, f"knn:val=/{'x' * 2000}", {})
    assert name.startswith("run-knn:val=") and len(name) <= 1000
    assert identity.format_job_name(run, "train", {}) == "run"


def test_text_of_a_user_does_not_look_like_a_field():
    line = "JobId=7 JobName=a JobState=FAILED UserId=root(0) JobState=RUNNING Comment=a JobState=FAILED StdErr=/x\n"
    state = scheduler.parse_job("7", line)
    assert state.name == "RUNNING" and state.owner.job_name == "a JobState=FAILED"


def test_events_and_successors_belong_to_the_last_submission_of_their_number(run):
    def submit(job, **values):
        job_log.record_event(run, "submit", job, what="train", kind="slurm", options={}, **values)
        return job_log.latest_jobs(run)["train"]

    submit("7", token="a")
    job_log.record_event(run, "cancel", "7")
    submit("8", token="b", follows="7")
    assert job_log.is_cancelled(run, "7")
    again = submit("7", token="c")
    assert not job_log.is_cancelled(run, "7") and job_log.find_successor(run, again) is None
    assert job_log.find_successor(run, job_log.all_jobs(run)[0]).token == "b"


def test_a_stranger_with_our_number_is_neither_waited_for_nor_cancelled(queue, run):
    job = submit_train(run)
    queue.remove(job)
    queue.add_stranger(job)
    assert status.query_job(run, job_log.latest_jobs(run)["train"]).name == scheduler.GONE
    assert wait.wait_for_jobs(run, lambda text: None) == 1
    for command in (control.cancel, control.preempt):
        with pytest.raises(SubmitError):
            command(run)
    assert queue.jobs == [job]


@pytest.mark.parametrize(
    ("comment", "name", "is_requeued"),
    [
        (" Comment=hpcssl=fedcba9876543210", "x", True),
        (f" Comment=hpcssl={OTHER_TOKEN}", "run", False),
        ("", "run", True),
        ("", "x", False),
    ],
)
def test_a_process_of_a_job_requests_no_requeue_of_another_one_with_its_number(
    run, monkeypatch, comment, name, is_requeued
):
    """A job that the controller lost may still run, and get a signal to stop."""
    environ = {"JOB_ID": "7", "JOB_NAME": "run", "JOB_USER": "root"}
    for key, value in environ.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv(TOKEN_VARIABLE, "fedcba9876543210")
    line = f"JobId=7 JobName={name} UserId=root(0) JobState=RUNNING Restarts=0{comment} StdErr=/x\n"
    commands = []

    def answer(*words, **_):
        commands.append(words)
        return subprocess.CompletedProcess(words, 0, line, "")

    monkeypatch.setattr(scheduler, "run_command", answer)
    monkeypatch.setattr(requeue.time, "sleep", lambda seconds: None)
    attempt = task.describe_attempt(run, "train")
    assert attempt["token"] == "fedcba9876543210"
    result = requeue.handle_stop(run, "train", attempt, ["SIGTERM"])
    assert (result.refused is None) is is_requeued
    assert (("scontrol", "requeue", "7") in commands) is is_requeued


def test_an_attempt_of_an_earlier_job_with_the_same_number_is_another_attempt(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for token, number in (("a", 1), ("b", 2), ("a", 1)):
        monkeypatch.setenv(TOKEN_VARIABLE, token)
        attempt = task.describe_attempt(run, "train")
        assert attempt["attempt"] == number
        append_line(run.attempts, {**attempt, "event": "start", "first_step": 0})


# -- a real SLURM ---------------------------------------------------------------------------------------------------


def wait_for_step(cluster, run, step):
    cluster.wait_until(lambda: attempts.last_known_step(run) >= step, f"step {step}", JOB_TIMEOUT_S)


@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_a_stranger_that_gets_our_number_from_a_new_controller_is_left_alone(cluster, make_stub_run):
    run = make_stub_run(steps=5)
    job = submit_train(run, hold=True)
    cluster.lose_state(int(job))
    words = ["--requeue", "--job-name=run", "-o", "/dev/null", "--wrap", "sleep 1000"]
    assert cluster("sbatch", "--parsable", *words).strip() == job
    cluster.wait_until(lambda: cluster.field(job, "JobState") == "RUNNING", "the stranger's start")
    report = status.query_run(run)
    assert report.state == scheduler.GONE and "root" in report.hint
    for command in (control.cancel, control.preempt):
        with pytest.raises(SubmitError):
            command(run)
    assert submit_train(run, nodes="2") != job
    cluster.wait_until(lambda: read_causes(run)[-1] == "done", "the training's end", JOB_TIMEOUT_S)
    assert cluster.field(job, "JobState") == "RUNNING"
    cluster("scancel", job)


def read_causes(run):
    return [attempt.cause for attempt in attempts.read_attempts(run)] or [None]


@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_an_old_cancellation_of_its_number_does_not_keep_a_job_from_its_requeue(cluster, make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    job = submit_train(run)
    wait_for_step(cluster, run, 5)
    assert control.cancel(run) == [job]
    cluster.wait_until(lambda: not cluster("squeue", "-h", "-j", job), "cancel", JOB_TIMEOUT_S)
    cluster.lose_state(int(job))
    assert submit_train(run) == job
    cluster.wait_until(lambda: len(read_causes(run)) == 2, "attempt 2", JOB_TIMEOUT_S)
    before = cluster.field(job, "SubmitTime")
    wait_until(lambda: cluster("date", "+%FT%T").strip() != before, "another second")
    control.preempt(run)
    cluster.wait_until(lambda: cluster.field(job, "Restarts") == "1", "requeue", JOB_TIMEOUT_S)
    cluster.wait_until(lambda: cluster.field(job, "SubmitTime") != before, "new time, which is no identity")
    assert [active.id for active in control.active_jobs(run)] == [job]
    assert [line["refused"] is None for line in read_lines(run.root / "requeues.jsonl")] == [False, True]
    assert read_causes(run) == ["cancelled", "preempted"]
    assert control.cancel(run) == [job]


@pytest.mark.slurm
def test_a_job_whose_submission_was_killed_is_found_on_slurm(cluster, make_stub_run, tmp_path, monkeypatch):
    run, shim = make_stub_run(), tmp_path / "bin" / "sbatch"
    shim.parent.mkdir()
    real = cluster("bash", "-c", "command -v sbatch").strip()
    shim.write_text(f'#!/bin/sh\n{real} -H --comment="it\'s hpcssl" $@\nkill -KILL $PPID\n')
    shim.write_text(f"#!/bin/sh\n{real} -H $@\nkill -KILL $PPID\n")
    shim.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(shim.parent), prepend=os.pathsep)
        assert submit_in_process(run) == -signal.SIGKILL
    assert job_log.all_jobs(run) == [] and "interrupted" in status.query_run(run).hint
    identity.record_unrecorded_jobs(run)
    (job,) = control.active_jobs(run)
    assert HINTS["jobhelduser"].format(job=job.id) in status.query_run(run).hint
    assert control.cancel(run) == [job.id]


@pytest.mark.slurm
def test_limits_of_the_partition_are_checked_and_reported(cluster, make_stub_run):
    cluster("scontrol", "update", "partitionname=high", "maxtime=60")
    try:
        for sbatch, what, got in [
            ({"nodes": "3-4"}, "option --nodes", "3"),
            ({"time": "61", "partition": "high"}, "option --time", "61"),
            ({"time": "infinite", "partition": "high"}, "option --time", "infinite"),
            ({"partition": "hihg"}, "option --partition", "'hihg'"),
        ]:
            with pytest.raises(ConfigError) as caught:
                partitions.check_limits(sbatch)
            assert (caught.value.what, caught.value.got) == (what, got)
        assert "'high'" in caught.value.fix
        for sbatch in ({"nodes": "2"}, {"time": "60", "partition": "high"}, {"time": "61", "partition": "high,main"}):
            partitions.check_limits(sbatch)
        partitions.check_limits({"time": "61", "time-min": "9", "partition": "high"})
        run = make_stub_run()
        for sbatch, key in [
            ({"nodes": "3"}, "partitionnodelimit"),
            ({"time": "61", "partition": "high"}, "partitiontimelimit"),
            ({"ntasks-per-node": "9"}, "partitionconfig"),
            ({"hold": True}, "jobhelduser"),
        ]:
            job = batch_script.submit(run, "train", sbatch, Profile())
            hint = HINTS[key].format(job=job)
            cluster.wait_until(lambda hint=hint: hint in status.query_run(run).hint, key)
            control.cancel(run)
    finally:
        cluster("scontrol", "update", "partitionname=high", "maxtime=infinite")


# -- the cluster of these tests -------------------------------------------------------------------------------------


def test_a_cluster_that_does_not_start_reports_its_own_error(tmp_path, monkeypatch):
    def fail(self):
        raise AssertionError("no two idle nodes")

    monkeypatch.setattr(loopback.LoopbackCluster, "start", fail)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    with pytest.raises(AssertionError, match="idle"), loopback.running_cluster(tmp_path):
        pass
