"""N steps equal k steps, a kill or a stop, and the rest, bit for bit: parameters, target, bank, optimiser, statistics.

Two ranks alone would prove nothing (a + b commutes), so everything runs on 1, 2 and 4. The runs that are killed change
their number of loader threads from attempt to attempt.
"""

import pytest
import torch
from safetensors.torch import load_file

from hpcssl.files import RunDir, read_lines
from hpcssl.train.checkpoint import Saved, folders

GHOST = ["model.norm=ghost", "model.norm_group=8"]  # on 4 ranks of 4 samples a group spans two ranks
CASES = {
    "msf-local": ("digits_msf", ["model.norm=local"]),
    "msf-whole-sharded": ("digits_msf", ["model.norm=whole", "bank.placement=sharded"]),
    "msf-ghost-shuffle-bf16": ("digits_msf", [*GHOST, "model.shuffle=true", "optim.precision=bf16",
                                              "views.query=small"]),
    "byol-local-fp16": ("digits_byol", ["model.norm=local", "optim.precision=fp16"]),
    "byol-whole-lars": ("digits_byol", ["model.norm=whole", "optim.name=lars", "optim.exclude_norm_and_bias=true"]),
    "byol-ghost-accumulate": ("digits_byol", ["model.norm=ghost", "model.norm_group=2", "machine.accumulate=2"]),
}
ALONE = ("msf-local", "msf-ghost-shuffle-bf16", "byol-ghost-accumulate")  # one process: norms differ in groups only
KILLS = [{"kill_at": 3, "machine": ["machine.loader_threads=2"]},
         {"kill_at": 5, "machine": ["machine.loader_threads=4"]},
         {"machine": ["machine.loader_threads=1"]}]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.full), 4], ids=lambda n: f"{n}-ranks")
def runs(request, play):
    plans = []
    cases = CASES if request.param > 1 else {name: CASES[name] for name in ALONE}
    for name, (recipe, overrides) in cases.items():
        for kind, attempts in (("whole", [{}]), ("killed", KILLS)):
            plans.append({"name": f"{name}.{kind}", "recipe": recipe, "overrides": overrides,
                          "worlds": [request.param], "attempts": attempts})
    return play(plans)


@pytest.mark.parametrize("case", CASES)
def test_killed_runs_end_in_the_same_bits(runs, case):
    if f"{case}.whole" not in runs:
        pytest.skip("one process needs no collective: other cases cover what differs")
    (whole, folder), (killed, torn) = runs[f"{case}.whole"], runs[f"{case}.killed"]
    assert whole["done"], whole["log"]
    assert killed["done"], killed["log"]
    assert [any(code == -9 for code in codes) for codes in killed["codes"]] == [True, True, False]
    assert killed["digest"] == whole["digest"]
    assert read_lines(RunDir(torn).samples) == read_lines(RunDir(folder).samples)
    steps = [line["step"] for line in read_lines(RunDir(torn).journal)]
    assert steps == list(range(1, 7)), "each step stands once in the journal"
    losses = [[line["loss"] for line in read_lines(RunDir(f).journal)] for f in (folder, torn)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.full), 4])
def test_arbitrary_moments(play, world):
    """Preempted 0, 1 and 5 times and killed 0, 1 and 3 times, whatever the ranks were doing: one digest per world."""
    moments = [0.35, 0.9, 0.6, 1.3, 0.75]
    plans = [{"name": f"{world}-{kind}{count}", "recipe": "digits_msf", "worlds": [world],
              "overrides": ["model.norm=whole", "schedule.steps=24"],
              "attempts": [{f"{kind}_after": moments[i] * (1 + world / 4)} for i in range(count)] + [{}]}
             for kind, count in (("stop", 0), ("stop", 1), ("stop", 5), ("kill", 1), ("kill", 3))]
    for name, (result, folder) in (results := play(plans)).items():
        assert result["done"], f"{name}: {result['log']}"
        assert result["digest"] == results[f"{world}-stop0"][0]["digest"], name
        assert [line["step"] for line in read_lines(RunDir(folder).journal)] == list(range(1, 25))
    ends = [code for result, _ in results.values() for codes in result["codes"] for code in codes]
    assert 75 in ends and -9 in ends, f"no attempt was stopped or none was killed in time: {ends}"


