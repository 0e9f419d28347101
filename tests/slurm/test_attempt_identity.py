"""The record of one attempt is not mistaken for that of another one, and a copy of a run folder owns no jobs."""

import errno
import os
import shutil
import signal
import subprocess

import pytest

from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, SubmitError
from hpcssl.files import append_line, atomic_write
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.train.attempt.record import AttemptRecord, AttemptResult
from slurm import submit
from slurm.backend import identity, local, processes, sbatch_options, scheduler
from slurm.backend.profiles import Profile
from slurm.job import task
from slurm.log import attempts, job_log, retry
from slurm.manage import control, status
from tests.slurm.test_identity import submit_in_process, submit_train
from tests.waiting import wait_until

ENDLESS = 100_000
INTERACTIVE = {"attempt": 1, "job": "process 5", "host": "login"}
JOB = {"attempt": 1, "job": "7", "restart": 0, "launch": 0, "host": "n1", "token": "a" * 16}
BUSY = "a running writer"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def write(run, attempt, event, **fields):
    append_line(run.attempts, {**attempt, "event": event, "time": 5.0, **fields})


def refuse(run, attempt, rank_count=2):
    """What the ranks of an attempt record that waited for the lock in vain."""
    for _ in range(rank_count):
        task.record_failure(task.Task(run, "train", attempt=dict(attempt)), BUSY)


def describe(run):
    return [(a.number, a.job, a.cause) for a in attempts.read_attempts(run)]


# -- two attempts that have chosen the same number -------------------------------------------------------------------


def test_an_attempt_that_is_refused_does_not_end_the_one_that_has_its_number(run):
    """It chose its number before the training by hand, which it then waited for, had recorded its start."""
    write(run, INTERACTIVE, "start", first_step=0)
    refuse(run, JOB)
    assert describe(run) == [(1, "process 5", None), (2, "7", "error")]
    decision = retry.decide_after_exit(run, "train", JOB, "its step ended with exit code 1")
    assert decision.retry and BUSY in decision.reason
    write(run, INTERACTIVE, "end", cause="done", last_step=9)
    assert describe(run) == [(1, "process 5", "done"), (2, "7", "error")]
    assert status.query_run(run).last_end == "done", "it was the last one to end"


def test_an_attempt_takes_another_number_if_a_refused_one_has_recorded_its_own(run):
    record = AttemptRecord(run, World.single_process(), {})
    refuse(run, JOB)
    with pytest.raises(RuntimeError), record:
        record.start(lambda: 3)
        raise RuntimeError("a bug")
    assert [(number, cause) for number, _, cause in describe(run)] == [(1, "error"), (2, "error")]
    assert attempts.read_attempts(run)[1].error == "RuntimeError: a bug"


def test_an_attempt_that_waited_for_another_one_with_its_number_gets_the_next(run):
    waiting = AttemptRecord(run, World.single_process(), {})
    write(run, INTERACTIVE, "start", first_step=0)
    write(run, INTERACTIVE, "end", cause="interrupted", last_step=4)
    with waiting:
        waiting.take_lock(5.0, StopFlag())
        waiting.start(lambda: 4)
        waiting.finish(AttemptResult())
    assert [(number, cause) for number, _, cause in describe(run)] == [(1, "interrupted"), (2, "done")]


def test_a_second_attempt_of_an_evaluation_gets_a_number_of_its_own(run):
    for job in ("7", "8"):
        attempts.record_start(run, "knn", {"attempt": 1, "job": job, "restart": 0})
    attempts.record_end(run, "knn", {"attempt": 1, "job": "8", "restart": 0}, "error", "no weights")
    assert [(a.number, a.job, a.error) for a in attempts.read_attempts(run, "knn")] == [
        (1, "7", ""),
        (2, "8", "no weights"),
    ]


def test_a_rank_that_fails_before_rank_0_has_recorded_the_start_is_the_cause(run):
    """Of an evaluation, whose ranks do not wait for one another before rank 0 records the start."""
    about = {"attempt": 1, "job": "7", "restart": 0}
    attempts.record_end(run, "knn", about, "error", "rank 1: no GPU")
    attempts.record_start(run, "knn", about)
    attempts.record_end(run, "knn", about, "error", "rank 0: connection closed by peer", is_consequence=True)
    assert [(a.number, a.error) for a in attempts.read_attempts(run, "knn")] == [(1, "rank 1: no GPU")]


