"""A run that was killed or stopped and resumed ends with the same bits as an undisturbed one.

That holds for parameters, target encoder, bank, optimizer and statistics. Two ranks alone would prove nothing, since
a + b = b + a whatever the order, so everything runs on 1, 2 and 4 ranks. The attempts of killed runs have different
numbers of loader threads.
"""

import pytest
import torch
from safetensors.torch import load_file

from hpcssl.checkpoint.reader import SavedCheckpoint, folders
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from tests.printed import numbers_in, printed_error
from tests.tolerances import of_step

GHOST = ["model.norm=ghost", "model.norm_group_size=8"]  # with 4 ranks of 4 samples each, a group spans two ranks
CASES = {
    "msf-local": ("digits_msf", ["model.norm=local"]),
    "msf-sync-sharded": ("digits_msf", ["model.norm=sync", "bank.placement=sharded"]),
    "msf-ghost-shuffle-bf16": (
        "digits_msf",
        [*GHOST, "model.shuffle_bn=true", "optim.precision=bf16", "views.query=small"],
    ),
    "byol-local-fp16": ("digits_byol", ["model.norm=local", "optim.precision=fp16"]),
    "byol-sync-lars": ("digits_byol", ["model.norm=sync", "optim.name=lars", "optim.exclude_norm_and_bias=true"]),
    "byol-ghost-accumulate": (
        "digits_byol",
        ["model.norm=ghost", "model.norm_group_size=2", "machine.accumulation_steps=2"],
    ),
}
FULL = ("msf-sync-sharded", "byol-local-fp16")  # in the full suite; test_recipes.py has sharded banks and sync norms
ONE_RANK = ("msf-local", "msf-ghost-shuffle-bf16", "byol-ghost-accumulate")  # cases that also run with one rank
KILLED = [
    {"kill_at": 3, "machine": ["machine.loader_threads=2"]},
    {"kill_at": 5, "machine": ["machine.loader_threads=4"]},
    {"machine": ["machine.loader_threads=1"]},
]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.full), 4], ids=lambda n: f"{n}-ranks")
def runs(request, run_scenarios):
    scenarios = []
    names = (
        ONE_RANK if request.param == 1 else [n for n in CASES if request.config.getoption("--full") or n not in FULL]
    )
    for name in names:
        recipe, overrides = CASES[name]
        for kind, attempts in (("undisturbed", [{}]), ("killed", KILLED)):
            scenarios.append(
                {
                    "name": f"{name}.{kind}",
                    "recipe": recipe,
                    "overrides": overrides,
                    "worlds": [request.param],
                    "attempts": attempts,
                }
            )
    return run_scenarios(scenarios)


@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.full if n in FULL else ()) for n in CASES])
def test_a_killed_run_ends_with_the_same_bits(runs, case):
    if f"{case}.undisturbed" not in runs:
        pytest.skip("one process uses no collectives: the other cases cover the differences")
    (undisturbed, folder), (killed, killed_folder) = runs[f"{case}.undisturbed"], runs[f"{case}.killed"]
    assert undisturbed["done"], undisturbed["log"]
    assert killed["done"], killed["log"]
    assert [any(code == -9 for code in codes) for codes in killed["codes"]] == [True, True, False]
    assert killed["digest"] == undisturbed["digest"]
    assert read_lines(RunDir(killed_folder).samples) == read_lines(RunDir(folder).samples)
    steps = [line["step"] for line in read_lines(RunDir(killed_folder).journal)]
    assert steps == list(range(1, 7)), "each step must be in the journal once"
    losses = [[line["loss"] for line in read_lines(RunDir(f).journal)] for f in (folder, killed_folder)]
    assert losses[0] == losses[1]


MANY = [("stop", 0), ("stop", 5), ("kill", 3)]
ALL = [*MANY, ("stop", 1), ("kill", 1)]


@pytest.mark.parametrize(
    ("world", "interruptions"),
    [(4, MANY), *(pytest.param(world, ALL, marks=pytest.mark.full) for world in (2, 4))],
    ids=lambda value: str(len(value) if isinstance(value, list) else value),
)
def test_kills_and_stops_at_arbitrary_moments_change_no_bit(run_scenarios, world, interruptions):
    """Stopped or killed so many times, whatever the ranks are doing: all end with one digest."""
    moments = [0.35, 0.9, 0.6, 1.3, 0.75]
    scenarios = [
        {
            "name": f"{world}-{kind}{count}",
            "recipe": "digits_msf",
            "worlds": [world],
            "overrides": ["model.norm=sync", "schedule.steps=24"],
            "attempts": [{f"{kind}_after": moments[i] * (1 + world / 4)} for i in range(count)] + [{}],
        }
        for kind, count in interruptions
    ]
    for name, (result, folder) in (results := run_scenarios(scenarios)).items():
        assert result["done"], f"{name}: {result['log']}"
        assert result["digest"] == results[f"{world}-stop0"][0]["digest"], name
        assert [line["step"] for line in read_lines(RunDir(folder).journal)] == list(range(1, 25))
    ends = [code for result, _ in results.values() for codes in result["codes"] for code in codes]
    assert 75 in ends and -9 in ends, f"no attempt was stopped or none was killed in time: {ends}"


