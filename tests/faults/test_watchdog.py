"""Ranks that stop, hang, fail, die or never come are named by the others, and no rank is blamed for being slow.

The scenarios run in ``watched.py``. The reports are sentences in ``attempts.jsonl``; the tests read ranks, nodes,
processes, positions and collectives from them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpcssl.distributed import launch, straggler
from hpcssl.distributed.liveness import hang_report
from hpcssl.distributed.liveness.record import HeartbeatRecord
from hpcssl.distributed.straggler import QUIET_FLUSHES, SAMPLE_EVERY, StepClock, StragglerDetector
from hpcssl.errors import ConfigError
from hpcssl.train import recipe
from tests.printed import numbers_in

BASE = [
    "machine.devices=cpu",
    "views.size=16",
    "optim.batch=16",
    "bank.size=24",
    "schedule.steps=6",
    "machine.checkpoint_steps=2",
    "machine.checkpoint_minutes=0",
    "machine.log_steps=2",
]
LONG = ["schedule.steps=12"]  # longer than what the loader has read ahead
PATIENT = 4  # the limit where no hang may be reported
SHORT_RENDEZVOUS = ["machine.timeout_minutes=0.1"]  # for ranks that never come; no rank that comes has to be in time
RAISED = "ValueError: sample 7 is invalid"


def make_scenario(name, fault="none", *, world_size=2, rank=1, overrides=(), hang_units=1, **fields):
    """A scenario of watched.py."""
    return {
        "name": name,
        "fault": fault,
        "world_size": world_size,
        "rank": rank,
        "step": 3,
        "overrides": list(overrides),
        "hang_units": hang_units,
        **fields,
    }


QUICK = [
    make_scenario("stop", "sigstop"),
    make_scenario("slow", "slow", hang_units=PATIENT),
    make_scenario("raise", "raise"),
    make_scenario("stuck", "stuck_read", rank=0, overrides=LONG),
    make_scenario("kill", "sigkill"),
    make_scenario("mismatch", "mismatch"),
    make_scenario("other attempt", tokens=["job.2", "job.1"], overrides=SHORT_RENDEZVOUS),
    make_scenario("stop while 2 is missing", world_size=3, absent=[2], sigterm_rank=1),
]
FULL = [
    make_scenario("stop 0 of 2", "sigstop", rank=0),
    make_scenario("stop 2 of 4", "sigstop", world_size=4, rank=2),
    make_scenario("stuck 3 of 4", "stuck_read", world_size=4, rank=3, overrides=LONG),
    make_scenario("sleep", "sleep"),
    make_scenario("mismatch 1 of 4", "mismatch", world_size=4),
    make_scenario("raise 0 of 2", "raise", rank=0),
    make_scenario("raise 2 of 4", "raise", world_size=4, rank=2),
    make_scenario("kill 0 of 2", "sigkill", rank=0),
    make_scenario("kill 2 of 4", "sigkill", world_size=4, rank=2),
    make_scenario("kill 0 of 4", "sigkill", world_size=4, rank=0),
    make_scenario("single process", "sleep", world_size=1, rank=0),
    make_scenario("no limit", "slow", hang_units=0),
    make_scenario("suspended", suspend_limits=2.5),
    make_scenario("debugger", "debugger"),
    make_scenario("1 and 3 are missing", world_size=4, rank=0, absent=[1, 3], overrides=SHORT_RENDEZVOUS),
    make_scenario("0 is missing", absent=[0], overrides=SHORT_RENDEZVOUS),
    make_scenario("stop while 0 is missing", absent=[0], sigterm_rank=1),
]


@pytest.fixture(scope="module")
def run_scenarios(shards, tmp_path_factory):
    """``run_scenarios(scenarios)``: the outcomes by name, from one process that forks the ranks of all of them."""

    def run(scenarios):
        folder = tmp_path_factory.mktemp("watched")
        scenarios = [
            scenario
            | {
                "run": str(folder / scenario["name"].replace(" ", "-")),
                "overrides": [f"data.train={shards.root}", *BASE, *scenario["overrides"]],
            }
            for scenario in scenarios
        ]
        (folder / "plan.json").write_text(json.dumps(scenarios))
        command = [sys.executable, str(Path(__file__).with_name("watched.py")), str(folder / "plan.json")]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, text=True, timeout=1700, capture_output=True, env=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return {scenario["name"]: json.loads(Path(scenario["run"] + ".json").read_text()) for scenario in scenarios}

    return run


@pytest.fixture(scope="module")
def quick(run_scenarios):
    return run_scenarios(QUICK)


@pytest.fixture(scope="module")
def full(run_scenarios):
    return run_scenarios(FULL)


def get_end(outcome, codes, cause):
    """The only end of the attempt. Every rank must have left by itself, with these codes."""
    assert outcome["in_time"] and outcome["codes"] == codes, outcome
    assert [end["cause"] for end in outcome["ends"]] == [cause], outcome["ends"]
    return outcome["ends"][0]


def find_blamed(sentence):
    """(rank, node) of every rank that the sentence names with its process."""
    return [(int(rank), node) for rank, node in re.findall(r"rank (\d+) on (\w+) \(process \d+\)", sentence)]


def find_positions(sentence):
    """(step, phase) of every position in the sentence."""
    return [(int(step), phase) for step, phase in re.findall(r"step (\d+), phase (\w+)", sentence)]


# -- in processes ---------------------------------------------------------------------------------------------------


def test_a_suspended_rank_is_named_and_the_others_leave(quick):
    end = get_end(quick["stop"], [1, -9], "hang")
    assert find_blamed(end["why"]) == [(1, "n1")]
    assert len(find_positions(end["why"])) == 1
    assert end["last_step"] == 3
    assert "most recent call first" in quick["stop"]["logs"][0], "the stacks of all threads"
    assert "in all_gather" in quick["stop"]["logs"][0]


def test_a_rank_whose_loader_hangs_is_named_with_the_loaders_thread(quick):
    end = get_end(quick["stuck"], [1, 1], "hang")
    assert find_blamed(end["why"]) == [(0, "n0")]
    assert find_positions(end["why"])[0][1] == "data"
    assert "loader-0 at faults/watched.py" in end["why"]
    for log in quick["stuck"]["logs"]:
        assert end["why"][:60] in log, "every rank reports the same sentence"


def test_a_mismatched_collective_is_reported_with_both_calls(quick):
    why = get_end(quick["mismatch"], [1, 1], "hang")["why"]
    assert find_positions(why) == [(4, "step")]
    for rank, call in enumerate(("all_gather of float32 [3]", "all_reduce_sum of float32 [3]")):
        assert re.search(rf"rank {rank} on n{rank} in collective \d+ \({re.escape(call)}\)", why)


def test_the_error_of_the_rank_that_fails_is_recorded_and_not_its_consequences(quick):
    end = get_end(quick["raise"], [1, 1], "error")
    assert end["why"] == f"rank 1: {RAISED}"
    assert end["last_step"] == 3
    assert RAISED in quick["raise"]["logs"][0], "the other rank reports the reason as well"


def test_a_killed_rank_is_named(quick):
    why = get_end(quick["kill"], [1, -9], "killed")["why"]
    assert find_blamed(why) == [(1, "n1")]
    assert len(find_positions(why)) == 1


def test_one_slow_step_is_not_a_hang(quick):
    assert get_end(quick["slow"], [0, 0], "done")["last_step"] == 6


def test_a_rank_of_another_attempt_is_refused(quick):
    outcome = quick["other attempt"]
    assert outcome["codes"] == [1, 1]
    assert "rank 1 of attempt job.1: attempt job.2 at 127.0.0.1:" in outcome["logs"][1]
    assert "rank 1 of 2 " in outcome["logs"][0] and "0.1 minutes" in outcome["logs"][0]
    assert not outcome["ends"]


def test_a_stop_while_ranks_are_missing_stops_all_that_came(quick):
    outcome = quick["stop while 2 is missing"]
    assert outcome["in_time"] and outcome["codes"] == [75, 75, None], outcome
    for rank, log in enumerate(outcome["logs"][:2]):
        assert f"errors.Stopped: rank {rank} " in log and "rank 2 of 3 " in log


def test_a_process_ends_although_its_file_system_hangs():
    code = """
