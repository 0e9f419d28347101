"""The record of attempts, the cause of each end, and the decision whether another attempt follows."""

import math
from types import SimpleNamespace

import pytest

from hpcssl.files import append_line, read_lines
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from slurm.backend import scheduler
from slurm.job import attempt_runner, epilogue, requeue, step_nodes, successor, task
from slurm.log import attempts, job_log, retry
from slurm.log.launches import EXIT_RELAUNCH
from tests.printed import numbers_in

ATTEMPT = {"attempt": 1, "job": "7", "restart": 0}
NODES = "n[1-2]"
BEGIN_TIME = 5.0


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def write_attempts(run, *ends):
    """Record attempts of the training: (cause, first step, last step). The cause None leaves an attempt open."""
    for number, (cause, first, last) in enumerate(ends, 1):
        about = {"attempt": number, "job": "7", "restart": number - 1}
        append_line(run.attempts, {**about, "event": "start", "first_step": first})
        if cause:
            append_line(run.attempts, {"attempt": number, "event": "end", "cause": cause, "last_step": last})


def read_causes(run, what="train"):
    return [attempt.cause for attempt in attempts.read_attempts(run, what)]


# -- another attempt or none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "retried"),
    [
        ([], True),
        ([("stopped", 0, 5)] * 9, True),
        ([("error", 0, 5)], True),
        ([("error", 0, 5), ("error", 3, 5)], False),
        ([("killed", 0, 5), ("error", 3, 5)], False),
        ([("error", 0, 5), ("error", 5, 6)], True),
        ([("error", 0, 5), ("stopped", 5, 5), ("error", 5, 5)], True),
        ([("done", 0, 9)], False),
        ([("cancelled", 0, 9)], False),
        ([("error", 0, 5), (None, 5, 5), ("error", 5, 5)], True),
        ([("hang", 0, 5)], True),
        ([("hang", 0, 5), ("hang", 0, 5)], False),
        ([("killed", 0, 5), ("hang", 0, 5)], False),
        *[
            ([("error", 0, 5), (cause, 5, 5), ("hang", 5, 5)], True)
            for cause in ("timeout", "preempted", "node_fail", "stopped", "interrupted", "lost")
        ],
        ([("node_fail", 0, 5)] * 9, True),
        ([("timeout", 5, 5)] * 9, True),
    ],
)
def test_only_two_crashes_in_a_row_at_one_step_end_the_job(run, ends, retried):
    write_attempts(run, *ends)
    assert retry.decide_retry(attempts.read_attempts(run)).retry is retried


def test_an_attempt_without_an_end_that_was_followed_by_another_is_lost(run):
    write_attempts(run, (None, 0, None), ("stopped", 3, 4))
    assert read_causes(run) == ["lost", "stopped"]


def test_a_death_without_a_record_is_recorded_as_killed_at_the_last_step_of_the_journal(run):
    write_attempts(run, (None, 0, None))
    for step in range(1, 400):
        append_line(run.journal, {"step": step, "loss": 1.0})
    with open(run.journal, "ab") as journal:
        journal.write(b'{"step": 40')  # the kill interrupted this line
    decision = retry.decide_after_exit(run, "train", ATTEMPT, "exit code 137")
    last = attempts.read_attempts(run)[-1]
    assert (last.cause, last.last_step, last.error) == ("killed", 399, "exit code 137")
    assert decision.retry
    assert 399 in numbers_in(decision.reason)


def test_attempts_that_died_before_their_first_record_count_as_crashes(run):
    assert retry.decide_after_exit(run, "train", ATTEMPT, "import failed").retry
    assert not retry.decide_after_exit(run, "train", ATTEMPT | {"attempt": 2, "restart": 1}, "import failed").retry


# -- which record of an end counts ----------------------------------------------------------------------------------


