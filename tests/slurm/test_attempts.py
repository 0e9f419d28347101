"""When another attempt is asked for."""

import pytest

from hpcssl.files import RunDir, append_line, read_lines
from hpcssl.signals import StopFlag
from slurm import after, again, attempts, job, records, sched, successor


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def lived(run, *ends):
    """Attempts one after the other: (cause, first step, last step); cause None leaves one open."""
    for number, (cause, first, last) in enumerate(ends, 1):
        append_line(run.attempts, {"attempt": number, "event": "start", "job": "7", "restart": number - 1,
                                   "first_step": first})
        if cause:
            append_line(run.attempts, {"attempt": number, "event": "end", "cause": cause, "last_step": last})


@pytest.mark.parametrize(("ends", "again"), [
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
    *[([("error", 0, 5), (free, 5, 5), ("hang", 5, 5)], True)
      for free in ("timeout", "preempted", "node_fail", "stopped", "interrupted", "lost")],
    ([("node_fail", 0, 5)] * 9, True),
    ([("timeout", 5, 5)] * 9, True),
])
def test_two_crashes_in_a_row_at_the_same_step_end_the_asking(run, ends, again):
    lived(run, *ends)
    assert attempts.verdict(attempts.history(run)).again is again


def test_an_attempt_that_was_followed_without_an_end_was_lost(run):
    lived(run, (None, 0, None), ("stopped", 3, 4))
    assert [a.cause for a in attempts.history(run)] == ["lost", "stopped"]


def test_a_death_without_a_word_is_closed_with_the_step_of_the_journal(run):
    lived(run, (None, 0, None))
    for step in range(1, 400):
        append_line(run.journal, {"step": step, "loss": 1.0})
    with open(run.journal, "ab") as torn:
        torn.write(b'{"step": 40')
    verdict = attempts.settle(run, "train", {"attempt": 1, "job": "7", "restart": 0}, "killed by something")
    last = attempts.history(run)[-1]
    assert (last.cause, last.last_step, last.error) == ("killed", 399, "killed by something")
    assert verdict.again
    assert "step 399" in verdict.why


def test_an_attempt_that_died_before_its_first_line_is_counted(run):
    about = {"attempt": 1, "job": "7", "restart": 0}
    assert attempts.settle(run, "train", about, "died at import").again
    assert not attempts.settle(run, "train", about | {"attempt": 2, "restart": 1}, "died at import").again


def test_the_first_word_on_a_crash_stands(run):
    lived(run, ("error", 0, 5))
    attempts.end(run, "train", {"attempt": 1}, "error", "rank 3: connection closed by peer")
    append_line(run.attempts, {"attempt": 1, "event": "end", "cause": "stopped", "last_step": 5})
    assert (attempts.history(run)[0].cause, attempts.history(run)[0].error) == ("error", "")


@pytest.mark.parametrize(("words", "stands"), [
    (["error", "killed"], "killed"), (["killed", "error"], "killed"), (["error", "hang", "error"], "hang"),
    (["killed", "node_fail", "error"], "node_fail"), (["stopped", "killed"], "killed"), (["error", "done"], "error")])
def test_what_is_known_better_later_stands(run, words, stands):
    lived(run, (words[0], 0, 5))
    for word in words[1:]:
        attempts.end(run, "train", {"attempt": 1}, word)
    assert [a.cause for a in attempts.history(run)] == [stands]


def test_nothing_that_is_left_over_changes_an_earlier_attempt(run):
    lived(run, ("preempted", 0, 5), (None, 5, None))
    attempts.end(run, "train", {"attempt": 1}, "killed", "late")
    assert [a.cause for a in attempts.history(run)] == ["preempted", None]
    # but who was refused, because an earlier attempt lives, has never begun: the earlier one may still end
    attempts.end(run, "train", {"attempt": 3, "job": "8", "restart": 0}, "error", "a running writer")
    attempts.end(run, "train", {"attempt": 2}, "timeout")
    assert [a.cause for a in attempts.history(run)] == ["preempted", "timeout", "error"]


