"""Signals at the worst moments: one agreed step, every rank leaves by itself, and the end is bit for bit the same."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NUMBERS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
PLACES = ["start", "load", "data", "step", "evaluation", "save", "stop", "last_save", "export", "requeue", "leaving"]
AFTER_THE_LAST_STEP = ("last_save", "export", "leaving")  # a finished training ends as one, whatever comes
QUICK = [("start", signal.SIGTERM, 1), ("evaluation", signal.SIGUSR2, 1), ("stop", signal.SIGTERM, "all"),
         ("last_save", signal.SIGUSR1, "all"), ("requeue", signal.SIGTERM, "all")]
SETTINGS = ["machine.devices=cpu", "views.size=16", "optim.batch=16", "schedule.steps=6", "bank.size=24",
            "machine.checkpoint_steps=2", "machine.checkpoint_minutes=0", "machine.log_steps=1",
            "evals.knn.k=[1]"]


@pytest.fixture(scope="module")
def play(shards, tmp_path_factory):
    """play(cases) -> {case: what came of it}; a case is (place, signal, who). One process forks all ranks."""

    def run(cases):
        folder = tmp_path_factory.mktemp("signals")
        first = {"place": "step", "number": signal.SIGTERM, "who": 0}  # there is something to load
        plans = [{"name": "undisturbed", "signals": []}]
        for case in cases:
            place, number, who = case
            harm = {"place": place, "number": number, "who": who, "times": 2 if place in ("stop", "start") else 1}
            plans.append({"name": repr(case), "signals": [first, harm] if place == "load" else [harm]})
        for number, plan in enumerate(plans):
            plan |= {"run": str(folder / str(number)), "world": 2, "recipe": "digits_msf",
                     "overrides": [f"data.train={shards.root}", f"data.val={shards.root}", *SETTINGS,
                                   f"evals.every_epochs={int('evaluation' in plan['name'])}"]}
        (folder / "plan.json").write_text(json.dumps(plans))
        script = Path(__file__).with_name("signalled.py")
        done = subprocess.run([sys.executable, str(script), str(folder / "plan.json")], text=True, capture_output=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1500)
        assert done.returncode == 0, done.stdout + done.stderr
        return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}

    return run


def judge(found, cases):
    wrong = []
    undisturbed = found["undisturbed"]
    assert undisturbed["digest"] and undisturbed["causes"] == ["done"]
    for case in cases:
        it, place = found[repr(case)], case[0]
        stops = 0 if place in AFTER_THE_LAST_STEP else 2 if place == "load" else 1
        expected = {
            "codes": [[75, 75]] * stops + [[0, 0]],  # each left by itself
            "causes": ["preempted"] * stops + ["done"],
            "journal": [1, 2, 3, 4, 5, 6], "digest": undisturbed["digest"],
            "last": it["saved"], "first": [0, *it["saved"][:stops]],  # durable at the agreed step, and no step lost
        }
        bad = {k: (it[k], v) for k, v in expected.items() if it[k] != v}
        if bad:
            wrong.append(f"{case}: {bad}\n{it['log']}")
    assert not wrong, "\n".join(wrong)


def test_a_few_moments(play):
    judge(play(QUICK), QUICK)


@pytest.mark.full
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("place", PLACES)
def test_every_signal_at_every_moment_to_one_rank_and_to_all(play, place):
    cases = list(itertools.product([place], NUMBERS, [0, 1, "all"]))
    judge(play(cases), cases)
