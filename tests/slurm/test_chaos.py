"""The soak test (``benchmarks/chaos``): its sequence of faults, its report, and short runs on a real SLURM."""

import json
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import pytest

from benchmarks.chaos import plan, soak
from benchmarks.chaos.commands import StuckError, TrainingCommands
from benchmarks.chaos.kinds import FAULT_GROUPS, KINDS
from benchmarks.chaos.report import SoakReport
from benchmarks.chaos.session import Progress, Recovery
from benchmarks.chaos.soak import Soak
from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script
from slurm.backend.profiles import Profile
from tests.printed import numbers_in
from tests.slurm.stubs import change_settings


def draw_groups(seed, count=200):
    return list(islice(plan.generate_groups(seed, FAULT_GROUPS), count))


def test_a_seed_gives_one_sequence_of_faults():
    assert draw_groups(3) == draw_groups(3)
    kinds = [[[fault.kind for fault in group] for group in draw_groups(seed)] for seed in (3, 4)]
    assert kinds[0] != kinds[1]
    faults = [fault for group in draw_groups(3) for fault in group]
    assert [fault.number for fault in faults] == list(range(1, len(faults) + 1))
    assert {fault.node for fault in faults} == {"n1", "n2"}
    assert {fault.rank for fault in faults} == {0, 1, 2, 3}
    assert {fault.steps for fault in faults} == set(range(1, plan.MAX_STEPS + 1))


def test_every_cycle_has_every_group_of_faults():
    count = len(FAULT_GROUPS)
    for cycle in (draw_groups(0, count), draw_groups(0, 2 * count)[count:]):
        assert {fault.kind for group in cycle for fault in group} == set(KINDS)
        assert sorted(tuple(fault.kind for fault in group) for group in cycle) == sorted(FAULT_GROUPS)


def test_the_report_has_the_lost_steps_and_the_violations(tmp_path):
    report = SoakReport(tmp_path / "out.json", {"seed": 1}, expected="d", digests=["d"])
    recorder = Soak(None, tmp_path, None, report)
    kinds = ("TERM to one rank", "KILL of all ranks", "flipped bit")
    term, kill, flip = (plan.draw_fault(1, number, kind) for number, kind in enumerate(kinds, 1))
    recorder._record([(term, 1.0, "rank 1")], Progress(1, 6), Recovery(7, 7, ["stopped"]))
    recorder._record([(kill, 2.0, "all ranks")], Progress(2, 13), Recovery(13, 10, ["killed"]))
    group = [(flip, 3.0, "part"), (kill, 4.0, "all ranks")]
    recorder._record(group, Progress(3, 18), Recovery(18, 10, ["killed"]))
    text = (tmp_path / "out.json").read_text()
    body = json.loads(text)
    assert body["violations"] == []
    assert body["digest_equal"]
    assert body["faults"] == len(body["log"]) == 4
    assert body["steps_lost"]["after_signal"] == {"max": 0, "total": 0, "faults": 1}
    assert body["steps_lost"]["after_kill"] == {"max": 3, "total": 3, "faults": 1}
    assert body["steps_lost"]["after_damage"] == {"max": 8, "total": 8, "faults": 1}
    assert body["by_kind"]["KILL of all ranks"] == {
        "count": 2,
        "steps_lost": 11,
        "attempts": 2,
        "resubmissions": 0,
        "causes": {"killed": 2},
    }
    assert len(text.split('"log": [')[1].splitlines()) == 1 + 4 + 2, "one line per fault"
    recovery = Recovery(21, 20, ["error"], resubmissions=["FAILED"])
    recorder._record([(term, 5.0, "rank 1")], Progress(4, 20), recovery)
    lost, cause, resubmission = report.violations
    assert all(violation.startswith("fault 1 (TERM to one rank): ") for violation in report.violations)
    assert numbers_in(lost) == [1, 1, 0], "fault 1 lost 1 step of 0 that may be lost"
    assert cause.endswith(" error") and resubmission.endswith(" FAILED")
    report.digests.append("e")
    assert not report.body()["digest_equal"]


def test_a_fault_may_show_in_the_end_that_a_later_fault_causes(tmp_path):
    report = SoakReport(tmp_path / "out.json", {}, expected="d", digests=["d"])
    recorder = Soak(None, tmp_path, None, report)
    kinds = ("KILL of slurmstepd", "KILL of slurmd", "requeue", "requeue")
    stepd, slurmd, first, second = (plan.draw_fault(1, number, kind) for number, kind in enumerate(kinds, 1))
    recorder._record([(stepd, 1.0, "n2")], Progress(1, 6), Recovery(7, 7, []))
    recorder._record([(slurmd, 2.0, "n2")], Progress(1, 8), Recovery(9, 9, []))
    recorder._record([(first, 3.0, "the job")], Progress(1, 13), Recovery(13, 13, ["node_fail"]))
    assert report.violations == []
    recorder._record([(second, 4.0, "the job")], Progress(2, 18), Recovery(18, 18, ["node_fail"]))
    assert numbers_in(report.violations[0]) == [4]


