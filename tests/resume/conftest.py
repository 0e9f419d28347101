import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BASE = ["machine.devices=cpu", "views.size=16", "optim.batch=16", "schedule.steps=6", "bank.size=24",
        "machine.checkpoint_steps=2", "machine.checkpoint_minutes=0", "machine.log_samples=true", "machine.log_steps=3"]


@pytest.fixture(scope="session")
def play(shards, tmp_path_factory):
    """play(scenarios) -> {name: (result, run folder)}; each scenario a dict with name, recipe, overrides, worlds,
    attempts. One process forks the ranks of all of them (attempts.py)."""

    def run(scenarios, timeout=540):
        folder = tmp_path_factory.mktemp("runs")
        for plan in scenarios:
            plan["run"] = str(folder / plan["name"])
            plan["overrides"] = [f"data.train={shards.root}", *BASE, *plan["overrides"]]
        (folder / "plan.json").write_text(json.dumps(scenarios))
        script = Path(__file__).with_name("attempts.py")
        done = subprocess.run([sys.executable, str(script), str(folder / "plan.json")], text=True, timeout=timeout,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        results = [json.loads(line) for line in done.stdout.splitlines()]
        return {r["name"]: (r, Path(plan["run"])) for r, plan in zip(results, scenarios, strict=True)}

    return run