def test_the_first_record_of_a_crash_counts(run):
    write_attempts(run, ("error", 0, 5))
    attempts.record_end(run, "train", {"attempt": 1}, "error", "rank 3: connection closed by peer")
    append_line(run.attempts, {"attempt": 1, "event": "end", "cause": "stopped", "last_step": 5})
    attempt = attempts.read_attempts(run)[0]
    assert (attempt.cause, attempt.error) == ("error", "")


@pytest.mark.parametrize(
    ("causes", "expected"),
    [
        (["error", "killed", "hang"], "error"),
        (["killed", "error", "hang"], "killed"),
        (["consequence", "killed", "hang"], "killed"),
        (["consequence", "hang", "error"], "hang"),
        (["consequence", "error", "consequence"], "error"),
        (["killed", "node_fail", "error"], "node_fail"),
        (["stopped", "killed"], "killed"),  # a rank that did not stop in time
        (["error", "done"], "error"),
        (["done", "error"], "done"),
        (["cancelled", "killed", "node_fail"], "cancelled"),
    ],
)
def test_a_later_record_that_explains_more_replaces_the_first(run, causes, expected):
    """``consequence``: an error in a collective, because another rank has ended."""
    write_attempts(run, (None, 0, None))
    for cause in causes:
        is_consequence = cause == "consequence"
        cause = "error" if is_consequence else cause
        attempts.record_end(run, "train", {"attempt": 1}, cause, is_consequence=is_consequence)
    (attempt,) = attempts.read_attempts(run)
    assert (attempt.cause, attempt.is_consequence) == (expected, False)


@pytest.mark.parametrize(
    ("is_consequence", "cause", "error"),
    [(False, "error", "rank 0: all ports are in use"), (True, "killed", "exit code 137")],
)
def test_the_exit_code_of_a_killed_rank_replaces_only_errors_that_follow_from_its_death(
    run, is_consequence, cause, error
):
    write_attempts(run, (None, 0, None))
    failed = task.Task(run, "train", attempt=ATTEMPT)
    task.record_failure(failed, "all ports are in use", is_consequence=is_consequence)
    decision = retry.decide_after_exit(run, "train", ATTEMPT, "exit code 137", was_killed=True)
    (attempt,) = attempts.read_attempts(run)
    assert (attempt.cause, attempt.error) == (cause, error) and error in decision.reason


@pytest.mark.parametrize(("was_saved", "cause"), [(True, "stopped"), (False, "killed")])
def test_a_stop_with_a_saved_state_stays_one_if_a_rank_was_killed_while_it_left(run, was_saved, cause):
    """SLURM kills tasks that take longer than KillWait."""
    write_attempts(run, (None, 0, None))
    end = {"attempt": 1, "event": "end", "cause": "stopped", "last_step": 5}
    append_line(run.attempts, end | ({"signals": ["SIGTERM"]} if was_saved else {}))
    decision = retry.decide_after_exit(run, "train", ATTEMPT, "exit code 137", was_killed=True)
    assert read_causes(run) == [cause] and decision.retry


def test_a_leftover_process_does_not_change_the_end_of_an_earlier_attempt(run):
    write_attempts(run, ("preempted", 0, 5), (None, 5, None))
    attempts.record_end(run, "train", {"attempt": 1}, "killed", "late")
    assert read_causes(run) == ["preempted", None]
    # an attempt that was refused because an earlier one runs has never begun: the earlier one may still end
    attempts.record_end(run, "train", {"attempt": 3, "job": "8", "restart": 0}, "error", "the run is locked")
    attempts.record_end(run, "train", {"attempt": 2}, "timeout")
    assert read_causes(run) == ["preempted", "timeout", "error"]


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ([("timeout", 4, 4)] * 3, "timeout"),
        ([("stopped", 0, 0)] * 4, "stopped"),
        ([("timeout", 4, 4)] * 2, None),
        ([("timeout", 4, 4), ("timeout", 4, 5), ("timeout", 5, 5)], None),
        ([("timeout", 4, 4), ("killed", 4, 4), ("timeout", 4, 4)], None),
    ],
)
def test_three_attempts_in_a_row_without_a_step_give_a_warning(run, ends, cause):
    write_attempts(run, *ends)
    warning = retry.describe_no_progress(attempts.read_attempts(run))
    if cause is None:
        assert warning == ""
    else:
        assert numbers_in(warning) == [3] and f"({cause})" in warning
        assert ("--time" in warning) is (cause == "timeout")