def test_a_stop_during_a_read_that_never_returns(run_scenarios):
    """The other ranks have begun the step: all abandon it, and the steps before it are saved."""
    scenarios = [
        {
            "name": name,
            "recipe": "digits_msf",
            "overrides": ["model.norm=sync", "machine.checkpoint_steps=0"],
            "worlds": [2],
            "attempts": attempts,
        }
        for name, attempts in (
            ("undisturbed", [{}]),
            ("stalled", [{"stall": {"rank": 1, "at": 3}}, {}]),
            ("stalled-in-first-step", [{"stall": {"rank": 0, "at": 0}}, {}]),
        )
    ]
    results = run_scenarios(scenarios)
    for name, finished in (("stalled", 3), ("stalled-in-first-step", 0)):
        result, folder = results[name]
        assert result["codes"] == [[75] * 2, [0] * 2], result["log"]
        assert result["digest"] == results["undisturbed"][0]["digest"]
        ends = [line for line in read_lines(RunDir(folder).attempts) if line["event"] == "end"]
        assert [(line["cause"], line["last_step"]) for line in ends] == [("stopped", finished), ("done", 6)]


def test_other_numbers_of_ranks_read_the_same_samples_and_bank(run_scenarios):
    """Stopped on 4 ranks and resumed on 2 and on 1, or killed on 2 and 1 and resumed on 4.

    Each step has the same samples, the sharded bank loads on any number of ranks, and the losses are those of the
    undisturbed run. Three ranks are refused.
    """
    overrides = ["model.norm=sync", "bank.placement=sharded", "optim.precision=fp64", "bank.size=26"]
    scenarios = [
        {"name": "undisturbed", "worlds": [4], "attempts": [{}]},
        {
            "name": "fewer",
            "worlds": [4, 2, 1],
            "attempts": [
                {"faults": [{"at": 1, "rank": 2, "kind": "stop"}]},
                {"faults": [{"at": 3, "rank": 1, "kind": "stop"}]},
                {},
            ],
        },
        {"name": "killed", "worlds": [2, 1, 4], "attempts": [{"kill_at": 3}, {"kill_at": 5}, {}]},
        {"name": "refused", "worlds": [4, 3], "attempts": [{"faults": [{"at": 1, "rank": 0, "kind": "stop"}]}, {}]},
    ]
    results = run_scenarios([{"recipe": "digits_msf", "overrides": overrides, **scenario} for scenario in scenarios])
    undisturbed, folder = results["undisturbed"]
    assert undisturbed["done"], undisturbed["log"]
    for name, ends in (("fewer", [[75] * 4, [75] * 2, [0]]), ("killed", None)):
        resumed, other_folder = results[name]
        assert resumed["done"], resumed["log"]
        assert ends is None or resumed["codes"] == ends
        assert read_lines(RunDir(folder).samples) == read_lines(RunDir(other_folder).samples)
        losses = [[line["loss"] for line in read_lines(RunDir(f).journal)] for f in (folder, other_folder)]
        # all parameters perturbed by a relative 1e-11: the states of six steps changed by up to 12 times as much
        tolerance = of_step(6, amplification=15)
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=tolerance)
        assert_close_checkpoints(folder, other_folder, tolerance)
    refused, _ = results["refused"]
    assert refused["codes"] == [[75] * 4, [1] * 3]
    lines = [line for line in refused["log"].splitlines() if "3 processes: " in line]
    for line in lines:
        error = printed_error("hpcssl: " + line[line.index("3 processes: ") :])
        assert error.what == "3 processes" and numbers_in(error.got)[0] == 16
        assert numbers_in(error.expected)[:3] == [1, 2, 4]
    assert lines, refused["log"]


NORMS = {"msf": ["model.norm=sync"], "byol": [*GHOST, "model.shuffle_bn=true"]}


@pytest.mark.parametrize(
    ("method", "worlds"),
    [
        pytest.param(method, worlds, marks=() if (method, worlds) == ("msf", (1, 4)) else pytest.mark.full)
        for method in NORMS
        for worlds in ((1, 4), (1, 2))
    ],
    ids=str,
)
def test_numbers_of_ranks_agree_in_float64(run_scenarios, method, worlds):
    """50 steps on so many ranks end equal up to rounding, with synchronized and with ghost norm.

    All parameters perturbed by a relative 1e-11 before the first step changed the states of 50 steps by up to 260 times
    as much for MSF and 1,140 times for BYOL, whose norms have groups of 8 (the largest of two perturbations each).
    """
    amplification = {"msf": 300, "byol": 1200}
    scenarios = [
        {
            "name": str(world),
            "recipe": f"digits_{method}",
            "worlds": [world],
            "overrides": [*NORMS[method], "optim.precision=fp64", "schedule.steps=50", "machine.checkpoint_steps=0"],
            "attempts": [{}],
        }
        for world in worlds
    ]
    results = run_scenarios(scenarios)
    for result, folder in results.values():
        assert result["done"], result["log"]
        assert_close_checkpoints(results["1"][1], folder, of_step(50, amplification[method]))


def assert_close_checkpoints(one, other, tolerance):
    """Compare the last checkpoints and exported weights of two run folders; integers must be equal.

    ``tolerance`` is relative to the largest number of a tensor, or absolute if that is below 1.
    """
    states = [SavedCheckpoint.open(folders(RunDir(f))[-1][1]) for f in (one, other)]
    assert states[0].names == states[1].names
    for name in states[0].names:
        a, b = (s.rows(name) for s in states)
        close = tolerance * max(1.0, float(a.abs().max())) if a.is_floating_point() and a.numel() else 0
        torch.testing.assert_close(a, b, rtol=0, atol=close, msg=lambda m, n=name: f"{n}: {m}")
    weights = [load_file(sorted(RunDir(f).weights.glob("*"))[-1]) for f in (one, other)]
    assert weights[0].keys() == weights[1].keys()
