"""The fixture that runs scenarios of tests/resume/attempts.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BASE = [
    "machine.devices=cpu",
    "views.size=16",
    "optim.batch=16",
    "schedule.steps=6",
    "bank.size=24",
    "machine.checkpoint_steps=2",
    "machine.checkpoint_minutes=0",
    "machine.log_sample_ids=true",
    "machine.log_steps=3",
]


MANY = 8
"""From this number of scenarios on, two processes share them."""


def start(scenarios, path):
    """Start a process that runs some scenarios."""
    path.write_text(json.dumps(scenarios))
    command = [sys.executable, str(Path(__file__).with_name("attempts.py")), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


@pytest.fixture(scope="session")
def run_scenarios(shards, tmp_path_factory):
    """run_scenarios([scenario, ...]) -> {name: (result, run folder)}.

    A scenario is a dict with name, recipe, overrides, worlds (ranks of each attempt; the last one is repeated) and
    attempts. One or two processes fork the ranks of all scenarios: see attempts.py.
    """

    def run(scenarios, timeout=540):
        folder = tmp_path_factory.mktemp("runs")
        for scenario in scenarios:
            scenario["run"] = str(folder / scenario["name"])
            scenario["overrides"] = [f"data.train={shards.root}", *BASE, *scenario["overrides"]]
        # two at a time: much of a scenario is spent waiting for a rank that is gone
        parts = [scenarios[::2], scenarios[1::2]] if len(scenarios) >= MANY else [scenarios]
        processes = [start(part, folder / f"scenarios-{number}.json") for number, part in enumerate(parts)]
        try:
            outputs = [process.communicate(timeout=timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * len(processes), outputs
        results = [json.loads(line) for output, _ in outputs for line in output.splitlines()]
        folders = {scenario["name"]: Path(scenario["run"]) for scenario in scenarios}
        assert len(results) == len(folders) == len(scenarios)
        return {result["name"]: (result, folders[result["name"]]) for result in results}

    return run