import threading
from hpcssl.distributed.liveness import hang_monitor, heartbeat
from hpcssl.distributed.liveness.limits import PhaseLimits
hang_monitor.EXIT_TIMEOUT_S = 0.1
hang = threading.Event().wait
heartbeat.Heartbeat(None, limits=PhaseLimits(0.1), leave=lambda *_: hang()).start()
hang()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], text=True, timeout=60, capture_output=True, cwd=root)
    assert done.returncode == 1 and [rank for rank, _ in find_blamed(done.stderr)] == [0], done.stderr


@pytest.mark.full
def test_a_stop_while_rank_0_is_missing(full):
    outcome = full["stop while 0 is missing"]
    assert outcome["in_time"] and outcome["codes"] == [None, 75], outcome
    assert "errors.Stopped: rank 1 " in outcome["logs"][1] and "while rank 0 " in outcome["logs"][1]


@pytest.mark.full
@pytest.mark.parametrize(("name", "codes"), [("stop 0 of 2", [-9, 1]), ("stop 2 of 4", [1, 1, -9, 1])])
def test_any_suspended_rank_is_named_and_no_other(full, name, codes):
    silent = codes.index(-9)
    why = get_end(full[name], codes, "hang")["why"]
    assert why.split(": ")[1].startswith(f"rank {silent} on n{silent} ")
    assert find_blamed(why) == [(silent, f"n{silent}")]


