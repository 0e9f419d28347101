"""How long a phase may be without progress, and the early end where a rank is dead. The tests move the clock."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from hpcssl import files
from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.distributed.liveness import activity, cpu_time, exchange, hang_monitor, heartbeat, limits, record
from hpcssl.distributed.liveness.activity import Activity
from hpcssl.distributed.liveness.exchange import RecordExchange
from hpcssl.distributed.liveness.hang_monitor import DEAD_S, MIN_CPU_SHARE, PEER_WAIT_S, HangMonitor
from hpcssl.distributed.liveness.limits import MIN_COMPLETED, PhaseLimits
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.evals import run as evals_run
from hpcssl.files import append_line, read_lines
from hpcssl.run_dir import RunDir
from hpcssl.signals import Requeue, StopFlag
from hpcssl.train import main, recipe
from hpcssl.train.attempt.record import AttemptRecord, AttemptResult
from slurm.job import evaluate
from tests.waiting import wait_until

HANG_S, FACTOR, FLOOR_S = 600.0, 10.0, 120.0
INTERVAL_S, SILENT_S = 0.01, 20.0


@pytest.fixture
def clock(monkeypatch):
    """The time of the heartbeat's modules; a test moves ``clock.now``."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda _: None)
    for module in (activity, exchange, hang_monitor):
        monkeypatch.setattr(module, "time", fake)
    return clock


class Rank:
    """One rank without threads: a test lets it publish and judge.

    Args:
        rank: Its index.
        size: Number of ranks; 1 for a single process.
        store: The store that the ranks share.
        phase_limits: Its limits.

    Attributes:
        ends: What ended it: (cause, sentence, time).
    """

    def __init__(self, clock, rank=0, size=1, store=None, phase_limits=None):
        self.clock, self.ends, self.used_s = clock, [], 0.0
        phase_limits = phase_limits or PhaseLimits(HANG_S)
        self.activity = Activity(rank, INTERVAL_S, phase_limits)
        closed = threading.Event()
        self.exchange = RecordExchange(store, self.activity, size, closed) if store is not None else None
        self.monitor = HangMonitor(
            self.activity,
            self.exchange,
            limits=phase_limits,
            silent_s=SILENT_S,
            leave=lambda cause, sentence: self.ends.append((cause, sentence, clock.now)),
            closed=closed,
            cpu_s=lambda: self.used_s,
        )

    def tick(self):
        """Publish a record, read those of others, and judge."""
        if self.exchange is not None:
            self.exchange._exchange()
        self.monitor._excuse(self.clock.now)
        if not self.ends:
            self.monitor._judge(self.clock.now)


def run_until_an_end(clock, ranks, seconds):
    """Let the ranks live for some seconds, or until one of them ends; the ends of all."""
    until = clock.now + seconds
    while clock.now < until and not any(rank.ends for rank in ranks):
        clock.now += 1.0
        for rank in ranks:
            rank.tick()
    return [end for rank in ranks for end in rank.ends]


# -- which rank is to blame after a collective has failed -----------------------------------------------------------


class CountingStore(KeyValueStore):
    """A store that knows how many records its rank has read at once."""

    most_read = 0

    def get(self, keys):
        self.most_read = max(self.most_read, len(keys := list(keys)))
        return super().get(keys)


@pytest.mark.parametrize("reader", ["any", "dead"])
def test_one_rank_reads_all_records_and_tells_the_others(monkeypatch, reader):
    """Of eight ranks, rank 5 is dead. Where it was to read the records, another rank does so.

    Which records are old is given here, so that a busy machine does not make other ranks look dead.
    """
    size, dead, hash_store = 8, 5, HashStore()
    monkeypatch.setattr(heartbeat, "MIN_OBSERVATION_S", 0.1)
    monkeypatch.setattr(heartbeat, "READER_PATIENCE", 40 if reader == "dead" else 600)
    monkeypatch.setattr(RecordExchange, "silent_ranks", lambda self, *_: {dead: 9.0} if dead in self._newest else {})
    for rank in range(size):
        hash_store.set(record.key(rank), record.first_record(rank))
    if reader == "dead":
        hash_store.set("reader/0", str(dead))
    living = [rank for rank in range(size) if rank != dead]
    stores = {rank: CountingStore(hash_store) for rank in living}
    beats = {
        rank: heartbeat.Heartbeat(
            stores[rank], rank, size, limits=PhaseLimits(HANG_S), leave=lambda *_: None, interval_s=0.05
        ).start()
        for rank in living
    }
    explanations = {}

    def fail(rank):
        cause, sentence = explanations[rank] = beats[rank].explain_collective_error()
        beats[rank].report_failure(sentence, cause)

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in living]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for beat in beats.values():
        beat.close()
    assert len(explanations) == len(living) and len(set(explanations.values())) == 1
    cause, sentence = explanations[0]
    assert cause == "killed" and sentence.startswith(f"rank {dead} on ")
    assert sorted(store.most_read for store in stores.values()) == [1] * (len(living) - 1) + [size]


