"""Values that are not finite, and weights or bank rows whose bits change, on one rank of several."""

import re

import pytest

from hpcssl.checkpoint.reader import latest_valid
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from tests.printed import numbers_in, printed_error

SYNC_NORM = ["model.norm=sync", "schedule.steps=8"]
FP16 = ["model.norm=local", "schedule.steps=8", "optim.precision=fp16"]
LARGE_WORLD_ONLY = ("flip-before-save",)


def faults(kind, rank, *steps):
    return [{"at": step, "rank": rank, "kind": kind} for step in steps]


def read_log(folder):
    return (folder / "rank-logs.txt").read_text()


def read_error(folder):
    """Return the class and the parts of the error that ended an attempt of a run."""
    (reason,) = [line["why"] for line in read_lines(RunDir(folder).attempts) if line.get("cause") == "error"]
    prefix = re.match(r"(?:rank \d+: )?(\w+): ", reason)
    return prefix[1], printed_error(f"hpcssl: {reason[prefix.end() :]}")


def rollbacks(folder):
    """Return (bad steps in a row, step of the checkpoint, step up to which batches are skipped) of each rollback."""
    lines = [line for line in read_log(folder).splitlines() if "Rolled back" in line]
    return {tuple(numbers_in(line)[-3:]) for line in lines}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)], ids=lambda n: f"{n}-ranks")
def runs(request, run_scenarios):
    world, last = [request.param], request.param - 1
    common = {"recipe": "digits_msf", "overrides": SYNC_NORM, "worlds": world}
    three_bad_steps = faults("nonfinite_images", 0, 3, 4, 5)
    two_bad_gradients = faults("nonfinite_gradient", last, 2, 4)
    check_each_step = [*SYNC_NORM, "machine.replica_check_steps=1"]
    scenarios = [
        {"name": "undisturbed", **common, "attempts": [{}]},
        {"name": "images-one", **common, "attempts": [{"faults": faults("nonfinite_images", last, 3)}]},
        {"name": "images-all", **common, "attempts": [{"faults": faults("nonfinite_images", "all", 3)}]},
        {"name": "gradient-one", **common, "attempts": [{"faults": faults("nonfinite_gradient", last, 3)}]},
        {"name": "rollback", **common, "attempts": [{"faults": three_bad_steps}]},
        {"name": "rollback-late", **common, "attempts": [{"faults": three_bad_steps, "late": True}]},
        {
            "name": "stopped-late",
            **common,
            "attempts": [{"faults": faults("stop", 0, 2), "late": True}, {"late": True}],
        },
        {
            "name": "rollback-killed",
            **common,
            "attempts": [{"faults": three_bad_steps, "kill_at": 7}, {"faults": three_bad_steps}],
        },
        {
            "name": "second-rollback",
            **common,
            "overrides": [*SYNC_NORM, "machine.max_nonfinite_steps=2"],
            "attempts": [{"faults": faults("nonfinite_images", last, 3, 4, 5, 6)}],
        },
        {
            "name": "flip",
            **common,
            "overrides": check_each_step,
            "attempts": [{"faults": faults("flip_weight", last, 3)}, {}],
        },
        {
            "name": "flip-bank",
            **common,
            "overrides": check_each_step,
            "attempts": [{"faults": faults("flip_bank_row", last, 3)}],
        },
        {"name": "flip-before-save", **common, "attempts": [{"faults": faults("flip_weight", 0, 3)}, {}]},
        {"name": "scale", **common, "overrides": FP16, "attempts": [{"faults": two_bad_gradients}]},
        {
            "name": "scale-killed",
            **common,
            "overrides": FP16,
            "attempts": [{"faults": two_bad_gradients, "kill_at": 5}, {"faults": two_bad_gradients}],
        },
    ]
    if request.param == 2:
        scenarios = [scenario for scenario in scenarios if scenario["name"] not in LARGE_WORLD_ONLY]
    return request.param, run_scenarios(scenarios)


