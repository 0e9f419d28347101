"""Effective training time: where the time of a training went, from its journal and its attempts."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.uptime import compute_share
from hpcssl.distributed.straggler import StepClock
from hpcssl.distributed.world import World
from hpcssl.files import append_line, read_lines
from hpcssl.journal import Journal
from hpcssl.run_dir import RunDir
from hpcssl.timing.phase_clock import PhaseClock, read_totals
from hpcssl.timing.uptime import Uptime, measure_uptime, total


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def write_attempt(run, number, restart, began, trained, ended=None, cause="killed", **fields):
    about = {"attempt": number, "job": "7", "restart": restart}
    append_line(run.attempts, {**about, "event": "start", "first_step": 0, "began": began, "time": trained})
    if ended is not None:
        append_line(run.attempts, {**about, "event": "end", "cause": cause, "time": ended, **fields})


def test_a_clock_adds_up_the_seconds_of_each_category():
    now = iter(range(0, 1000, 10))
    clock = PhaseClock(lambda: next(now))  # begins at 0
    for phase in ("data", "step", "save", "step", "export", "evaluate", "lock"):
        clock.enter(phase)
    assert clock.take() == {"other": 20, "data": 10, "step": 20, "save": 10, "eval": 20}
    assert clock.take() == {"other": 10}


def test_the_time_of_a_run_that_was_never_disturbed(run):
    append_line(run.jobs, {"event": "submit", "job": "7", "time": "1970-01-01T00:15:00+0000"})
    write_attempt(run, 1, 0, 1000, 1030, 1200, "done", unlogged_s={"save": 7})
    append_line(run.journal, {"step": 5, "total_step_s": 80, "total_data_s": 20})
    append_line(run.journal, {"step": 6})
    append_line(
        run.journal, {"step": 10, "total_step_s": 130, "total_data_s": 20, "total_save_s": 3, "total_eval_s": 10}
    )
    uptime = measure_uptime(run, 9999)
    assert uptime == Uptime(step=130, data=20, save=10, eval=10, start=30, lost=0, queue=100)
    assert uptime.allocated == 200 and uptime.share == 130 / 200
    assert uptime.describe().startswith("65.0% of 200 s ") and "start 15.0%, data 10.0%" in uptime.describe()


def test_a_relaunch_costs_allocated_time_and_a_requeue_time_in_the_queue(run):
    """Attempt 1 crashed at 1100; attempt 2 began 5 s later in the same allocation, and attempt 3 after a requeue."""
    write_attempt(run, 1, 0, 1000, 1010, 1100)
    write_attempt(run, 2, 0, 1105, 1115, 1200, "preempted")
    write_attempt(run, 3, 1, 1500, 1510)
    append_line(run.journal, {"step": 19, "total_step_s": 190})
    uptime = measure_uptime(run, 1600)
    assert uptime == Uptime(step=190, start=30, lost=300 - 190 - 30, queue=300)


def test_an_attempt_without_an_end_lasts_until_the_next_one_or_until_now(run):
    write_attempt(run, 1, 0, 1000, 1010)
    assert measure_uptime(run, 1100).allocated == 100
    write_attempt(run, 2, 0, 1200, 1210)
    assert measure_uptime(run, 1300).allocated == 300


@pytest.mark.parametrize(("seen", "allocated"), [(None, 10), ("1970-01-01T00:18:00+0000", 80)])
def test_the_time_in_the_queue_after_an_unknown_end_is_not_allocated(run, seen, allocated):
    """Attempt 1 lost its node; the next one, after a requeue, has recorded its end. ``seen``: by its batch script."""
    write_attempt(run, 1, 0, 1000, 1010, 9005, "node_fail")
    if seen:
        append_line(run.jobs, {"event": "step", "job": "7", "what": "train", "attempt": 1, "code": 1, "time": seen})
    write_attempt(run, 2, 1, 9000, 9010, 9100, "done")
    uptime = measure_uptime(run, 9999)
    assert (uptime.allocated, uptime.queue) == (allocated + 100, 8000 - allocated)


def test_records_without_times_and_damaged_lines_do_not_fail(run):
    assert measure_uptime(run, 1.0) is None
    run.attempts.write_text(
        json.dumps({"event": "start", "attempt": 1, "time": "soon", "began": None})
        + '\n5\n{"event": "end", "attempt": 1, "time": null}\n'
    )
    run.journal.write_text('{"step": 1, "total_step_s": "x"}\n')
    assert measure_uptime(run, 0.0).share == 0.0


@pytest.mark.parametrize("lines_after", [0, 10, 20_000])
def test_the_totals_are_found_however_many_lines_follow_them(run, lines_after):
    """The later ones count, a line that was cut short does not, and most of a long journal is not read."""
    step = json.dumps({"step": 2, "loss": 1.0}) + "\n"
    totals = [json.dumps({"step": 1, "total_step_s": seconds, "total_data_s": 1}) + "\n" for seconds in (5.0, 7.5)]
    run.journal.write_text(step * 30_000 + totals[0] + step + totals[1] + step * lines_after + '{"total_step_s": 9')
    assert read_totals(run.journal) == {"step": 7.5, "data": 1.0, "save": 0.0, "eval": 0.0, "other": 0.0}


def test_a_resumed_journal_goes_on_with_the_totals_at_its_step(run):
    """Step 2 is made again: what it took the first time is not in the totals."""
    world = World.single_process()
    for first_step, seconds in ((0, [10.0, 20.0]), (1, [40.0])):
        taken = iter([{"step": value} for value in seconds])
        phases = SimpleNamespace(take=lambda taken=taken: next(taken))
        world.heartbeat = SimpleNamespace(activity=SimpleNamespace(phases=phases), clock=StepClock())
        journal = Journal(run, world, first_step=first_step, last_step=9, every=1, batch=1)
        for number in range(len(seconds)):
            journal.write(first_step + number + 1, loss=1.0)
        journal.close()
    assert [line["total_step_s"] for line in read_lines(run.journal)] == [10.0, 50.0]
    assert read_totals(run.journal)["step"] == 50.0


def test_the_times_of_several_runs_are_added():
    assert total([Uptime(step=1, lost=2), Uptime(step=3, queue=1)]) == Uptime(step=4, lost=2, queue=1)


def test_the_share_of_a_large_cluster_follows_from_its_faults():
    """2.0e-5 faults per GPU and hour on 512 GPUs are 0.0101 per hour; each costs 60 s and half of 15 minutes."""
    assert compute_share(512, 60.0, 900.0, 0.1) == pytest.approx(0.9985, abs=5e-5)
    assert compute_share(0, 60.0, 900.0, 9.0) == 0.99