# -- dead ranks -----------------------------------------------------------------------------------------------------


def test_a_rank_that_dies_while_others_wait_is_named_long_before_the_limit(clock, capfd):
    store = KeyValueStore(HashStore())
    ranks = [Rank(clock, rank, 3, store) for rank in range(3)]
    for rank in ranks:
        rank.activity.set_phase("step", 7)
    assert not run_until_an_end(clock, ranks, 20)
    died = clock.now
    for rank in ranks:
        rank.activity.enter_collective("all_gather", "float32", [4])  # NCCL returns, and the host waits later
        rank.activity.leave_collective()
    ((cause, sentence, ended),) = run_until_an_end(clock, ranks[:2], HANG_S)
    assert cause == "killed" and sentence.startswith("rank 2 on ") and "rank 1" not in sentence
    assert ended - died <= PEER_WAIT_S + DEAD_S + 3 and ranks[0].ends
    capfd.readouterr()


def test_living_ranks_that_wait_have_the_whole_limit(clock, capfd):
    store = KeyValueStore(HashStore())
    ranks = [Rank(clock, rank, 2, store) for rank in range(2)]
    began = clock.now
    ((cause, _, ended),) = run_until_an_end(clock, ranks, 2 * HANG_S)
    assert cause == "hang" and ended - began > HANG_S
    capfd.readouterr()


def test_the_others_leave_when_the_host_of_the_store_is_gone(clock, capfd):
    store = KeyValueStore(HashStore())
    ranks = [Rank(clock, rank, 2, store) for rank in range(2)]
    assert not run_until_an_end(clock, ranks, 3)
    ranks[1].exchange.lost, died = True, clock.now
    ranks[1].exchange._exchange = lambda: None
    ((cause, sentence, ended),) = run_until_an_end(clock, ranks[1:], HANG_S)
    assert cause == "killed" and sentence.startswith("rank 0 on ")
    assert ended - died <= PEER_WAIT_S + 1
    capfd.readouterr()


# -- limits ---------------------------------------------------------------------------------------------------------


def learn(phase_limits, name, seconds, times=MIN_COMPLETED, between="stage"):
    """Complete a phase several times, each with this time without progress."""
    for _ in range(times):
        phase_limits.enter(name)
        phase_limits.observe(name, seconds)
        phase_limits.enter(between)
        phase_limits.enter("data" if name != "data" else "step")


@pytest.mark.parametrize(
    ("longest", "expected"), [(0.5, FLOOR_S), (20.0, FACTOR * 20.0), (HANG_S / FACTOR, HANG_S), (500.0, HANG_S)]
)
def test_the_limit_of_a_known_phase_is_a_multiple_of_its_longest_wait(longest, expected):
    phase_limits = PhaseLimits(HANG_S, factor=FACTOR, floor_s=FLOOR_S)
    learn(phase_limits, "save", longest, MIN_COMPLETED - 1)
    assert phase_limits.limit("save") == HANG_S
    learn(phase_limits, "save", longest / 2, 1)
    assert {phase_limits.limit(name) for name in limits.PHASES["save"]} == {expected}
    assert phase_limits.limit("evaluate") == phase_limits.limit("stage") == HANG_S
    assert phase_limits.summary()["save"] == (MIN_COMPLETED, longest)