def test_all_ranks_skip_a_step_that_is_not_finite_on_one_rank(runs):
    world, results = runs
    for name, word in {"images-one": f"rank {world - 1}", "gradient-one": "gradient"}.items():
        result, folder = results[name]
        assert result["done"], result["log"]
        assert [line for line in read_log(folder).splitlines() if "Step 4 " in line and word in line], name
        assert result["digest"] == results["images-all"][0]["digest"], "the skipped step changed the state"
    assert results["images-all"][0]["digest"] != results["undisturbed"][0]["digest"]


def test_three_bad_steps_in_a_row_roll_back_and_skip_their_batches(runs):
    _, results = runs
    (result, folder), (killed, _) = results["rollback"], results["rollback-killed"]
    assert result["done"] and killed["done"], result["log"] + killed["log"]
    assert rollbacks(folder) == {(3, 2, 6)}
    assert latest_valid(RunDir(folder))[0].manifest["numbers"]["rolled_back"] == [[2, 6]]
    assert [line["step"] for line in read_lines(RunDir(folder).journal)] == list(range(1, 9))
    assert -9 in killed["codes"][0]
    assert killed["digest"] == result["digest"]


def test_verdicts_that_are_read_late_change_nothing(runs):
    world, results = runs
    (late, folder), (stopped, _) = results["rollback-late"], results["stopped-late"]
    assert late["done"] and stopped["done"], late["log"] + stopped["log"]
    assert rollbacks(folder) == {(3, 2, 6)}
    assert late["digest"] == results["rollback"][0]["digest"]
    assert [line["step"] for line in read_lines(RunDir(folder).journal)] == list(range(1, 9))
    assert stopped["codes"] == [[75] * world, [0] * world]
    assert stopped["digest"] == results["undisturbed"][0]["digest"]


def test_bad_steps_after_the_last_rollback_end_the_run_with_their_samples(runs):
    world, results = runs
    result, folder = results["second-rollback"]
    assert not result["done"] and result["codes"] == [[1] * world]
    assert {(bad, saved) for bad, saved, _ in rollbacks(folder)} == {(2, 2)}
    kind, error = read_error(folder)
    assert kind == "NonFiniteError" and "max_rollbacks" in error.fix
    bad_steps, earlier_rollbacks, *_ = numbers_in(error.got)
    assert (bad_steps, earlier_rollbacks) == (2, 1)
    samples = numbers_in(error.got.partition("[")[2].partition("]")[0])
    assert len(samples) == 16 and all(0 <= sample < 40 for sample in samples)
    assert latest_valid(RunDir(folder))[0].step == 2, "a run that diverges keeps the checkpoint from before"


@pytest.mark.parametrize("name", ["flip", "flip-before-save"])
def test_a_flipped_weight_ends_the_attempt_and_is_named(runs, name):
    world, results = runs
    if name not in results:
        pytest.skip("runs in the larger world")
    result, folder = results[name]
    assert result["codes"][0] == [1] * world
    kind, error = read_error(folder)
    faulty_rank = world - 1 if name == "flip" else 0
    assert kind == "WorldError" and error.what == "the replicas at step 4"
    assert f"rank {faulty_rank} on" in error.got and "pair.online.backbone.layer1.0.conv1.weight" in error.got
    assert result["done"], result["log"]
    assert result["digest"] == results["undisturbed"][0]["digest"], "the changed weight was saved"


def test_a_flipped_row_of_a_replicated_bank_ends_the_attempt_and_is_named(runs):
    world, results = runs
    result, folder = results["flip-bank"]
    assert result["codes"] == [[1] * world]
    kind, error = read_error(folder)
    assert kind == "WorldError" and error.what == "the replicas at step 4" and f"rank {world - 1} on" in error.got
    assert error.got.endswith(" in bank.key"), "no other tensor differs"


def test_a_kill_does_not_change_the_loss_scale(runs):
    _, results = runs
    (result, folder), (killed, _) = results["scale"], results["scale-killed"]
    assert result["done"] and killed["done"], result["log"] + killed["log"]
    numbers = latest_valid(RunDir(folder))[0].manifest["numbers"]
    assert numbers["scaler"]["scale"] == 2.0**14 and numbers["skipped_in_a_row"] == 0
    assert killed["digest"] == result["digest"]