# -- an attempt that was refused while another one runs ---------------------------------------------------------------


def test_an_attempt_that_was_refused_does_not_close_the_one_that_runs(run):
    about = {**JOB, "attempt": 1}
    write(run, about, "start", first_step=0)
    refuse(run, {**JOB, "attempt": 2, "job": "8"})
    assert [cause for _, _, cause in describe(run)] == [None, "error"]
    decision = retry.decide_after_exit(run, "train", about, "exit code 137")
    assert decision.retry and "137" in decision.reason
    assert [cause for _, _, cause in describe(run)] == ["killed", "error"]


def test_crashes_of_another_job_do_not_count_towards_the_limit_of_this_one(run):
    write(run, JOB, "start", first_step=0)
    for restart in (0, 1):
        append_line(run.journal, {"step": 5 + restart})  # of the one that runs
        other = {**JOB, "attempt": 2 + restart, "job": "8", "restart": restart}
        refuse(run, other)
        assert retry.decide_after_exit(run, "train", other, "exit code 1").retry is (restart == 0)
    write(run, JOB, "end", cause="error", last_step=6, why="a bug")
    decision = retry.decide_after_exit(run, "train", JOB, "exit code 1")
    assert decision.retry and "a bug" in decision.reason


def test_a_full_disk_does_not_make_an_earlier_cancellation_count(run, monkeypatch):
    write(run, INTERACTIVE, "start", first_step=0)
    write(run, INTERACTIVE, "end", cause="cancelled", last_step=4)

    def fill_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(attempts, "append_line", fill_disk)
    decision = retry.decide_after_exit(run, "train", {**JOB, "attempt": 2}, "exit code 137")
    assert decision.retry and "137" in decision.reason


def test_an_attempt_that_could_not_record_its_cancellation_was_cancelled(run):
    """SLURM kills all processes of a job that is cancelled while it is suspended."""
    for job, token in (("7", "a" * 16), ("8", "b" * 16)):
        job_log.record_event(run, "submit", job, what="train", kind="slurm", token=token)
    write(run, JOB, "start", first_step=0)
    job_log.record_event(run, "cancel", "7")
    assert [cause for _, _, cause in describe(run)] == [None], "it may still be saving"
    second = {**JOB, "attempt": 2, "job": "8", "token": "b" * 16}
    write(run, second, "start", first_step=0)
    write(run, {**second, "attempt": 3, "restart": 1}, "start", first_step=0)
    assert [cause for _, _, cause in describe(run)] == ["cancelled", "lost", None]
    job_log.record_event(run, "cancel", "7", refused=True)
    assert describe(run)[0][2] == "lost"


# -- a copy of a run folder -------------------------------------------------------------------------------------------


def test_a_copy_of_a_run_folder_neither_ends_nor_preempts_the_local_job_of_the_original(make_stub_run, tmp_path):
    run = make_stub_run(steps=ENDLESS)
    job = local.launch(run, {"train": {}})[0]
    supervisor = local.find_supervisor(run, job)["pid"]
    try:
        wait_until(lambda: attempts.last_known_step(run) >= 5, "step 5")
        copy = RunDir(shutil.copytree(run.root, tmp_path / "copy"))
        report = status.query_run(copy)
        assert report.state.startswith(local.LOST) and "copy" in report.hint
        for command in (control.preempt, control.cancel):
            with pytest.raises(SubmitError):
                command(copy)
        assert not job_log.is_cancelled(copy, job.id)
        assert status.query_job(run, job).name == "RUNNING" and [cause for _, _, cause in describe(run)] == [None]
        moved = RunDir(run.root.rename(tmp_path / "moved"))
        assert local.find_supervisor(moved, job) is not None, "a folder that was moved still owns its jobs"
    finally:
        os.kill(supervisor, signal.SIGKILL)
        processes.kill_session(supervisor)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_copy_of_a_run_folder_takes_no_job_whose_submission_was_interrupted(
    queue, make_stub_run, tmp_path, is_replaced
):
    run = make_stub_run()
    queue.set_sbatch("kill -KILL $PPID; exit")
    submit_in_process(run)
    queue.set_sbatch(":")
    copy = RunDir(shutil.copytree(run.root, tmp_path / "copy"))
    queue.set_output(run.logs / "7_0_log.out")
    if is_replaced:
        job_log.record_event(copy, "submit", "9", what="train", kind="slurm", token="b" * 16)
    identity.record_unrecorded_jobs(copy)
    assert queue.jobs == ["7"] and "7" not in [job.id for job in job_log.all_jobs(copy)]
    identity.record_unrecorded_jobs(run)
    assert [job.id for job in job_log.all_jobs(run)] == ["7"]