def test_without_a_factor_or_below_the_floor_the_limit_is_hang_minutes():
    for hang_s, factor in ((HANG_S, 0.0), (5.0, FACTOR), (0.0, FACTOR)):
        phase_limits = PhaseLimits(hang_s, factor=factor, floor_s=FLOOR_S)
        learn(phase_limits, "step", 1.0)
        assert phase_limits.limit("step") == hang_s


def test_the_first_time_of_a_phase_in_an_attempt_is_not_limited_by_earlier_attempts():
    """The first step compiles, and the first save meets a cold file system; the start-up is the first in each."""
    history = {"step": (50, 1.0), "start-up": (MIN_COMPLETED, 1.0)}
    phase_limits = PhaseLimits(HANG_S, factor=FACTOR, floor_s=FLOOR_S, history=history)
    assert phase_limits.limit("resume") == FLOOR_S
    phase_limits.enter("step")
    assert phase_limits.limit("step") == HANG_S
    phase_limits.enter("data")
    assert phase_limits.limit("step") == FLOOR_S


def test_a_phase_learns_from_the_time_between_two_reports_of_progress(clock):
    rank = Rank(clock, phase_limits=PhaseLimits(HANG_S, factor=FACTOR, floor_s=FLOOR_S))
    for _ in range(MIN_COMPLETED):
        rank.activity.set_phase("data")
        clock.now += 30.0
        rank.activity.report_progress("data")
        clock.now += 20.0
        rank.activity.set_phase("step")
        clock.now += 1.0
    rank.activity.set_phase("data")
    assert rank.monitor.limits.limit("data") == FACTOR * 30.0 and rank.monitor.limits.limit("step") == FLOOR_S


def test_a_known_phase_ends_earlier_than_an_unknown_one(clock, capfd):
    for name, limit in (("step", FLOOR_S), ("evaluate", HANG_S)):
        phase_limits = PhaseLimits(HANG_S, factor=FACTOR, floor_s=FLOOR_S)
        learn(phase_limits, "step", 1.0)
        rank, began = Rank(clock, phase_limits=phase_limits), clock.now
        rank.activity.set_phase(name)
        ((cause, _, ended),) = run_until_an_end(clock, [rank], 2 * HANG_S)
        assert cause == "hang" and limit < ended - began <= limit + 1
    capfd.readouterr()


@pytest.mark.parametrize(("other_phase", "limit"), [("step", FLOOR_S), ("stage", HANG_S)])
def test_ranks_wait_for_the_one_whose_phase_may_take_longest(clock, capfd, other_phase, limit):
    store, ranks = KeyValueStore(HashStore()), []
    for rank in range(2):
        phase_limits = PhaseLimits(HANG_S, factor=FACTOR, floor_s=FLOOR_S)
        learn(phase_limits, "step", 1.0)
        ranks.append(Rank(clock, rank, 2, store, phase_limits))
    began = clock.now
    ranks[0].activity.set_phase("step", 3)
    ranks[1].activity.set_phase(other_phase, 3)
    ((cause, _, ended),) = run_until_an_end(clock, ranks, 2 * HANG_S)
    assert cause == "hang" and limit < ended - began < limit + 2 * SILENT_S
    capfd.readouterr()


# -- long calls -----------------------------------------------------------------------------------------------------


def test_a_long_call_is_a_hang_only_if_no_processor_is_used(clock, capfd):
    rank = Rank(clock)
    rank.activity.set_phase("cluster", computing=True)
    for _ in range(2 * int(HANG_S)):
        clock.now += 1.0
        rank.used_s += 2 * MIN_CPU_SHARE
        rank.tick()
    assert not rank.ends
    stuck = clock.now
    ((cause, _, ended),) = run_until_an_end(clock, [rank], 2 * HANG_S)
    assert cause == "hang" and ended - stuck <= HANG_S + 1
    capfd.readouterr()


def test_the_processor_time_of_worker_processes_counts():
    def children_s():
        return cpu_time.process_and_children_s() - sum(os.times()[:2])

    before = children_s()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            wait_until(lambda: children_s() - before > 0.3, "processor time of the child")
        finally:
            child.kill()


