"""Ranks that stop, hang, fail, die or never come are named by the others, and nobody is blamed for being slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcssl import diagnosis, launch, straggler
from hpcssl.diagnosis import Beat
from hpcssl.errors import ConfigError
from hpcssl.straggler import QUIET, SAMPLED, StepClock, Stragglers
from hpcssl.train import recipe

BASE = ["machine.devices=cpu", "views.size=16", "optim.batch=16", "bank.size=24", "schedule.steps=6",
        "machine.checkpoint_steps=2", "machine.checkpoint_minutes=0", "machine.log_steps=2"]
HANG = ["machine.hang_minutes=0.04"]
LONG = [*HANG, "schedule.steps=12"]  # longer than what the loader has read ahead
PATIENT = ["machine.hang_minutes=0.15"]  # where nothing may be found: a busy machine is no fault
SOON = ["machine.timeout_minutes=0.1"]


def fault(name, kind="none", *, world=2, rank=1, machine=HANG, **more):
    return {"name": name, "fault": kind, "world": world, "rank": rank, "at": 3, "machine": machine, **more}


QUICK = [fault("stop", "stop"), fault("slow", "slow", machine=PATIENT), fault("raise", "raise"),
         fault("stuck", "stuck_read", rank=0, machine=LONG), fault("kill", "kill"), fault("mismatch", "mismatch"),
         fault("stale", tokens=["job.2", "job.1"], machine=SOON), fault("told", world=3, absent=[2], term=1)]
FULL = [fault("stop0", "stop", rank=0), fault("stop 2 of 4", "stop", world=4, rank=2),
        fault("stuck 3 of 4", "stuck_read", world=4, rank=3, machine=LONG), fault("spin", "spin"),
        fault("mismatch 1 of 4", "mismatch", world=4), fault("raise0", "raise", rank=0),
        fault("raise 2 of 4", "raise", world=4, rank=2), fault("kill0", "kill", rank=0),
        fault("kill 2 of 4", "kill", world=4, rank=2), fault("kill 0 of 4", "kill", world=4, rank=0),
        fault("alone", "spin", world=1, rank=0), fault("off", "slow", machine=["machine.hang_minutes=0"]),
        fault("suspended", suspend=6, machine=HANG), fault("debugged", "debugged"),
        fault("missing", world=4, rank=0, absent=[1, 3], machine=SOON), fault("missing0", absent=[0], machine=SOON),
        fault("told0", absent=[0], term=1)]


@pytest.fixture(scope="module")
def played(shards, tmp_path_factory):
    """played(scenarios) -> {name: what came of it}, from one process that forks the ranks of all of them."""
    def run(plans):
        folder = tmp_path_factory.mktemp("watched")
        plans = [plan | {"run": str(folder / plan["name"].replace(" ", "-")),
                         "overrides": [f"data.train={shards.root}", *BASE]} for plan in plans]
        (folder / "plan.json").write_text(json.dumps(plans))
        script = Path(__file__).with_name("watched.py")
        done = subprocess.run([sys.executable, str(script), str(folder / "plan.json")], text=True, timeout=540,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return {plan["name"]: json.loads(Path(plan["run"] + ".json").read_text()) for plan in plans}

    return run


@pytest.fixture(scope="module")
def quick(played):
    return played(QUICK)


@pytest.fixture(scope="module")
def full(played):
    return played(FULL)


def ended(outcome, codes, cause):
    """The only end of the attempt; every rank left by itself with these codes."""
    assert outcome["timely"] and outcome["codes"] == codes, outcome
    assert [x["cause"] for x in outcome["ends"]] == [cause], outcome["ends"]
    return outcome["ends"][0]


def test_a_stopped_rank_is_named_and_the_others_leave(quick):
    end = ended(quick["stop"], [1, -9], "hang")
    assert "rank 1 on n1 (process " in end["why"]
    assert "gone or stopped: no sign of life for" in end["why"]
    assert "last seen in step " in end["why"]
    assert end["last_step"] == 3
    assert "most recent call first" in quick["stop"]["logs"][0], "the stacks of all threads"
    assert "in gather" in quick["stop"]["logs"][0]


def test_a_stuck_loader_is_named_with_its_thread(quick):
    end = ended(quick["stuck"], [1, 1], "hang")
    assert "rank 0 on n0 (process " in end["why"]
    assert "is stuck in step " in end["why"]
    assert "phase data for" in end["why"]
    assert "loader-0 at faults/watched.py" in end["why"]
    for log in quick["stuck"]["logs"]:
        assert end["why"][:60] in log, "every rank tells the one sentence"


def test_a_mismatched_collective_shows_both_sides(quick):
    why = ended(quick["mismatch"], [1, 1], "hang")["why"]
    assert "mismatched collective in step 4, phase step" in why
    assert "rank 0 on n0 in collective" in why
    assert "(gather of float32 [3])" in why
    assert "rank 1 on n1 in collective" in why
    assert "(sum of float32 [3])" in why


def test_the_words_of_the_rank_that_fails_are_recorded_and_no_echo(quick):
    end = ended(quick["raise"], [1, 1], "error")
    assert end["why"] == "rank 1: ValueError: the seventh image of a rank's own"
    assert end["last_step"] == 3
    assert "ValueError: the seventh image" in quick["raise"]["logs"][0], "the other rank knows why it failed"


def test_a_killed_rank_is_named(quick):
    why = ended(quick["kill"], [1, -9], "killed")["why"]
    assert why.startswith("rank 1 on n1 (process ")
    assert "last seen in step " in why


def test_one_slow_step_is_no_hang(quick):
    assert ended(quick["slow"], [0, 0], "done")["last_step"] == 6


def test_a_rank_of_another_attempt_is_refused_at_once(quick):
    outcome = quick["stale"]
    assert outcome["codes"] == [1, 1]
    assert "rank 1 of attempt job.1: got attempt job.2 at 127.0.0.1:" in outcome["logs"][1]
    assert "rank 1 of 2 never came within 0.1 minutes" in outcome["logs"][0]
    assert not outcome["ends"]


def test_a_stop_while_ranks_are_missing_is_a_stop_of_all_that_came(quick):
    outcome = quick["told"]
    assert outcome["timely"] and outcome["codes"] == [75, 75, None], outcome
    for log in outcome["logs"][:2]:
        assert "a request to stop, while rank 2 of 3 had not come within" in log


def test_nobody_waits_for_a_file_system_that_answers_nobody():
    code = ("import threading\nfrom hpcssl import pulse\npulse.LAST_S = 0.1\nstuck = threading.Event().wait\n"
            "pulse.Pulse(None, hang_s=0.1, leave=lambda *_: stuck()).start()\nstuck()")
    done = subprocess.run([sys.executable, "-c", code], text=True, timeout=60, capture_output=True,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and "no progress for 0 s: rank 0 on" in done.stderr, done.stderr


@pytest.mark.full
def test_a_stop_while_rank_0_is_missing(full):
    outcome = full["told0"]
    assert outcome["timely"] and outcome["codes"] == [None, 75], outcome
    assert "a request to stop, while rank 0 had not come yet" in outcome["logs"][1]


@pytest.mark.full
@pytest.mark.parametrize(("name", "codes"), [("stop0", [-9, 1]), ("stop 2 of 4", [1, 1, -9, 1])])
def test_any_stopped_rank_is_named(full, name, codes):
    silent = codes.index(-9)
    why = ended(full[name], codes, "hang")["why"]
    assert why.split(": ")[1].startswith(f"rank {silent} on n{silent} ")
    assert why.count("no sign of life") == 1, "nobody else is blamed"


@pytest.mark.full
def test_hangs_elsewhere(full):
    why = ended(full["stuck 3 of 4"], [1] * 4, "hang")["why"]
    assert "rank 3 on n3" in why
    assert "phase data" in why
    why = ended(full["spin"], [1, 1], "hang")["why"]
    assert "rank 1 on n1" in why
    assert "watched.py" in why
    why = ended(full["mismatch 1 of 4"], [1] * 4, "hang")["why"]
    assert "ranks 0, 2, 3 on n0, n2, n3 in collective" in why
    why = ended(full["alone"], [1], "hang")["why"]
    assert "rank 0 on n0" in why
    assert "is stuck in step 4, phase step" in why


@pytest.mark.full
@pytest.mark.parametrize(("name", "who"), [("raise0", ""), ("raise 2 of 4", "rank 2: ")])
def test_any_rank_that_fails_has_the_word(full, name, who):
    world = len(full[name]["codes"])
    assert ended(full[name], [1] * world, "error")["why"] == who + "ValueError: the seventh image of a rank's own"


@pytest.mark.full
@pytest.mark.parametrize(("name", "rank", "world"), [("kill0", 0, 2), ("kill 2 of 4", 2, 4), ("kill 0 of 4", 0, 4)])
def test_any_killed_rank_is_named_alone(full, name, rank, world):
    why = ended(full[name], [-9 if r == rank else 1 for r in range(world)], "killed")["why"]
    assert why.startswith(f"rank {rank} on n{rank} ")
    assert why.count("(process ") == 1, why


@pytest.mark.full
@pytest.mark.parametrize("name", ["suspended", "debugged", "off"])
def test_no_false_alarm(full, name):
    assert ended(full[name], [0, 0], "done")["last_step"] == 6


@pytest.mark.full
def test_ranks_that_never_come_are_named(full):
    for rank in (0, 2):
        assert "ranks 1, 3 of 4 never came within 0.1 minutes" in full["missing"]["logs"][rank]
    assert "got no rank 0 at 127.0.0.1:" in full["missing0"]["logs"][1]


# -- the words, without processes -------------------------------------------------------------------------------


def beats(*changes):
    same = {"phase": "step", "step": 7, "idle": 600.0, "count": 40, "last": "sum of float32 [8]", "inside": True}
    return {rank: Beat(**{"rank": rank, "host": f"n{rank // 2}", "pid": 100 + rank, **same, **change})
            for rank, change in enumerate(changes)}


def test_who_lags_behind():
    late = beats({}, {}, {"phase": "data", "count": 38, "inside": False}, {})
    assert "rank 2 on n1 (process 102) is stuck in step 7, phase data for 600 s" in diagnosis.hang(late, {}, 600)
    earlier = beats({}, {"step": 6, "count": 41}, {}, {})
    assert "rank 1 on n0 (process 101) is stuck in step 6" in diagnosis.hang(earlier, {}, 600)
    busy = beats({}, {"count": 39, "inside": False}, {}, {})
    assert "rank 1 on n0" in diagnosis.hang(busy, {}, 600)
    between = beats({"inside": False}, {}, {}, {})
    assert "rank 0 on n0 (process 100) is stuck" in diagnosis.hang(between, {}, 600)


def test_a_collective_that_one_rank_skipped_is_a_mismatch():
    skipped = beats({}, {}, {"count": 39, "last": "gather of int64 [4]"}, {})
    told = diagnosis.hang(skipped, {}, 600)
    assert "mismatched collective" in told
    assert "ranks 0, 1, 3 on n0, n1 in collective 40 (sum of float32 [8])" in told
    assert "rank 2 on n1 in collective 39 (gather of int64 [4])" in told


def test_all_waiting_alike_is_said_so():
    assert "all 4 ranks wait alike in step 7, phase step" in diagnosis.hang(beats({}, {}, {}, {}), {}, 600)


def test_silence_comes_first_and_a_sentence_ends():
    told = diagnosis.hang(beats({}, {"phase": "data", "count": 1, "stack": "x" * 5000}), {1: 25.0}, 600)
    assert told.startswith("no progress for 600 s: rank 1 on n0 (process 101) is gone or stopped: no sign of life for "
                           "25 s; last seen in step 7, phase data, at x")
    assert len(told) == diagnosis.LONGEST


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_limit_that_cannot_be_meant_is_refused(value):
    with pytest.raises(ConfigError, match=r"machine.hang_minutes: got .*minutes, or 0 for never"):
        recipe.compose("digits_msf", [f"machine.hang_minutes={value}"])


@pytest.mark.parametrize("key", ["rollbacks", "check_replicas_steps"])
def test_counts_below_zero_are_refused(key):
    with pytest.raises(ConfigError, match=rf"machine.{key}: got -1; expected 0 or more"):
        recipe.compose("digits_msf", [f"machine.{key}=-1"])


def test_torchruns_restarts_are_attempts_of_their_own():
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1",
             "TORCHELASTIC_RUN_ID": "run"}
    tokens = [launch.find(place | {"TORCHELASTIC_RESTART_COUNT": n}).token for n in ("0", "1", "2")]
    assert tokens == ["run", "run.1", "run.2"]


# -- stragglers -------------------------------------------------------------------------------------------------


class Ticks:
    """A clock that moves by what it is told."""

    def __init__(self):
        self.now = 1.0

    def __call__(self):
        return self.now


class Event:
    """A GPU's timing event that has passed once its stream has come so far."""

    def __init__(self, clock, passed):
        self.at, self.passed = clock(), passed

    def query(self):
        return self.passed[0]

    def elapsed_time(self, later):
        return (later.at - self.at) * 1e3