@pytest.mark.full
def test_a_hang_of_any_rank_is_reported_where_it_is(full):
    why = get_end(full["stuck 3 of 4"], [1] * 4, "hang")["why"]
    assert find_blamed(why) == [(3, "n3")] and find_positions(why)[0][1] == "data"
    why = get_end(full["sleep"], [1, 1], "hang")["why"]
    assert find_blamed(why) == [(1, "n1")] and "watched.py" in why
    why = get_end(full["mismatch 1 of 4"], [1] * 4, "hang")["why"]
    assert "ranks 0, 2, 3 on n0, n2, n3 in collective" in why
    why = get_end(full["single process"], [1], "hang")["why"]
    assert find_blamed(why) == [(0, "n0")] and find_positions(why) == [(4, "step")]


@pytest.mark.full
@pytest.mark.parametrize(("name", "prefix"), [("raise 0 of 2", ""), ("raise 2 of 4", "rank 2: ")])
def test_the_error_of_any_rank_is_recorded(full, name, prefix):
    world_size = len(full[name]["codes"])
    assert get_end(full[name], [1] * world_size, "error")["why"] == prefix + RAISED


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "rank", "world_size"), [("kill 0 of 2", 0, 2), ("kill 2 of 4", 2, 4), ("kill 0 of 4", 0, 4)]
)
def test_any_killed_rank_is_named_and_no_other(full, name, rank, world_size):
    why = get_end(full[name], [-9 if r == rank else 1 for r in range(world_size)], "killed")["why"]
    assert why.startswith(f"rank {rank} on n{rank} ")
    assert find_blamed(why) == [(rank, f"n{rank}")]


@pytest.mark.full
@pytest.mark.parametrize("name", ["suspended", "debugger", "no limit"])
def test_no_hang_is_reported(full, name):
    assert get_end(full[name], [0, 0], "done")["last_step"] == 6