def test_a_child_that_has_ended_does_not_hide_the_others(monkeypatch):
    """Between the list of children and the look at each of them, the first may end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        original = cpu_time.Path.read_text

        def read_text(path):
            text = original(path)
            return f"{2**22 + 1} {text}" if path.name == "children" and str(child.pid) in text else text

        try:
            monkeypatch.setattr(cpu_time.Path, "read_text", read_text)
            before = cpu_time.process_and_children_s() - sum(os.times()[:2])
            wait_until(lambda: cpu_time.process_and_children_s() - sum(os.times()[:2]) - before > 0.3, "processor time")
        finally:
            child.kill()


# -- the history in the run folder ----------------------------------------------------------------------------------


def make_record(run):
    return AttemptRecord(run, World.single_process(), {}, hang_s=HANG_S, hang_factor=FACTOR, hang_floor_s=FLOOR_S)


def test_the_waits_of_earlier_attempts_are_the_history_unless_the_last_one_hung(tmp_path):
    run = RunDir(tmp_path)
    for number in range(MIN_COMPLETED):
        record = make_record(run)
        assert record.limits.limit("resume") == HANG_S
        record.start(lambda: 0)
        record.limits.observe("resume", 20.0 + number)
        record.limits.enter("data")
        record.finish(AttemptResult("stopped"))
    assert read_lines(run.attempts)[-1]["longest_waits"] == {"start-up": [1, 20.0 + number]}
    assert make_record(run).limits.limit("resume") == FACTOR * (20.0 + number)
    for other in ({"world": 2}, {"device": "cuda"}):  # of attempts that are no measure for this one
        line = {"event": "end", "attempt": 99, "world": 1, "device": "cpu", "longest_waits": {"start-up": [1, 50.0]}}
        append_line(run.attempts, line | other)
        assert make_record(run).limits.limit("resume") == FACTOR * (20.0 + number)
    append_line(run.attempts, {"event": "end", "attempt": 100, "cause": "hang"})
    append_line(run.attempts, {"event": "end", "attempt": 100, "cause": "killed"})
    assert make_record(run).limits.limit("resume") == HANG_S


def test_the_retries_of_a_download_are_not_a_hang():
    values = ["data.stage_dir=/tmp", "data.stall_timeout_seconds=50", "data.download_attempts=4"]
    floors = [
        main.hang_floor_s(recipe.compose("digits_msf", [f"data.train={train}", *values]))
        for train in ("shards", "https://host/shards")
    ]
    assert floors == [FLOOR_S, 2 * 50 * 4]


@pytest.mark.parametrize(
    ("key", "value"), [("hang_factor", "0.5"), ("hang_factor", "-1"), ("hang_floor_minutes", "nan")]
)
def test_invalid_values_are_refused(key, value):
    with pytest.raises(ConfigError) as caught:
        recipe.compose("digits_msf", [f"machine.{key}={value}"])
    assert (caught.value.what, caught.value.got) == (f"machine.{key}", str(float(value)))


# -- evaluations ----------------------------------------------------------------------------------------------------


def test_an_evaluation_that_hangs_is_ended(tmp_path, monkeypatch, capfd):
    """The same watchdog as that of the training; an evaluation that asks whether to stop makes progress."""
    run, hung, ends = RunDir(tmp_path), threading.Event(), []
    composed = recipe.compose("digits_msf", ["machine.devices=cpu", "machine.hang_minutes=0.01"])
    files.atomic_write(run.config, recipe.config.to_yaml(composed))

    def hang(*_, stop, **__):
        stop()
        assert hung.wait(120)
        return []

    def leave(sentence):
        ends.append(sentence)
        hung.set()

    monkeypatch.setattr(evals_run, "evaluate_run", hang)
    monkeypatch.setattr(evaluate.evaluations, "remaining_steps", lambda *_: [])
    code = evaluate.evaluate(
        run,
        "knn",
        stop=StopFlag(),
        requeue=lambda _: Requeue("stopped"),
        attempt={"attempt": 1, "job": "7", "restart": 0},
        record_failure=lambda cause, sentence: ends.append((cause, sentence)),
        leave=leave,
    )
    (cause, recorded), sentence = ends
    assert code == 0 and cause == "hang" and recorded == sentence and "phase evaluate" in sentence
    capfd.readouterr()
