"""The state of a job, the cause of its end and lost nodes, from SLURM's own output."""

import math

import pytest

from hpcssl.timing.uptime import to_unix_time
from slurm.backend import scheduler
from slurm.backend.reasons import HINTS

LINE = (
    "JobId=12 JobName=a b UserId=root(0) Priority=1 JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
    "Restarts=3 BatchFlag=1 ExitCode={code} RunTime={run_time} TimeLimit=00:10:00 NodeList=n[1-2]\n"
)


def parse(state="RUNNING", reason="None", code="0:0", run_time="00:01:00", more=""):
    return scheduler.parse_job("12", LINE.format(state=state, reason=reason, code=code, run_time=run_time) + more)


def test_the_fields_of_a_running_job():
    state = parse()
    assert (state.name, state.reason, state.restarts, state.is_active) == ("RUNNING", "", 3, True)
    assert not state.time_limit_reached
    assert parse(run_time="00:10:02").time_limit_reached


@pytest.mark.parametrize(
    ("state", "reason", "key", "command"),
    [
        ("PENDING", "launch_failed_requeued_held", "launch failed requeued held", "scontrol release 12"),
        ("PENDING", "DependencyNeverSatisfied", "dependencyneversatisfied", "scancel 12"),
        ("CANCELLED", "DependencyNeverSatisfied", "dependencyneversatisfied", "scancel 12"),
        ("PENDING", "BeginTime", "begintime", ""),
        ("PENDING", "JobHeldUser", "jobhelduser", "scontrol release 12"),
        ("PENDING", "job_requeued_in_held_state", "job requeued in held state", "scontrol release 12"),
    ],
)
def test_the_hint_for_a_state_names_the_command_to_run(state, reason, key, command):
    assert parse(state, reason).hint == HINTS[key].format(job="12")
    assert command in HINTS[key].format(job="12")


def test_a_job_that_a_partition_cancelled_to_preempt_it_was_preempted():
    ended = parse("PREEMPTED", code="143:0", more=" PreemptTime=2026-11-20T18:37:38")
    assert ended.preempted and not ended.is_active and ended.hint == HINTS["preempted"]
    assert not parse("PREEMPTED", code="143:0", more=" PreemptTime=None").preempted


def test_an_ended_job_shows_no_reason_for_which_it_waited_before():
    assert parse("CANCELLED", "BeginTime").hint == parse("RUNNING").hint == ""
    assert not parse("COMPLETED").is_active


@pytest.mark.parametrize(("field", "code"), [("0:0", 0), ("75:0", 75), ("0:15", 143), ("1:0", 1)])
def test_the_exit_code_of_a_signal_is_128_and_its_number(field, code):
    assert parse("FAILED", code=field).exit_code == code


FIELDS = "Requeue=1 Restarts=0 NumNodes=2"


@pytest.mark.parametrize(
    ("state", "fields", "cause"),
    [  # as SLURM 22.05 showed them while rank 0 handled the signal
        ("COMPLETING", FIELDS + " ExitCode=0:15 PreemptTime=None", "cancelled"),
        ("RUNNING", FIELDS + " PreemptTime=2026-11-20T21:32:18", "preempted"),
        ("COMPLETING", "Requeue=1 Restarts=1 NumNodes=2", "preempted"),  # without a grace time
        ("COMPLETING", "Requeue=0 Restarts=0 NumNodes=2 PreemptTime=2026-11-20T21:37:23", "preempted"),
        ("COMPLETING", "Requeue=1 Restarts=1 NumNodes=1", "node_fail"),
        ("COMPLETING", "Requeue=1 Restarts=0 NumNodes=1 PreemptTime=None", "cancelled"),  # the other node is done
        ("COMPLETING", "Reason=NodeDown Requeue=0 Restarts=0 NumNodes=1 PreemptTime=None", "node_fail"),
        ("COMPLETING", FIELDS + " Reason=JobLaunchFailure ExitCode=0:9 PreemptTime=None", None),
        ("COMPLETING", FIELDS + " RunTime=00:01:01 TimeLimit=00:01:00 PreemptTime=None", "timeout"),
        ("RUNNING", FIELDS + " RunTime=00:00:41 TimeLimit=00:01:00 PreemptTime=None", None),
        ("SIGNALING", FIELDS + " PreemptTime=None", None),
    ],
)
def test_the_cause_of_an_end_follows_from_slurms_fields(state, fields, cause):
    parsed = scheduler.parse_job("12", f"JobId=12 JobState={state} {fields}\n")
    assert scheduler.infer_cause(parsed, restart=0, nodes=2) == cause
    assert parsed.requeue_enabled is ("Requeue=0" not in fields)


