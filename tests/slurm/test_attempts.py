"""When another attempt is asked for."""

import pytest

from hpcssl.files import RunDir, append_line, read_lines
from hpcssl.signals import StopFlag
from slurm import after, attempts, job, records


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
    ("done", 0, 0, "done"), ("stopped", 75, 0, "stopped"), (None, 143, 1, "stopped"), (None, 138, 1, "stopped"),
    (None, 137, 1, "killed"), (None, 1, 1, "killed"), ("error", 1, 1, "error"),
    ("error", 75, 1, "error"),  # the others left with 75, and srun gives the highest code
])
def test_the_batch_script_asks_for_what_the_tasks_could_not(run, batch, before, code, asks, cause):
    lived(run, (before, 0, 3))
    assert after.settle(run, "train", code) == (1 if (before, code) == ("error", 75) else code, bool(asks))
    assert batch == ["7"] * asks
    assert attempts.history(run)[-1].cause == cause


def test_nobody_asks_for_a_cancelled_job(run, batch):
    records.note(run, "cancel", "7")
    assert after.settle(run, "train", 143) == (143, False)
    assert batch == []
