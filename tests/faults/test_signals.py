"""Signals at the worst moments: all ranks stop at one step and leave by themselves, and the result is bit-identical.

The scenarios run in ``signaled.py``.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
PLACES = [
    "start",
    "load",
    "data",
    "step",
    "evaluation",
    "save",
    "stop",
    "last_save",
    "export",
    "requeue",
    "leaving",
    "last_evaluation",
    "scored",
]
AFTER_THE_LAST_STEP = ("last_save", "export", "scored", "leaving")
"""A training that only has to write its result ends as a finished one, whatever signal comes.

The last evaluation is work of its own, and can be stopped.
"""
QUICK = [
    ("start", signal.SIGTERM, 1),
    ("evaluation", signal.SIGUSR2, 1),
    ("last_evaluation", signal.SIGUSR2, 1),
    ("scored", signal.SIGUSR2, 1),
    ("stop", signal.SIGTERM, "all"),
    ("last_save", signal.SIGUSR1, "all"),
    ("requeue", signal.SIGTERM, "all"),
]
UNDISTURBED = "undisturbed"
OVERRIDES = [
    "machine.devices=cpu",
    "views.size=16",
    "optim.batch=16",
    "schedule.steps=6",
    "bank.size=24",
    "machine.checkpoint_steps=2",
    "machine.checkpoint_minutes=0",
    "machine.log_steps=1",
    "evals.knn.k=[1]",
]


@pytest.fixture(scope="module")
def run_cases(shards, tmp_path_factory):
    """``run_cases(cases)``: the outcome of each case, by its ``repr``; a case is (place, signal, target)."""

    def run(cases):
        folder = tmp_path_factory.mktemp("signals")
        first = {"place": "step", "number": signal.SIGTERM, "target": 0}  # leaves a checkpoint to load
        scenarios = [{"name": UNDISTURBED, "signals": [], "evaluates": False}]
        for case in cases:
            place, number, target = case
            plan = {"place": place, "number": number, "target": target}
            signals = [first, plan] if place == "load" else [plan]
            evaluates = "evaluation" in place or place == "scored"
            scenarios.append({"name": repr(case), "signals": signals, "evaluates": evaluates})
        for number, scenario in enumerate(scenarios):
            data = [f"data.train={shards.root}", f"data.val={shards.root}"]
            evaluation = f"evals.knn_every_epochs={int(scenario['evaluates'])}"
            scenario |= {
                "run": str(folder / str(number)),
                "world_size": 2,
                "recipe": "digits_msf",
                "overrides": [*data, *OVERRIDES, evaluation],
            }
        (folder / "plan.json").write_text(json.dumps(scenarios))
        command = [sys.executable, str(Path(__file__).with_name("signaled.py")), str(folder / "plan.json")]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, text=True, capture_output=True, env=environ, timeout=1700)
        assert done.returncode == 0, done.stdout + done.stderr
        return {outcome["name"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}

    return run


def check_outcomes(outcomes, cases):
    """Assert that every case ended as it must."""
    undisturbed = outcomes[UNDISTURBED]
    assert undisturbed["digest"] and undisturbed["causes"] == ["done"]
    failures = []
    for case in cases:
        outcome, place = outcomes[repr(case)], case[0]
        stops = 0 if place in AFTER_THE_LAST_STEP else 2 if place == "load" else 1
        expected = {
            "codes": [[75, 75]] * stops + [[0, 0]],  # every rank left by itself
            "causes": ["preempted"] * stops + ["done"],
            "journal": [1, 2, 3, 4, 5, 6],
            "digest": undisturbed["digest"],
            "last_steps": outcome["saved_steps"],  # the state at the agreed step is saved
            "first_steps": [0, *outcome["saved_steps"][:stops]],  # and no step is lost
        }
        differences = {key: (outcome[key], value) for key, value in expected.items() if outcome[key] != value}
        if differences:
            failures.append(f"{case}: {differences}\n{outcome['log']}")
    assert not failures, "\n".join(failures)


def test_a_few_signals_do_not_change_the_result(run_cases):
    check_outcomes(run_cases(QUICK), QUICK)


@pytest.mark.full
@pytest.mark.parametrize("place", PLACES)
def test_no_signal_at_any_place_changes_the_result(run_cases, place):
    cases = list(itertools.product([place], NUMBERS, [0, 1, "all"]))
    check_outcomes(run_cases(cases), cases)