def test_a_requeue_is_requested_again_until_slurm_refuses_it_for_good(monkeypatch):
    messages = ["busy", scheduler.REQUEUE_DISABLED + " for job 12"]
    answers = [scheduler.subprocess.CompletedProcess([], 1, "", message) for message in messages]
    monkeypatch.setattr(scheduler, "query_job_or_unknown", lambda job: scheduler.JobState("RUNNING"))
    monkeypatch.setattr(scheduler, "run_command", lambda *words: answers.pop(0))
    monkeypatch.setattr(scheduler.time, "sleep", lambda seconds: None)
    assert scheduler.request_requeue("12").startswith(scheduler.REQUEUE_DISABLED) and not answers


@pytest.mark.parametrize(
    ("states", "requested", "refusal"),
    [
        (["UNKNOWN", "RUNNING"], 1, None),
        (["UNKNOWN", scheduler.GONE], 0, "SLURM no longer knows this job"),
        (["UNKNOWN", "UNKNOWN", "UNKNOWN"], 0, "no answer"),
    ],
)
def test_no_requeue_is_requested_before_slurm_has_said_whose_job_it_is(monkeypatch, states, requested, refusal):
    """A controller that does not answer may come back without its state, and give the number to another job."""
    states = iter(states)
    requests = []

    def run_command(*words):
        requests.append(words)
        return scheduler.subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(
        scheduler, "query_job_or_unknown", lambda job: scheduler.JobState(next(states), hint="no answer")
    )
    monkeypatch.setattr(scheduler, "run_command", run_command)
    monkeypatch.setattr(scheduler.time, "sleep", lambda seconds: None)
    assert scheduler.request_requeue("12") == refusal
    assert requests == [("scontrol", "requeue", "12")] * requested


NODES = """\
NodeName=n1 State=MIXED BootTime=2026-11-20T14:44:09 SlurmdStartTime=2026-11-20T21:32:07
NodeName=n2 State=DOWN+NOT_RESPONDING BootTime=None SlurmdStartTime=2026-11-20T21:32:07 Reason=x
"""


@pytest.mark.parametrize(("begin", "lost"), [("2026-11-20T21:40:00", ["n2"]), ("2026-11-20T21:30:00", ["n1", "n2"])])
def test_lost_nodes_are_down_or_were_started_after_the_attempt(monkeypatch, begin, lost):
    answer = scheduler.subprocess.CompletedProcess([], 0, NODES, "")
    monkeypatch.setattr(scheduler, "run_command", lambda *words: answer)
    assert scheduler.find_lost_nodes("n[1-2]", to_unix_time(begin)) == lost
    assert scheduler.find_lost_nodes("n[1-2]", to_unix_time(begin), only_down=True) == ["n2"]


@pytest.mark.parametrize("state", ["ALLOCATED+NOT_RESPONDING", "IDLE*"])
def test_a_node_that_does_not_answer_is_lost_but_not_down(monkeypatch, state):
    answer = scheduler.subprocess.CompletedProcess([], 0, NODES.replace("DOWN+NOT_RESPONDING", state), "")
    monkeypatch.setattr(scheduler, "run_command", lambda *words: answer)
    assert scheduler.find_lost_nodes("n[1-2]", math.inf) == ["n2"]
    assert scheduler.find_lost_nodes("n[1-2]", math.inf, only_down=True) == []