@pytest.mark.parametrize(("ends", "said"), [
    ([("timeout", 4, 4)] * 3, "ended before their first step (timeout): raise --time"),
    ([("stopped", 0, 0)] * 4, "before their first step (stopped): see the logs"),
    ([("timeout", 4, 4)] * 2, ""), ([("timeout", 4, 4), ("timeout", 4, 5), ("timeout", 5, 5)], ""),
    ([("timeout", 4, 4), ("killed", 4, 4), ("timeout", 4, 4)], "")])
def test_attempts_that_never_take_a_step_are_told(run, ends, said):
    lived(run, *ends)
    told = attempts.stuck(attempts.history(run))
    assert said in told if said else told == ""


@pytest.fixture
def slurm_says(monkeypatch):
    """What SLURM answers about job 7, and whether it requeues it."""
    asked = []

    def says(**state):
        monkeypatch.setattr(again.sched, "ask_quietly", lambda job, cluster=None: sched.State(**state))
        monkeypatch.setattr(again.sched, "requeue", asked.append)
        monkeypatch.setattr(again.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        monkeypatch.delenv("HPCSSL_LOCAL_JOB", raising=False)
        return asked
    return says


MINE = {"attempt": 1, "job": "7", "restart": 0}


@pytest.mark.parametrize(("state", "signals", "cause", "asks"), [
    ({"name": "RUNNING"}, ["SIGTERM"], "stopped", 1),
    ({"name": "RUNNING", "left_s": 200}, ["SIGUSR2"], "timeout", 1),
    ({"name": "RUNNING", "left_s": 200}, ["SIGTERM"], "stopped", 1),
    ({"name": "RUNNING", "left_s": 4000}, ["SIGUSR2"], "stopped", 1),
    ({"name": "RUNNING", "preempted": True, "left_s": 20}, ["SIGUSR2"], "preempted", 1),
    ({"name": "COMPLETING"}, ["SIGTERM"], "cancelled", 0),
    ({"name": "COMPLETING", "restarts": 1}, ["SIGTERM"], "preempted", 0),  # SLURM has done it
    ({"name": "COMPLETING", "restarts": 1, "nodes": 1}, ["SIGTERM"], "node_fail", 0),
    ({"name": "RUNNING", "restarts": 1}, ["SIGTERM"], "preempted", 0),  # left over: the next attempt runs already
])
def test_who_asks_for_the_next_attempt(run, slurm_says, state, signals, cause, asks):
    asked = slurm_says(**state)
    answer = again.after_stop(run, "train", MINE, signals)
    assert answer.cause == cause and len(asked) == asks
    assert (answer.refused is None) is (cause != "cancelled")


def test_whoever_sent_the_signal_says_why_but_slurm_knows_of_a_cancel(run, slurm_says):
    records.note(run, "signal", "7", restart=0, cause="preempted")
    slurm_says(name="RUNNING")
    assert again.after_stop(run, "train", MINE, ["SIGTERM"]).cause == "preempted"
    slurm_says(name="RUNNING", restarts=1)
    assert again.after_stop(run, "train", MINE | {"attempt": 2, "restart": 1}, ["SIGTERM"]).cause == "stopped"
    slurm_says(name="COMPLETING")
    assert again.after_stop(run, "train", MINE, ["SIGTERM"]).cause == "cancelled"


def test_a_lost_node_is_written_down_by_the_next_attempt(run, slurm_says, monkeypatch):
    monkeypatch.delenv("HPCSSL_LOCAL_JOB", raising=False)
    records.note(run, "submit", "7", what="train", kind="slurm", options={})
    append_line(run.attempts, {**MINE, "event": "start", "first_step": 0, "host": "n[1-2]", "time": 5.0})
    attempts.end(run, "train", MINE, "error", "connection closed by peer")
    monkeypatch.setattr(again.sched, "lost_nodes", lambda nodes, since: ["n2"] * ((nodes, since) == ("n[1-2]", 5.0)))
    again.explain_before(run, "train", MINE | {"attempt": 2, "job": "8"})  # of another job: none of its business
    assert attempts.history(run)[0].cause == "error"
    again.explain_before(run, "train", MINE | {"attempt": 2, "restart": 1})
    assert (attempts.history(run)[0].cause, attempts.history(run)[0].error) == ("node_fail", "lost n2")


def test_dependants_move_to_the_successor(monkeypatch):
    waits = ("13|afterok:12(unfulfilled)\n14|afterany:12(unfulfilled)\n15|afterok:112(unfulfilled)\n"
             "16|afterok:11:12:13(unfulfilled),afternotok:12(unfulfilled)\n17|(null)\n20|afterany:12(unfulfilled)\n")
    said = []

    def call(program, *words, cluster=None):
        said.extend([words[1:]] if program == "scontrol" else [])
        return sched.subprocess.CompletedProcess([], 0, waits, "")
    monkeypatch.setattr(successor.sched, "call", call)
    assert successor.relink("12", "20") == ["13", "14", "16"]
    assert said == [("jobid=13", "dependency=afterok:20"), ("jobid=14", "dependency=afterany:20"),
                    ("jobid=16", "dependency=afterok:11:20:13,afternotok:20")]


@pytest.mark.parametrize(("what", "signal", "cause"), [
    ("svm", None, "error"), ("svm", "SIGTERM", "stopped"), ("train", "SIGTERM", "error")])
def test_an_evaluation_that_fails_after_a_signal_was_stopped(run, what, signal, cause):
    stop = StopFlag()
    stop.set(signal) if signal else None
    for sentence in ("a worker died", "another one died"):  # on two ranks, one after the other
        job._crashed(run, what, {"attempt": 1, "job": "7", "restart": 0}, None, sentence, stop)
    assert [(a.cause, a.error) for a in attempts.history(run, what)] == [(cause, "rank 0: a worker died")]
    assert len(read_lines(run.jobs if what == "svm" else run.attempts)) == 2


def test_evaluations_are_counted_apart(run):
    lived(run, ("error", 0, 5))
    attempts.begin(run, "knn", {"attempt": 1, "job": "8", "restart": 0})
    attempts.end(run, "knn", {"attempt": 1}, "error", "no weights")
    attempts.begin(run, "linear", {"attempt": 1, "job": "9", "restart": 0})
    assert [a.cause for a in attempts.history(run, "knn")] == ["error"]
    assert [a.cause for a in attempts.history(run, "linear")] == [None]
    assert attempts.next_number(run, "knn") == 2
    assert attempts.next_number(run, "svm") == 1


@pytest.fixture
def batch(monkeypatch):
    """In the batch script of job 7; what was asked of SLURM."""
    asked = []
    monkeypatch.setattr(after.sched, "requeue", asked.append)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("HPCSSL_LOCAL_JOB", raising=False)
    return asked


@pytest.mark.parametrize(("before", "code", "asks", "cause"), [
    ("done", 0, 0, "done"), ("stopped", 75, 1, "stopped"), ("cancelled", 75, 0, "cancelled"),
    ("done", 137, 0, "done"), (None, 143, 1, "stopped"), (None, 138, 1, "stopped"),
    (None, 137, 1, "killed"), (None, 1, 1, "killed"), ("error", 1, 1, "error"),
    ("error", 75, 1, "error"),  # the others left with 75, and srun gives the highest code
])
def test_the_batch_script_asks_for_what_the_tasks_could_not(run, batch, before, code, asks, cause):
    lived(run, (before, 0, 3))
    shown = 1 if (before, code) == ("error", 75) else 0 if before == "done" else code
    assert after.settle(run, "train", code) == (shown, bool(asks))
    assert batch == ["7"] * asks
    assert attempts.history(run)[-1].cause == cause


def test_nobody_asks_for_a_cancelled_job(run, batch):
    records.note(run, "cancel", "7")
    assert after.settle(run, "train", 143) == (143, False)
    assert batch == []
