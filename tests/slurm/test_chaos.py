"""The soak itself: a seed names one sequence of faults, and a few of them strike a training and change nothing."""

import json
from dataclasses import dataclass, field
from itertools import islice

import pytest

from benchmarks import chaos, chaos_plan
from benchmarks.chaos_kinds import BOUTS, KINDS
from benchmarks.chaos_scene import After, Before, Trainer
from hpcssl.files import RunDir
from slurm import script
from slurm.cluster import Profile


def bouts(seed, count=200):
    return list(islice(chaos_plan.sequence(seed, BOUTS), count))


def test_the_same_seed_gives_the_same_sequence():
    assert bouts(3) == bouts(3)
    assert [[f.kind for f in b] for b in bouts(3)] != [[f.kind for f in b] for b in bouts(4)]
    faults = [fault for bout in bouts(3) for fault in bout]
    assert [f.number for f in faults] == list(range(1, len(faults) + 1))
    assert {f.node for f in faults} == {"n1", "n2"}
    assert {f.rank for f in faults} == {0, 1, 2, 3}
    assert {f.steps for f in faults} == set(range(1, chaos_plan.MOST_STEPS + 1))


def test_every_cycle_has_every_kind():
    for cycle in (bouts(0, len(BOUTS)), bouts(0, 2 * len(BOUTS))[len(BOUTS):]):
        assert {fault.kind for bout in cycle for fault in bout} == set(KINDS)
        assert sorted(tuple(f.kind for f in bout) for bout in cycle) == sorted(BOUTS)


def test_the_report_counts_what_was_lost_and_says_what_must_not_be(tmp_path, capsys):
    report = chaos.Report(tmp_path / "out.json", {"seed": 1}, expected="d", digests=["d"])
    soak = chaos.Soak(None, tmp_path, None, report)
    term, kill, flip = (chaos_plan.drawn(1, n, kind) for n, kind in enumerate(
        ("TERM to one rank", "KILL of all ranks", "flipped bit"), 1))
    soak._note([(term, 1.0, "rank 1")], Before(1, 6), After(7, 7, ["stopped"]))
    soak._note([(kill, 2.0, "all ranks")], Before(2, 13), After(13, 10, ["killed"]))
    soak._note([(flip, 3.0, "part"), (kill, 4.0, "all ranks")], Before(3, 18), After(18, 10, ["killed"]))
    body = json.loads((tmp_path / "out.json").read_text())
    assert body["surprises"] == []
    assert body["digest_equal"]
    assert body["faults"] == len(body["log"]) == 4
    assert body["steps_lost"]["after_signal"] == {"max": 0, "total": 0, "faults": 1}
    assert body["steps_lost"]["after_kill"] == {"max": 3, "total": 3, "faults": 1}
    assert body["steps_lost"]["after_damage"] == {"max": 8, "total": 8, "faults": 1}
    assert body["by_kind"]["KILL of all ranks"] == {"count": 2, "steps_lost": 11, "attempts": 2, "submitted_again": 0,
                                                    "causes": {"killed": 2}}
    assert len((tmp_path / "out.json").read_text().split('"log": [')[1].splitlines()) == 1 + 4 + 2
    soak._note([(term, 5.0, "rank 1")], Before(4, 20), After(21, 20, ["error"], resubmitted=["FAILED"]))
    assert report.surprises == ["fault 1 (TERM to one rank): 1 steps lost, 0 allowed",
                                "fault 1 (TERM to one rank): ended as error",
                                "fault 1 (TERM to one rank): the job had to be submitted again: FAILED"]
    report.digests.append("e")
    assert not report.body()["digest_equal"]


@dataclass
class StandIn:
    """The trainer without torch, which has nothing but its step to remember."""

    make: object
    steps: int
    runs: list = field(default_factory=list)

    def submit(self, run: RunDir) -> str:
        if not self.runs:
            self.runs.append(self.make(steps=self.steps, step_s=0.05))
        return script.submit(run, "train", {"nodes": "2", "ntasks-per-node": "2"}, Profile())

    def digest(self, run: RunDir) -> str:
        return f"step {json.loads(run.done.read_text())['step']}"


@pytest.mark.slurm
@pytest.mark.timeout(200)
def test_faults_strike_and_the_training_comes_back(cluster, stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(chaos_plan, "MOST_STEPS", 3)
    report = chaos.Report(tmp_path / "out.json", {"seed": 1}, expected="step 80")
    soak = chaos.Soak(cluster, tmp_path, StandIn(stand_in, 80), report)
    monkeypatch.setattr(chaos, "RunDir", lambda path: RunDir(tmp_path / "run"))
    faults = [("KILL of slurmd",), ("TERM to all ranks",)]
    for bout in islice(chaos_plan.sequence(1, faults), 2):
        soak.strike(bout)
    soak.finish()
    body = json.loads((tmp_path / "out.json").read_text())
    assert not body["surprises"]
    assert body["digest_equal"]
    assert body["faults"] == 2
    assert {kind: about["causes"] for kind, about in body["by_kind"].items()} == {
        "KILL of slurmd": {}, "TERM to all ranks": {"stopped": 1}}


@pytest.mark.slurm
@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_short_soak_of_the_real_training(cluster, digits, tmp_path):
    report = chaos.Report(tmp_path / "out.json", {"seed": 1})
    soak = chaos.Soak(cluster, tmp_path, Trainer(digits / "train", 40), report)
    soak.undisturbed()
    for bout in islice(chaos_plan.sequence(1, [("KILL of one rank",), ("flipped bit", "KILL of all ranks")]), 2):
        soak.strike(bout)
    soak.finish()
    body = json.loads((tmp_path / "out.json").read_text())
    assert not body["surprises"]
    assert body["digest_equal"]
    assert body["faults"] == 3
    assert body["steps_lost"]["after_damage"]["faults"] == 1