# -- messages of sbatch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "is_refusal"),
    [
        ("Batch job submission failed: Socket timed out on send/recv operation", False),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", False),
        ("Batch job submission failed: Zero Bytes were transmitted or received", False),
        ("", False),
        ("Batch job submission failed: Invalid account or account/partition combination specified", True),
        ("invalid partition specified: nowhere", True),
    ],
)
def test_a_job_that_slurm_accepts_after_sbatch_has_failed_is_found(queue, make_stub_run, message, is_refusal):
    run = make_stub_run()
    sbatch = queue.bin / "sbatch"
    accept = sbatch.read_text()
    sbatch.write_text(f"#!/bin/sh\n[ -z '{message}' ] || echo 'sbatch: error: {message}' >&2\nexit 1\n")
    with pytest.raises(SubmitError):
        submit_train(run)
    assert bool(job_log.open_requests(run)) is not is_refusal
    if not is_refusal:  # its controller was busy, and has had the request in its queue
        script = next(run.logs.glob("*_submission.sh"))
        sbatch.write_text(accept)
        subprocess.run([sbatch, script], check=True, capture_output=True)
        identity.record_unrecorded_jobs(run)
        assert [job.id for job in control.active_jobs(run)] == ["7"]


def test_a_comment_of_the_user_is_not_taken_for_the_token(queue, make_stub_run):
    run = make_stub_run()
    submit_train(run, comment=f"like job 5, hpcssl={'0' * 16}")
    (job,) = job_log.all_jobs(run)
    comment = identity.format_comment(job.token, job.options)
    line = f"JobId=7 JobName=x UserId=root(0) JobState=PENDING Comment={comment} StdErr=/x"
    assert identity.is_same_job(run, job, scheduler.parse_job("7", line))


def test_jobs_that_cannot_be_cancelled_after_a_refusal_are_named(queue, make_stub_run, capsys):
    run = make_stub_run()
    (queue.bin / "scancel").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    queue.set_sbatch("[ $id = 7 ] || { sed -i '/^8 /d' queue; echo 'sbatch: error: no such QOS' >&2; exit 1; }")
    with pytest.raises(SubmitError) as caught:
        submit._submit_to_slurm(run, {"train": {}, "knn": {}}, Profile())
    assert "QOS" in caught.value.got
    assert "job 7 (train)" in capsys.readouterr().err and not job_log.is_cancelled(run, "7")
    atomic_write(queue.folder / "queue", "")


def test_cancel_reaches_a_job_in_whose_place_another_one_was_submitted(queue, make_stub_run):
    """Two hosts without a common lock may submit at once; an ended job of the run does not count."""
    run = make_stub_run()
    jobs = [submit_train(run) for _ in range(3)]
    queue.remove(jobs[0])
    queue.add_stranger("99")
    assert sorted(control.cancel(run)) == jobs[1:] and queue.jobs == ["99"]


def test_a_job_is_looked_for_on_the_cluster_that_sbatch_names(queue, make_stub_run):
    """The environment may choose it (SBATCH_CLUSTERS), and the other commands of SLURM do not read that."""
    run = make_stub_run()
    queue.set_sbatch("echo Submitted batch job $id on cluster other; exit")
    submit_train(run)
    assert job_log.latest_jobs(run)["train"].cluster == "other"


@pytest.mark.parametrize("clusters", ["a,b", "all"])
def test_a_run_is_not_submitted_to_one_of_several_clusters(clusters):
    with pytest.raises(ConfigError) as caught:
        sbatch_options.check_options({"clusters": clusters})
    assert (caught.value.what, caught.value.got) == ("option --clusters", repr(clusters))
    assert sbatch_options.check_options({"clusters": "a"}) == {"clusters": "a"}