def test_a_stop_while_a_read_never_ends(play):
    """The others are in the step by then: all agree that it was never there, and what was finished is kept."""
    plans = [{"name": name, "recipe": "digits_msf", "overrides": ["model.norm=whole", "machine.checkpoint_steps=0"],
              "worlds": [2], "attempts": attempts}
             for name, attempts in (("still", [{}]), ("stalled", [{"stall": {"rank": 1, "at": 3}}, {}]),
                                    ("stalled-at-once", [{"stall": {"rank": 0, "at": 0}}, {}]))]
    results = play(plans)
    for name, finished in (("stalled", 3), ("stalled-at-once", 0)):
        result, folder = results[name]
        assert result["codes"] == [[75] * 2, [0] * 2], result["log"]
        assert result["digest"] == results["still"][0]["digest"]
        ends = [line for line in read_lines(RunDir(folder).attempts) if line["event"] == "end"]
        assert [(line["cause"], line["last_step"]) for line in ends] == [("stopped", finished), ("done", 6)]


def test_elastic_worlds_keep_samples_and_bank(play):
    """Preempted on 4 ranks, resumed on 2 and on 1, or killed on 2, 1 and 4: the same samples at each step, a sharded
    bank that loads on each of them, and the losses of the run that nobody disturbed. Three ranks are refused."""
    overrides = ["model.norm=whole", "bank.placement=sharded", "optim.precision=fp64", "bank.size=26"]
    plans = [{"name": "still", "worlds": [4], "attempts": [{}]},
             {"name": "fewer", "worlds": [4, 2, 1],
              "attempts": [{"harm": [{"at": 1, "rank": 2, "kind": "stop"}]},
                           {"harm": [{"at": 3, "rank": 1, "kind": "stop"}]}, {}]},
             {"name": "killed", "worlds": [2, 1, 4], "attempts": [{"kill_at": 3}, {"kill_at": 5}, {}]},
             {"name": "refused", "worlds": [4, 3],
              "attempts": [{"harm": [{"at": 1, "rank": 0, "kind": "stop"}]}, {}]}]
    results = play([{"recipe": "digits_msf", "overrides": overrides, **plan} for plan in plans])
    still, here = results["still"]
    assert still["done"], still["log"]
    for name, ends in (("fewer", [[75] * 4, [75] * 2, [0]]), ("killed", None)):
        moving, there = results[name]
        assert moving["done"], moving["log"]
        assert ends is None or moving["codes"] == ends
        assert read_lines(RunDir(here).samples) == read_lines(RunDir(there).samples)
        losses = [[line["loss"] for line in read_lines(RunDir(f).journal)] for f in (here, there)]
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-10)
        _close(here, there, 1e-10)
    refused, _ = results["refused"]
    assert refused["codes"] == [[75] * 4, [1] * 3]
    assert "3 processes: got " in refused["log"] and "such as 1, 2, 4" in refused["log"]


def test_worlds_agree_in_float64(play):
    """50 steps on 1, 2 and 4 ranks end within 1e-10 of each other, with synchronised and with ghost norm."""
    plans = [{"name": f"{method}-{norm[0].split('=')[1]}-{world}", "recipe": f"digits_{method}", "worlds": [world],
              "overrides": [*norm, "optim.precision=fp64", "schedule.steps=50", "machine.checkpoint_steps=0"],
              "attempts": [{}]}
             for method, norm in (("msf", ["model.norm=whole"]), ("byol", [*GHOST, "model.shuffle=true"]))
             for world in (1, 2, 4)]
    results = play(plans)
    for name, (result, folder) in results.items():
        assert result["done"], result["log"]
        _close(results[name[:-1] + "1"][1], folder, 1e-10)


def _close(one, other, tolerance):
    states = [Saved.open(folders(RunDir(f))[-1][1]) for f in (one, other)]
    assert states[0].names == states[1].names
    for name in states[0].names:
        a, b = (s.rows(name) for s in states)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance if a.is_floating_point() else 0,
                                   msg=lambda m, n=name: f"{n}: {m}")
    weights = [load_file(sorted(RunDir(f).weights.glob("*"))[-1]) for f in (one, other)]
    assert weights[0].keys() == weights[1].keys()