def a_step(clock, ticks, data, work, inside):
    clock.wait_for_data()
    ticks.now += data
    clock.begin_step()
    ticks.now += work
    clock.enter()
    ticks.now += inside
    clock.leave()
    ticks.now += work
    clock.meet()
    clock.enter()  # of the next part: nobody's own
    ticks.now += 100
    clock.leave()


def test_own_seconds_leave_out_what_others_are_waited_for(monkeypatch):
    ticks = Ticks()
    monkeypatch.setattr(straggler.time, "perf_counter", ticks)
    clock = StepClock()
    for inside in (0.0, 8.0):
        a_step(clock, ticks, data=1.0, work=2.0, inside=inside)
    assert clock.take() == pytest.approx((5.0, 1.0))
    assert clock.take() == (0.0, 0.0)


def test_on_a_gpu_events_are_read_when_they_have_passed(monkeypatch):
    ticks, passed = Ticks(), [False]
    monkeypatch.setattr(straggler.time, "perf_counter", ticks)
    clock = StepClock(lambda: Event(ticks, passed))
    for _ in range(SAMPLED):
        a_step(clock, ticks, data=1.0, work=2.0, inside=8.0)
    assert clock.take() == pytest.approx((1.0, 1.0)), "only the host's wait for data is known yet"
    passed[0] = True
    a_step(clock, ticks, data=0.5, work=7.0, inside=1.0)  # not one of those that are measured
    assert clock.take() == pytest.approx((4.5, 0.5))


def test_a_straggler_is_named_when_it_stays_one_and_not_at_every_flush():
    look = Stragglers(["n1", "n1", "n2", "n2"]).look
    even, late = [0.30, 0.31, 0.30, 0.33], [0.30, 0.31, 0.45, 0.33]
    assert look(even, [0.0] * 4)[1] == ""
    scalars, told = look(late, [0.0, 0.0, 0.12, 0.0])
    assert told == "", "once may be chance"
    assert scalars == {"own_s": pytest.approx(0.32), "data_s": pytest.approx(0.03), "slowest_rank": 2,
                       "slowest_s": 0.45}
    told = look(late, [0.0, 0.0, 0.12, 0.0])[1]
    assert told == ("rank 2 on n2 is the slowest: 0.45 s of its own per step, 0.12 s of it waiting for data; the "
                    "others' median is 0.31 s (+45%)")
    assert [bool(look(late, [0.0] * 4)[1]) for _ in range(QUIET)] == [False] * (QUIET - 1) + [True]
    assert look([0.001, 0.002, 0.001, 0.001], [0.0] * 4)[1] == "", "a millisecond is nobody's fault"
