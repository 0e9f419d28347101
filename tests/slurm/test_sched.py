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


@pytest.mark.parametrize(("state", "granted"), [
    (sched.State("RUNNING"), True), (sched.State("COMPLETING"), False), (sched.State("CANCELLED"), False),
    (sched.State("COMPLETING", out_of_time=True), True), (sched.State("UNKNOWN"), True),
    (sched.State("COMPLETING", preempted=True), True)])
def test_only_a_job_that_slurm_is_not_ending_is_requeued(monkeypatch, state, granted):
    asked = []
    monkeypatch.setattr(sched, "ask_quietly", lambda job: state)
    done = sched.subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(sched, "call", lambda *words: asked.append(words) or done)
    assert (sched.requeue("12") is None) is granted
    assert asked == ([("scontrol", "requeue", "12")] if granted else [])
