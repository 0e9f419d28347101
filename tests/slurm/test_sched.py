"""What SLURM says about a job, and what a person should do about it."""

import pytest

from slurm import sched

LINE = ("JobId=12 JobName=a b UserId=root(0) Priority=1 JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
        "Restarts=3 BatchFlag=1 ExitCode={code} RunTime={ran} TimeLimit=00:10:00 NodeList=n[1-2]\n")


def line(state="RUNNING", reason="None", code="0:0", ran="00:01:00"):
    return sched.parse("12", LINE.format(state=state, reason=reason, code=code, ran=ran))


def test_a_running_job():
    state = line()
    assert (state.name, state.reason, state.restarts, state.live, state.out_of_time) == ("RUNNING", "", 3, True, False)
    assert line(ran="00:10:02").out_of_time


@pytest.mark.parametrize(("state", "reason", "mend"), [
    ("PENDING", "launch_failed_requeued_held", "scontrol release 12"),
    ("PENDING", "DependencyNeverSatisfied", "scancel 12"),
    ("CANCELLED", "DependencyNeverSatisfied", "submit again"),
    ("PENDING", "BeginTime", "two minutes"),
    ("PENDING", "JobHeldUser", "scontrol release 12"),
    ("PENDING", "job_requeued_in_held_state", "scontrol release 12"),
])
def test_states_that_need_a_person_name_the_mend(state, reason, mend):
    assert mend in line(state, reason).note


def test_a_partition_that_cancels_what_it_preempts():
    text = LINE.format(state="PREEMPTED", reason="None", code="143:0", ran="00:01:00")
    ended = sched.parse("12", text + " PreemptTime=2026-11-20T18:37:38")
    assert ended.preempted and not ended.live and "submit again" in ended.note
    assert not sched.parse("12", text + " PreemptTime=None").preempted


def test_an_ended_job_waits_for_nothing():
    assert line("CANCELLED", "BeginTime").note == line("RUNNING").note == ""
    assert not line("COMPLETED").live


@pytest.mark.parametrize(("code", "shown"), [("0:0", 0), ("75:0", 75), ("0:15", 143), ("1:0", 1)])
def test_exit_codes(code, shown):
    assert line("FAILED", code=code).exit_code == shown


SAID = "Requeue=1 Restarts=0 NumNodes=2"


@pytest.mark.parametrize(("state", "fields", "cause"), [  # as 22.05 showed them while rank 0 handled the signal
    ("COMPLETING", SAID + " ExitCode=0:15 PreemptTime=None", "cancelled"),
    ("RUNNING", SAID + " PreemptTime=2026-11-20T21:32:18", "preempted"),
    ("COMPLETING", "Requeue=1 Restarts=1 NumNodes=2", "preempted"),  # without a grace time
    ("COMPLETING", "Requeue=0 Restarts=0 NumNodes=2 PreemptTime=2026-11-20T21:37:23", "preempted"),
    ("COMPLETING", "Requeue=1 Restarts=1 NumNodes=1", "node_fail"),
    ("COMPLETING", "Requeue=1 Restarts=0 NumNodes=1 PreemptTime=None", "cancelled"),  # the other node is done already
    ("COMPLETING", "Reason=NodeDown Requeue=0 Restarts=0 NumNodes=1 PreemptTime=None", "node_fail"),
    ("COMPLETING", SAID + " Reason=JobLaunchFailure ExitCode=0:9 PreemptTime=None", None),
    ("COMPLETING", SAID + " RunTime=00:01:01 TimeLimit=00:01:00 PreemptTime=None", "timeout"),
    ("RUNNING", SAID + " RunTime=00:00:41 TimeLimit=00:01:00 PreemptTime=None", None),
    ("SIGNALING", SAID + " PreemptTime=None", None),
])
def test_why_slurm_ends_a_job_is_read_from_its_own_words(state, fields, cause):
    now = sched.parse("12", f"JobId=12 JobState={state} {fields}\n")
    assert sched.cause(now, restart=0, nodes=2) == cause
    assert now.requeue is ("Requeue=0" not in fields)


def test_what_a_requeue_is_refused_with(monkeypatch):
    answers = [sched.subprocess.CompletedProcess([], 1, "", said) for said in ("busy", sched.DISABLED + " for job 12")]
    monkeypatch.setattr(sched, "call", lambda *words: answers.pop(0))
    monkeypatch.setattr(sched.time, "sleep", lambda seconds: None)
    assert sched.requeue("12").startswith(sched.DISABLED) and not answers


def test_nodes_that_have_gone_since_an_attempt_began(monkeypatch):
    text = ("NodeName=n1 State=MIXED BootTime=2026-11-20T14:44:09 SlurmdStartTime=2026-11-20T21:32:07\n"
            "NodeName=n2 State=DOWN+NOT_RESPONDING BootTime=None SlurmdStartTime=2026-11-20T21:32:07 Reason=x\n")
    monkeypatch.setattr(sched, "call", lambda *words: sched.subprocess.CompletedProcess([], 0, text))
    assert sched.lost_nodes("n[1-2]", sched._moment("2026-11-20T21:40:00")) == ["n2"]
    assert sched.lost_nodes("n[1-2]", sched._moment("2026-11-20T21:30:00")) == ["n1", "n2"]