@pytest.mark.full
def test_ranks_that_never_come_are_named(full):
    for rank in (0, 2):
        log = full["1 and 3 are missing"]["logs"][rank]
        assert "ranks 1, 3 of 4 " in log and "0.1 minutes" in log
    assert "no rank 0 at 127.0.0.1:" in full["0 is missing"]["logs"][1]


# -- sentences, without processes -----------------------------------------------------------------------------------

IDLE_S = 600.0


def make_records(*changes):
    """Records by rank, two ranks per node, alike except for the changes of each rank."""
    alike = {
        "phase": "step",
        "step": 7,
        "idle": IDLE_S,
        "count": 40,
        "last": "all_reduce_sum of float32 [8]",
        "inside": True,
    }
    return {
        rank: HeartbeatRecord(**{"rank": rank, "host": f"n{rank // 2}", "pid": 100 + rank, **alike, **change})
        for rank, change in enumerate(changes)
    }


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ([{}, {}, {"phase": "data", "count": 38, "inside": False}, {}], 2),
        ([{}, {"step": 6, "count": 41}, {}, {}], 1),
        ([{}, {"count": 39, "inside": False}, {}, {}], 1),
        ([{"inside": False}, {}, {}, {}], 0),
    ],
)
def test_the_rank_for_which_the_others_wait_is_blamed(changes, rank):
    records = make_records(*changes)
    sentence = hang_report.describe_hang(records, {}, IDLE_S)
    assert find_blamed(sentence) == [(rank, f"n{rank // 2}")]
    assert f"(process {100 + rank})" in sentence
    assert f"{records[rank].position} for 600 s" in sentence


def test_a_collective_that_one_rank_skipped_is_a_mismatch():
    records = make_records({}, {}, {"count": 39, "last": "all_gather of int64 [4]"}, {})
    sentence = hang_report.describe_hang(records, {}, IDLE_S)
    assert hang_report.describe_mismatch(records) in sentence
    assert "ranks 0, 1, 3 on n0, n1 in collective 40 (all_reduce_sum of float32 [8])" in sentence
    assert "rank 2 on n1 in collective 39 (all_gather of int64 [4])" in sentence


def test_no_rank_is_blamed_when_all_wait_in_one_collective():
    records = make_records({}, {}, {}, {})
    sentence = hang_report.describe_hang(records, {}, IDLE_S)
    assert find_blamed(sentence) == [] and hang_report.describe_mismatch(records) == ""
    assert numbers_in(sentence)[:2] == [IDLE_S, 4]
    assert records[0].position in sentence and "collective 40 (all_reduce_sum of float32 [8])" in sentence


def test_the_nodes_of_the_blamed_ranks_are_found_in_the_sentence():
    silent = hang_report.describe_silent_ranks({2: 70.0, 3: 70.0}, make_records({}, {}, {}, {}))
    assert hang_report.named_nodes(silent) == ["n1"]


def test_a_silent_rank_is_blamed_first_and_a_long_sentence_is_cut():
    records = make_records({}, {"phase": "data", "count": 1, "stack": "x" * 5000})
    sentence = hang_report.describe_hang(records, {1: 25.0}, IDLE_S)
    assert len(sentence) == hang_report.MAX_CHARACTERS
    assert find_blamed(sentence) == [(1, "n0")]
    assert numbers_in(sentence) == [IDLE_S, 1, 101, 25, 7]
    assert f"{records[1].position}, at x" in sentence
    silent = hang_report.describe_silent_ranks({1: 25.0}, records)
    assert silent[:100] in sentence


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_an_invalid_limit_is_refused(value):
    with pytest.raises(ConfigError) as caught:
        recipe.compose("digits_msf", [f"machine.hang_minutes={value}"])
    assert caught.value.what == "machine.hang_minutes"
    assert caught.value.got == str(float(value))


