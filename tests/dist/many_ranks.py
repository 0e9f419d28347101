"""Many ranks of a tiny training on one machine: ``python many_ranks.py FOLDER DATA SIZE``.

All ranks are forked from this process, so that they share the memory of what it has imported. Two attempts are made:
one that nothing disturbs, and one in which a rank is suspended while it begins a step. FOLDER/outcomes.json gets the
outcomes of both, as ``tests/faults/watched.py`` describes them, the seconds that the first one took, and how long each
of its ranks used the processor until its first step began.
"""

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hpcssl.train import loop
from tests.faults import watched

STEPS, FAULTY_STEP = 3, 2
LONGEST_S = 1500.0
"""Seconds that an attempt may take: all ranks take turns on the cores of this machine."""


def make_scenario(folder, name, data, size, fault):
    """A scenario of watched.py with two rows of the batch per rank."""
    overrides = [
        f"data.train={data}",
        "machine.devices=cpu",
        "views.size=16",
        f"optim.batch={2 * size}",
        f"bank.size={4 * size}",
        "bank.placement=sharded",
        f"schedule.steps={STEPS}",
        "schedule.warmup_epochs=0",
        "machine.log_steps=1",
        "machine.checkpoint_steps=2",
    ]
    return {
        "name": name,
        "run": str(folder / name),
        "fault": fault,
        "world_size": size,
        "rank": get_target(size),
        "step": FAULTY_STEP,
        "overrides": overrides,
        "hang_units": 1,
    }


def get_target(size):
    """The rank that is suspended: neither the first nor the last."""
    return (size // 2 + 5) % size


def record_start(folder):
    """Let each rank write the CPU seconds that it has used when its first step begins."""
    launch_step = loop.launch_step

    def recorded_step(training, *rest):
        if training.step == 0:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            (folder / f"start-{training.world.rank}.txt").write_text(str(usage.ru_utime + usage.ru_stime))
        return launch_step(training, *rest)

    loop.launch_step = recorded_step


def main(folder, data, size):
    watched.PATIENCE_S = LONGEST_S
    record_start(folder)
    began = time.monotonic()
    whole = watched.run_scenario(make_scenario(folder, "whole", data, size, "none") | {"hang_units": 0}, 0)
    seconds = time.monotonic() - began
    starts = [float(path.read_text()) for path in folder.glob("start-*.txt")]
    # no undisturbed rank makes no progress for as long as a whole attempt takes
    hung = watched.run_scenario(make_scenario(folder, "hung", data, size, "sigstop"), max(watched.MIN_HANG_S, seconds))
    outcomes = {"whole": whole, "hung": hung, "seconds": seconds, "start_cpu_s": starts}
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