@dataclass
class StubCommands:
    """The commands of a soak test with the stub trainer, whose result is its last step.

    Attributes:
        make_stub_run: Creates the run folder.
        steps: Steps of the training.
        run: The run folder; None before the first submission.
    """

    make_stub_run: object
    steps: int
    run: RunDir | None = None

    def submit(self, run: RunDir) -> str:
        """Submit or continue the training; its job id."""
        if self.run is None:
            self.run = self.make_stub_run(steps=self.steps, step_s=0.5)  # it must not end before the faults
        return batch_script.submit(run, "train", {"nodes": "2", "ntasks-per-node": "2"}, Profile())

    def digest(self, run: RunDir) -> str:
        """The result."""
        return f"step {json.loads(run.done.read_text())['step']}"


@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_the_stub_training_recovers_from_faults(cluster, make_stub_run, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_STEPS", 3)
    monkeypatch.setattr(soak, "RunDir", lambda path: RunDir(tmp_path / "run"))
    report = SoakReport(tmp_path / "out.json", {"seed": 1}, expected="step 80")
    soak_test = Soak(cluster, tmp_path, StubCommands(make_stub_run, 80), report)
    groups = [("KILL of slurmd",), ("TERM to all ranks",), ("loss of SLURM's state",)]
    for group in islice(plan.generate_groups(1, groups), 3):
        soak_test.inject(group)
    change_settings(RunDir(tmp_path / "run"), step_s=0.02)
    soak_test.finish()
    body = json.loads((tmp_path / "out.json").read_text())
    assert body["violations"] == []
    assert body["digest_equal"]
    assert body["faults"] == 3
    assert {kind: about["causes"] for kind, about in body["by_kind"].items()} == {
        "KILL of slurmd": {},
        "TERM to all ranks": {"stopped": 1},
        "loss of SLURM's state": {"lost": 1},
    }


@pytest.mark.slurm
@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_real_training_recovers_from_faults(cluster, digits, tmp_path):
    report = SoakReport(tmp_path / "out.json", {"seed": 1})
    soak_test = Soak(cluster, tmp_path, TrainingCommands(digits / "train", 40), report)
    soak_test.run_undisturbed()
    groups = [
        ("KILL of one rank",),
        ("flipped bit", "KILL of all ranks"),
        ("requeue", "port in use in the start"),
        ("run folder moved",),
        ("interrupted submission",),
    ]
    for group in islice(plan.generate_groups(1, groups), len(groups)):
        soak_test.inject(group)
    soak_test.finish()
    body = json.loads((tmp_path / "out.json").read_text())
    assert body["violations"] == []
    assert body["digest_equal"]
    assert body["faults"] == 7
    assert body["steps_lost"]["after_damage"]["faults"] == 1


def test_damaged_weights_and_copied_shards_leave_the_files_as_they_were(tmp_path, monkeypatch):
    run, data = RunDir(tmp_path / "run"), tmp_path / "data"
    arch = Arch(arch="resnet_tiny", stem="small")
    about = {"mean": [0.5] * 3, "std": [0.2] * 3, "size": 16, "fingerprint": "f", "step": 0, "method": "msf"}
    weights.save(run.weights_at(0), resnet.build(arch), arch, **about)
    data.mkdir()
    (data / "a.tar").write_bytes(b"tar")
    before = run.weights_at(0).read_bytes(), (data / "a.tar").stat().st_ino
    session = SimpleNamespace(run=run, commands=TrainingCommands(data, 1))
    faults = [plan.draw_fault(0, number, "damaged weights") for number in range(1, 9)]
    for fault in faults:
        assert KINDS[fault.kind].inject(session, fault) == run.weights_at(0).name
    assert KINDS["shards copied again"].inject(session, faults[0]) == "1 shards"
    assert run.weights_at(0).read_bytes() == before[0] and (data / "a.tar").stat().st_ino != before[1]
    monkeypatch.setattr(weights, "load", lambda path: None)
    with pytest.raises(StuckError):
        KINDS["damaged weights"].inject(session, faults[0])
    assert run.weights_at(0).read_bytes() == before[0]