@pytest.mark.parametrize("key", ["machine.max_rollbacks", "machine.replica_check_steps"])
def test_a_negative_count_is_refused(key):
    with pytest.raises(ConfigError) as caught:
        recipe.compose("digits_msf", [f"{key}=-1"])
    assert (caught.value.what, caught.value.got) == (key, "-1")
    assert numbers_in(caught.value.expected) == [0]


def test_each_restart_by_torchrun_is_an_attempt_of_its_own():
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "run",
    }
    tokens = [launch.detect_launcher(variables | {"TORCHELASTIC_RESTART_COUNT": n}).token for n in ("0", "1", "2")]
    assert tokens == ["run", "run.1", "run.2"]


# -- stragglers -----------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that the test moves.

    Attributes:
        now: The time in seconds.
    """

    def __init__(self):
        self.now = 1.0

    def __call__(self):
        return self.now


class FakeEvent:
    """A CUDA event.

    Args:
        clock: The time.
        completed: A list with one flag, which the test sets once the device has reached its events.
    """

    def __init__(self, clock, completed):
        self.time, self.completed = clock(), completed

    def query(self):
        return self.completed[0]

    def elapsed_time(self, later):
        return (later.time - self.time) * 1e3


def take_step(clock, time, data, work, inside):
    """Take one step: seconds of waiting for data, of work before and after a collective, and inside of it."""
    clock.wait_for_data()
    time.now += data
    clock.begin_step()
    time.now += work
    clock.enter_collective()
    time.now += inside
    clock.leave_collective()
    time.now += work
    clock.begin_last_backward()
    clock.enter_collective()  # of the last backward pass, which does not count
    time.now += 100
    clock.leave_collective()


def test_own_seconds_leave_out_collectives(monkeypatch):
    time = FakeTime()
    monkeypatch.setattr(straggler.time, "perf_counter", time)
    clock = StepClock()
    for inside in (0.0, 8.0):
        take_step(clock, time, data=1.0, work=2.0, inside=inside)
    assert clock.take() == pytest.approx((5.0, 1.0))
    assert clock.take() == (0.0, 0.0)


def test_on_a_gpu_events_are_read_once_they_have_completed(monkeypatch):
    time, completed = FakeTime(), [False]
    monkeypatch.setattr(straggler.time, "perf_counter", time)
    clock = StepClock(lambda: FakeEvent(time, completed))
    for _ in range(SAMPLE_EVERY):
        take_step(clock, time, data=1.0, work=2.0, inside=8.0)
    assert clock.take() == pytest.approx((1.0, 1.0)), "only the host's wait for data is known yet"
    completed[0] = True
    take_step(clock, time, data=0.5, work=7.0, inside=1.0)  # not one of the measured steps
    assert clock.take() == pytest.approx((4.5, 0.5))


def test_a_straggler_is_named_from_its_second_flush_on_and_not_at_every_flush():
    update = StragglerDetector(["n1", "n1", "n2", "n2"]).update
    even, late = [0.30, 0.31, 0.30, 0.33], [0.30, 0.31, 0.45, 0.33]
    assert update(even, [0.0] * 4)[1] == ""
    scalars, sentence = update(late, [0.0, 0.0, 0.12, 0.0])
    assert sentence == "", "once may be chance"
    assert scalars == {
        "own_s": pytest.approx(0.32),
        "data_s": pytest.approx(0.03),
        "slowest_rank": 2,
        "slowest_s": 0.45,
    }
    sentence = update(late, [0.0, 0.0, 0.12, 0.0])[1]
    assert sentence.startswith("rank 2 on n2 ")
    assert numbers_in(sentence) == [2, 0.45, 0.12, 0.31, 45]  # rank, own, data, the others' median, excess in percent
    named = [bool(update(late, [0.0] * 4)[1]) for _ in range(QUIET_FLUSHES)]
    assert named == [False] * (QUIET_FLUSHES - 1) + [True]
    assert update([0.001, 0.002, 0.001, 0.001], [0.0] * 4)[1] == "", "a millisecond does not count"