# -- the cause of a stop, and the request for the next attempt ------------------------------------------------------


@pytest.fixture
def set_slurm_state(monkeypatch):
    """Set what SLURM reports of job 7; returns the requeued jobs.

    ``set_slurm_state(lost_nodes=[], silent_nodes=[], **fields)``: those of the lost nodes that are silent are not down.
    """
    requeued = []
    monkeypatch.setattr(scheduler, "request_requeue", requeued.append)
    monkeypatch.setattr(requeue.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    monkeypatch.delenv("HPCSSL_LOCAL_JOB", raising=False)

    def set_state(lost_nodes=(), silent_nodes=(), **fields):
        monkeypatch.setattr(scheduler, "query_job_or_unknown", lambda job, cluster=None: scheduler.JobState(**fields))
        monkeypatch.setattr(
            scheduler,
            "find_lost_nodes",
            lambda nodes, since, only_down=False: (
                [node for node in lost_nodes if node not in silent_nodes or not only_down]
                if nodes == NODES and since in (BEGIN_TIME, math.inf)
                else ["another"]
            ),
        )
        return requeued

    return set_state


@pytest.mark.parametrize(
    ("state", "signals", "cause", "requests"),
    [
        ({"name": "RUNNING"}, ["SIGTERM"], "stopped", 1),
        ({"name": "RUNNING", "remaining_s": 200}, ["SIGUSR2"], "timeout", 1),
        ({"name": "RUNNING", "remaining_s": 200}, ["SIGTERM"], "stopped", 1),
        ({"name": "RUNNING", "remaining_s": 4000}, ["SIGUSR2"], "stopped", 1),
        ({"name": "RUNNING", "preempted": True, "remaining_s": 20}, ["SIGUSR2"], "preempted", 1),
        ({"name": "COMPLETING"}, ["SIGTERM"], "cancelled", 0),
        ({"name": "COMPLETING", "restarts": 1}, ["SIGTERM"], "preempted", 0),  # SLURM has requeued it already
        ({"name": "COMPLETING", "restarts": 1, "nodes": 1}, ["SIGTERM"], "node_fail", 0),
        ({"name": "RUNNING", "restarts": 1}, ["SIGTERM"], "preempted", 0),  # leftover: the next attempt runs already
    ],
)
def test_the_cause_of_a_stop_decides_whether_a_requeue_is_requested(
    run, set_slurm_state, state, signals, cause, requests
):
    requeued = set_slurm_state(**state)
    answer = requeue.handle_stop(run, "train", ATTEMPT, signals)
    assert answer.cause == cause and requeued == ["7"] * requests
    assert (answer.refused is None) is (cause != "cancelled")


def test_the_recorded_cause_of_a_signal_counts_unless_slurm_reports_a_cancel(run, set_slurm_state):
    job_log.record_event(run, "signal", "7", restart=0, cause="preempted")
    set_slurm_state(name="RUNNING")
    assert requeue.handle_stop(run, "train", ATTEMPT, ["SIGTERM"]).cause == "preempted"
    set_slurm_state(name="RUNNING", restarts=1)
    assert requeue.handle_stop(run, "train", ATTEMPT | {"attempt": 2, "restart": 1}, ["SIGTERM"]).cause == "stopped"
    set_slurm_state(name="COMPLETING")
    assert requeue.handle_stop(run, "train", ATTEMPT, ["SIGTERM"]).cause == "cancelled"


def test_the_next_attempt_of_a_job_records_a_lost_node(run, set_slurm_state):
    job_log.record_event(run, "submit", "7", what="train", kind="slurm", options={})
    about = {**ATTEMPT, "host": NODES}
    append_line(run.attempts, {**about, "event": "start", "first_step": 0, "time": BEGIN_TIME})
    attempts.record_end(run, "train", ATTEMPT, "error", "connection closed by peer")
    set_slurm_state(["n2"], name="RUNNING")
    requeue.record_previous_end(run, "train", ATTEMPT | {"attempt": 2, "job": "8"})
    assert read_causes(run) == ["error"], "job 8 does not continue job 7"
    requeue.record_previous_end(run, "train", ATTEMPT | {"attempt": 2, "restart": 1})
    attempt = attempts.read_attempts(run)[0]
    assert (attempt.cause, attempt.error) == ("node_fail", "lost n2")


@pytest.mark.parametrize(
    ("cause", "is_consequence", "silent", "expected"),
    [
        ("error", False, ["n2"], "error"),
        ("hang", False, ["n2"], "hang"),
        ("error", True, ["n2"], "node_fail"),
        ("killed", False, ["n2"], "node_fail"),
        ("error", False, [], "node_fail"),
    ],
)
def test_a_node_that_is_slow_to_answer_does_not_hide_an_error_of_a_rank(
    run, set_slurm_state, monkeypatch, cause, is_consequence, silent, expected
):
    monkeypatch.setattr(scheduler, "list_nodes", lambda job: [])
    append_line(run.attempts, {**ATTEMPT, "host": NODES, "event": "start", "first_step": 0, "time": BEGIN_TIME})
    attempts.record_end(run, "train", ATTEMPT, cause, "a bug", is_consequence=is_consequence)
    set_slurm_state(["n2"], silent, name="RUNNING")
    requeue.record_removed_nodes(run, "train", ATTEMPT, attempts.read_attempts(run)[0])
    assert read_causes(run) == [expected]


def test_the_next_launch_leaves_out_nodes_that_are_down_or_were_blamed(run, set_slurm_state, monkeypatch):
    """A blamed node runs tasks only if there are not enough others."""
    set_slurm_state(name="RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(scheduler, "list_nodes", lambda job: ["n1", "n2", "n3", "n4"])
    monkeypatch.setattr(scheduler, "find_lost_nodes", lambda nodes, since, only_down=False: ["n3"])
    write_attempts(run, (None, 0, 3))
    assert step_nodes.format_arguments(run, "train", 2, 8) == "--nodes=2 --ntasks=8 --nodelist=n1,n2"
    attempts.record_end(run, "train", ATTEMPT, "hang", "no progress for 600 s: rank 0 on n1 (process 5) is stuck")
    assert step_nodes.format_arguments(run, "train", 2, 8) == "--nodes=2 --ntasks=8 --nodelist=n2,n4"
    assert step_nodes.format_arguments(run, "train", 3, 8) == "--nodes=3 --ntasks=8 --nodelist=n2,n4,n1"
    assert step_nodes.format_arguments(run, "train", 4, 8) == "--nodes=4 --ntasks=8"


def test_a_launch_that_never_began_is_not_taken_for_a_second_crash_at_the_same_step(run):
    """Attempt 1 crashed at step 5; the next launch on the same nodes recorded nothing."""
    write_attempts(run, ("error", 0, 5))
    append_line(run.journal, {"step": 5})
    launch = {**ATTEMPT, "attempt": 2, "launch": 1}
    assert retry.decide_after_exit(run, "train", launch, "no GPU").retry
    assert not retry.decide_after_exit(run, "train", {**launch, "attempt": 3, "launch": 2}, "no GPU").retry


@pytest.mark.parametrize(("launch", "preempted", "is_stopped"), [(1, True, True), (1, False, False), (0, True, False)])
def test_a_preemption_between_two_launches_stops_the_next_one(set_slurm_state, launch, preempted, is_stopped):
    set_slurm_state(name="RUNNING", preempted=preempted)
    stop = StopFlag()
    task.stop_if_preempted(stop, {**ATTEMPT, "launch": launch})
    assert stop.is_set() is is_stopped


def test_a_signal_before_an_earlier_launch_is_not_the_cause_of_a_later_end(run, set_slurm_state):
    set_slurm_state(name="RUNNING")
    job_log.record_event(run, "signal", "7", restart=0, cause="preempted")
    later = {**ATTEMPT, "launch": 1, "began": 2**40}
    assert requeue.handle_stop(run, "train", later, ["SIGTERM"]).cause == "stopped"


def test_a_node_whose_daemon_was_restarted_is_not_blamed_for_a_crash(run, set_slurm_state, monkeypatch):
    """The batch script survived the crash, and has seen that no node was lost."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    about = {**ATTEMPT, "host": NODES}
    append_line(run.attempts, {**about, "event": "start", "first_step": 0, "time": BEGIN_TIME})
    set_slurm_state(name="RUNNING")
    epilogue.finalize_step(run, "train", 137)
    set_slurm_state(["n2"], name="RUNNING", restarts=1)
    requeue.record_previous_end(run, "train", ATTEMPT | {"attempt": 2, "restart": 1})
    assert read_causes(run) == ["killed"]


def test_jobs_that_wait_for_a_job_are_moved_to_its_successor(monkeypatch):
    queue = (
        "13|afterok:12(unfulfilled)\n14|afterany:12(unfulfilled)\n15|afterok:112(unfulfilled)\n"
        "16|afterok:11:12:13(unfulfilled),afternotok:12(unfulfilled)\n17|(null)\n20|afterany:12(unfulfilled)\n"
    )
    updates = []

    def run_command(program, *words, cluster=None):
        updates.extend([words[1:]] if program == "scontrol" else [])
        return scheduler.subprocess.CompletedProcess([], 0, queue, "")

    monkeypatch.setattr(successor.scheduler, "run_command", run_command)
    assert successor.move_dependencies("12", "20") == ["13", "14", "16"]
    assert updates == [
        ("jobid=13", "dependency=afterok:20"),
        ("jobid=14", "dependency=afterany:20"),
        ("jobid=16", "dependency=afterok:11:20:13,afternotok:20"),
    ]


# -- evaluations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "signal", "cause"), [("svm", None, "error"), ("svm", "SIGTERM", "stopped"), ("train", "SIGTERM", "error")]
)
def test_the_failure_of_an_evaluation_after_a_signal_is_a_stop(run, what, signal, cause):
    stop = StopFlag()
    if signal:
        stop.set(signal)
    for message in ("a worker died", "another one died"):  # on two ranks, one after the other
        task.record_failure(task.Task(run, what, stop, attempt=ATTEMPT), message)
    assert [(a.cause, a.error) for a in attempts.read_attempts(run, what)] == [(cause, "rank 0: a worker died")]
    assert len(read_lines(run.jobs if what == "svm" else run.attempts)) == 2


def test_attempts_of_each_evaluation_are_numbered_separately(run):
    write_attempts(run, ("error", 0, 5))
    attempts.record_start(run, "knn", {"attempt": 1, "job": "8", "restart": 0})
    attempts.record_end(run, "knn", {"attempt": 1}, "error", "no weights")
    attempts.record_start(run, "linear", {"attempt": 1, "job": "9", "restart": 0})
    assert read_causes(run, "knn") == ["error"]
    assert read_causes(run, "linear") == [None]
    assert attempts.next_number(run, "knn") == 2
    assert attempts.next_number(run, "svm") == 1


# -- the epilogue of the batch script -------------------------------------------------------------------------------


@pytest.fixture
def requeued(monkeypatch):
    """The environment of the batch script of job 7; the jobs for which a requeue is requested."""
    jobs = []
    monkeypatch.setattr(epilogue.scheduler, "request_requeue", jobs.append)
    # a cluster of this machine, or of other tests, may have a job 7
    monkeypatch.setattr(scheduler, "query_job_or_unknown", lambda job, cluster=None: scheduler.JobState("UNKNOWN"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("HPCSSL_LOCAL_JOB", raising=False)
    return jobs


@pytest.mark.parametrize(
    ("recorded", "step_code", "job_code", "requests", "cause"),
    [
        ("done", 0, 0, 0, "done"),
        ("stopped", 75, 75, 1, "stopped"),
        ("cancelled", 75, 75, 0, "cancelled"),
        ("done", 137, 0, 0, "done"),
        (None, 143, 143, 1, "stopped"),
        (None, 138, 138, 1, "stopped"),
        (None, 137, 137, 1, "killed"),
        (None, 1, 1, 1, "killed"),
        ("error", 1, 1, 1, "error"),
        ("error", 75, 1, 1, "error"),  # the other tasks left with 75, and srun returns the highest code
    ],
)
def test_the_epilogue_requests_the_requeue_that_the_tasks_could_not(
    run, requeued, recorded, step_code, job_code, requests, cause
):
    write_attempts(run, (recorded, 0, 3))
    assert epilogue.finalize_step(run, "train", step_code) == (job_code, bool(requests))
    assert requeued == ["7"] * requests
    assert read_causes(run) == [cause]


def test_a_stop_with_a_saved_state_is_requeued_although_a_rank_was_killed_while_it_left(run, requeued):
    write_attempts(run, (None, 0, 3))
    end = {"attempt": 1, "event": "end", "cause": "stopped", "last_step": 3, "signals": ["SIGTERM"]}
    append_line(run.attempts, end)
    assert epilogue.finalize_step(run, "train", 137) == (137, True)
    assert requeued == ["7"] and read_causes(run) == ["stopped"]


@pytest.mark.parametrize(
    ("ends", "state", "lost", "is_relaunched"),
    [
        ([("error", 0, 3)], {}, [], True),
        ([(None, 0, 3)], {}, [], True),
        ([("hang", 4, 5)], {"remaining_s": 1000}, [], True),
        ([("stopped", 0, 3)], {}, [], False),
        ([("error", 3, 3)], {}, [], False),  # no new step: the nodes or the file system may need time
        ([("error", 0, 3)], {"remaining_s": 300}, [], False),
        ([("error", 0, 3)], {"restarts": 1}, [], False),
        ([("error", 0, 3)], {"preempted": True}, [], False),
        ([("error", 0, 3)], {"name": "COMPLETING"}, [], False),
        ([("error", 0, 3)], {}, ["n2"], False),
        ([("error", 0, 3)], {"name": "UNKNOWN"}, [], False),
        ([("error", 0, 3), ("error", 0, 3)], {}, [], False),  # twice at one step
    ],
)
def test_the_epilogue_lets_the_batch_script_launch_the_tasks_again_after_a_crash(
    run, requeued, set_slurm_state, monkeypatch, ends, state, lost, is_relaunched
):
    requested = set_slurm_state(lost, **{"name": "RUNNING", **state})
    for number, (cause, first, last) in enumerate(ends, 1):
        about = {**ATTEMPT, "attempt": number, "launch": number - 1, "host": NODES}
        append_line(run.attempts, {**about, "event": "start", "first_step": first, "time": BEGIN_TIME})
        append_line(run.journal, {"step": last})
        if cause is not None:
            append_line(run.attempts, {**about, "event": "end", "cause": cause, "last_step": last})
    monkeypatch.setenv("HPCSSL_LAUNCH", str(len(ends) - 1))
    code, granted = epilogue.finalize_step(run, "train", 1)
    assert (code == EXIT_RELAUNCH) is is_relaunched
    if is_relaunched:
        assert not granted and requested == []


def test_the_epilogue_of_a_cancelled_job_requests_no_requeue(run, requeued):
    job_log.record_event(run, "cancel", "7")
    assert epilogue.finalize_step(run, "train", 143) == (143, False)
    assert requeued == []


def test_a_refusal_to_run_the_code_is_recorded_with_its_message(run, requeued):
    run.config.touch()
    run.config.chmod(0o666)
    assert epilogue.finalize_step(run, "train", 1) == (1, True)
    (attempt,) = attempts.read_attempts(run)
    assert attempt.cause == "error" and attempt.error.startswith(f"{run.config}: mode 0666")
    run.config.chmod(0o644)
    assert epilogue.finalize_step(run, "train", 1)[0] == 1
    assert [a.cause for a in attempts.read_attempts(run)] == ["error"]


def test_a_run_folder_that_was_moved_gets_no_record_and_no_requeue(tmp_path, requeued, capsys):
    for code, exit_code in ((1, 1), (75, 1), (137, 137)):
        assert epilogue.main(str(tmp_path / "moved"), "train", code) == exit_code
    assert str(tmp_path / "moved") in capsys.readouterr().err and not (tmp_path / "moved").exists()
    assert requeued == []


# -- the tasks of a local job ----------------------------------------------------------------------------------------


@pytest.fixture
def local_runner(run, monkeypatch):
    """A runner of two tasks whose process ids are their ranks, its clock, and the ids of those that it killed.

    Its controller has ended, and left the processes in ``clock.left_over``.
    """
    clock, killed = SimpleNamespace(now=100.0, left_over=[]), []
    monkeypatch.setattr(attempt_runner.processes, "kill_session", lambda _: None)
    monkeypatch.setattr(attempt_runner.processes, "find_session_members", lambda _: clock.left_over)
    monkeypatch.setattr(attempt_runner, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(attempt_runner.processes, "read_environment", lambda pid: {"SUBMITIT_LOCAL_GLOBALID": str(pid)})
    monkeypatch.setattr(attempt_runner.processes, "send_signals", lambda tasks, *_: killed.extend(t.pid for t in tasks))
    job = job_log.Job("local-1", "train", "local", {"ntasks-per-node": "2"})
    runner = attempt_runner.AttemptRunner(run, job, 1, StopFlag())
    runner._controller = SimpleNamespace(poll=lambda: 0)
    return runner, clock, killed


@pytest.mark.parametrize("dead", [0, 1])
def test_a_task_that_dies_before_it_is_first_seen_is_a_crash(local_runner, dead):
    runner, clock, killed = local_runner
    tasks = [SimpleNamespace(pid=1 - dead)]
    while not killed and clock.now < 200:
        clock.now += attempt_runner.POLL_S
        runner._stop_after_crash(tasks)
    assert killed == [1 - dead] and runner.dead_ranks == [dead]
    assert clock.now - 100 <= 2 * attempt_runner.CRASH_WAIT_S + 1
    assert runner.wait() == [None, None] and runner.dead_ranks == [dead], "the other one was killed afterwards"


def test_a_task_that_is_started_late_is_not_a_crash(local_runner):
    runner, clock, killed = local_runner
    for running in ([0], [0], [0, 1]):
        clock.now += 0.45 * attempt_runner.CRASH_WAIT_S
        runner._stop_after_crash([SimpleNamespace(pid=rank) for rank in running])
    assert runner.dead_ranks == [] and killed == []


def test_a_task_without_an_exit_code_has_died_unless_the_supervisor_killed_it(local_runner):
    runner, clock, _ = local_runner
    job_log.record_event(runner.run, "exit", "local-1", attempt=1, rank=0, code=75)
    assert runner.wait() == [75, None] and runner.dead_ranks == [1]
    runner.dead_ranks = []
    clock.left_over.append(SimpleNamespace(pid=1))
    assert runner.wait() == [75, None] and runner.dead_ranks == []
