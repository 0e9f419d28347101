"""Numbers that are not finite, and weights that change by themselves, on one rank among several."""

import pytest

from hpcssl.files import RunDir, read_lines
from hpcssl.train.checkpoint import newest_valid

WHOLE = ["model.norm=whole", "schedule.steps=8"]
SLOW = ("flip-before-save",)  # left to the larger world
HALF = ["model.norm=local", "schedule.steps=8", "optim.precision=fp16"]


def harm(kind, rank, *steps):
    return [{"at": step, "rank": rank, "kind": kind} for step in steps]


def log(folder):
    return (folder / "rank-logs.txt").read_text()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)], ids=lambda n: f"{n}-ranks")
def runs(request, play):
    world, last = [request.param], request.param - 1
    more = {"recipe": "digits_msf", "overrides": WHOLE, "worlds": world}
    thrice = harm("images", 0, 3, 4, 5)
    plans = [
        {"name": "still", **more, "attempts": [{}]},
        {"name": "images-one", **more, "attempts": [{"harm": harm("images", last, 3)}]},
        {"name": "images-all", **more, "attempts": [{"harm": harm("images", "all", 3)}]},
        {"name": "gradient-one", **more, "attempts": [{"harm": harm("gradient", last, 3)}]},
        {"name": "back", **more, "attempts": [{"harm": thrice}]},
        {"name": "back-killed", **more, "attempts": [{"harm": thrice, "kill_at": 7}, {"harm": thrice}]},
        {"name": "twice", **more, "overrides": [*WHOLE, "machine.nonfinite_limit=2"],
         "attempts": [{"harm": harm("images", last, 3, 4, 5, 6)}]},
        {"name": "flip", **more, "overrides": [*WHOLE, "machine.check_replicas_steps=1"],
         "attempts": [{"harm": harm("flip", last, 3)}, {}]},
        {"name": "flip-bank", **more, "overrides": [*WHOLE, "machine.check_replicas_steps=1"],
         "attempts": [{"harm": harm("flip_remembered", last, 3)}]},
        {"name": "flip-before-save", **more, "attempts": [{"harm": harm("flip", 0, 3)}, {}]},
        {"name": "scale", **more, "overrides": HALF, "attempts": [{"harm": harm("gradient", last, 2, 4)}]},
        {"name": "scale-killed", **more, "overrides": HALF,
         "attempts": [{"harm": harm("gradient", last, 2, 4), "kill_at": 5}, {"harm": harm("gradient", last, 2, 4)}]},
    ]
    return request.param, play(plans if request.param > 2 else [plan for plan in plans if plan["name"] not in SLOW])


def test_what_is_not_finite_on_one_rank_is_passed_over_by_all(runs):
    _, results = runs
    named = {"images-one": "the loss or a target was not finite on rank", "gradient-one": "a gradient was not finite"}
    for name, words in named.items():
        result, folder = results[name]
        assert result["done"], result["log"]
        assert f"step 4: {words}" in log(folder)
        assert result["digest"] == results["images-all"][0]["digest"], "the step left a trace"
    assert results["images-all"][0]["digest"] != results["still"][0]["digest"]


def test_three_in_a_row_roll_back_and_go_on_past_the_batches(runs):
    _, results = runs
    (back, folder), (killed, _) = results["back"], results["back-killed"]
    assert back["done"] and killed["done"], back["log"] + killed["log"]
    assert "the state of step 2 is taken up again, and the run goes on past their batches, at step 6" in log(folder)
    assert newest_valid(RunDir(folder))[0].manifest["numbers"]["rolled_back"] == [[2, 6]]
    assert [line["step"] for line in read_lines(RunDir(folder).journal)] == list(range(1, 9))
    assert -9 in killed["codes"][0]
    assert killed["digest"] == back["digest"]


def test_a_second_time_ends_the_run_with_the_samples(runs):
    world, results = runs
    result, folder = results["twice"]
    assert not result["done"] and result["codes"] == [[1] * world]
    said = log(folder)
    assert "the state of step 2 is taken up again" in said
    assert "2 steps in a row that were not finite, and 1 rollbacks before; the last batch held the samples [" in said
    assert newest_valid(RunDir(folder))[0].step == 2, "a run that diverges keeps the checkpoint from before"


@pytest.mark.parametrize("name", ["flip", "flip-before-save"])
def test_a_flipped_weight_stops_the_run_with_its_name(runs, name):
    world, results = runs
    if name not in results:
        pytest.skip("runs in the larger world")
    result, folder = results[name]
    assert result["codes"][0] == [1] * world
    (said,) = [x["why"] for x in read_lines(RunDir(folder).attempts) if x.get("cause") == "error"]
    guilty = world - 1 if name == "flip" else 0
    assert "the replicas at step 4" in said
    assert f"rank {guilty} on" in said and "pair.online.backbone.layer1.0.conv1.weight" in said
    assert result["done"], result["log"]
    assert result["digest"] == results["still"][0]["digest"], "what was wrong on one rank was saved"


def test_a_flipped_row_of_a_replicated_bank_is_found(runs):
    world, results = runs
    result, folder = results["flip-bank"]
    assert result["codes"] == [[1] * world]
    (said,) = [x["why"] for x in read_lines(RunDir(folder).attempts) if x.get("cause") == "error"]
    assert "the replicas at step 4" in said and f"rank {world - 1} on" in said and "bits" in said
    assert said.partition("bits")[2].partition(" in ")[2].startswith("bank.key; expected the same bits"), said


def test_the_loss_scale_survives_a_kill(runs):
    _, results = runs
    (whole, folder), (killed, _) = results["scale"], results["scale-killed"]
    assert whole["done"] and killed["done"], whole["log"] + killed["log"]
    numbers = newest_valid(RunDir(folder))[0].manifest["numbers"]
    assert numbers["scaler"]["scale"] == 2.0 ** 14 and numbers["skipped_in_a_row"] == 0
    assert killed["digest"] == whole["digest"]
