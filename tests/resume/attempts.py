"""Runs that are killed, stopped and resumed, all from one process that imported torch once.

``python attempts.py SCENARIOS.json`` reads a list of scenarios and prints a JSON line for each. A scenario has a run
folder, a recipe and a list of attempts. Each attempt forks its ranks, which join over gloo and train until the end,
unless the attempt has one of these keys:

- ``kill_at``: A rank sends itself SIGKILL when it enters this step, so that the others lose it in a collective.
- ``kill_after``, ``stop_after``: After so many seconds, a rank that is drawn by a key gets SIGKILL or SIGTERM,
  whatever it is doing.
- ``faults``: A list of ``{"at": STEP, "rank": RANK or "all", "kind": a key of FAULTS}``: what happens to a rank when
  it enters a step.
- ``stall``: ``{"at": STEP, "rank": RANK}``: From this step on a read of this rank never returns, and the rank gets a
  SIGTERM while it waits for it.
- ``late``: True: the host reads late whether a step is taken, as on a GPU.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.utils.tensorboard  # imported once here instead of in every rank

from hpcssl import rng
from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.data import workers
from hpcssl.distributed.liveness import heartbeat
from hpcssl.run_dir import RunDir
from hpcssl.train import loop, main, recipe
from hpcssl.train.start import initial_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.forked import fork_rank, free_port, launcher_variables, wait_for_exit_code

# no test of these runs asks which rank was blamed: the others may look for the reason in a fraction of the usual time
heartbeat.Heartbeat.__init__.__kwdefaults__["interval_s"] = 0.25
heartbeat.MIN_OBSERVATION_S = 0.6


def nonfinite_images(training):
    """Make the pixels of one step infinite."""
    original = training.images

    def infinite_images(batch, numbers=None):
        training.images = original
        return [x * float("inf") for x in original(batch, numbers)]

    training.images = infinite_images


def nonfinite_gradient(training):
    """Make one gradient of one step infinite, while the loss stays finite."""
    weight = next(training.pair.online.parameters())

    def infinite_gradient(grad):
        hook.remove()
        return grad * float("inf")

    hook = weight.register_hook(infinite_gradient)


def flip_weight(training):
    """Flip one bit of one weight."""
    weight = dict(training.pair.online.named_parameters())["backbone.layer1.0.conv1.weight"]
    weight.detach().permute(0, 2, 3, 1).reshape(-1).view(torch.int32)[5] ^= 1 << 12


def flip_bank_row(training):
    """Flip one bit of the row that was pushed last."""
    bank = training.bank
    bank.replicas()["key"][bank.pointer - 1].view(torch.int32)[3] ^= 1 << 12


def stall_reads(at):
    """Let reads for step ``at`` and later never return; the rank gets a SIGTERM when it waits for them."""
    original = workers.LoaderWorkers._fill

    def stalled(run, slot, *rest):
        if slot.step >= at:
            while run.wanted_step < at:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        original(run, slot, *rest)

    workers.LoaderWorkers._fill = stalled


def read_late():
    """Let the loop read verdicts late."""
    original = loop.StepQueue

    def late_queue(training, *rest):
        training.late_verdicts = True
        return original(training, *rest)

    loop.StepQueue = late_queue


FAULTS = {
    "nonfinite_images": nonfinite_images,
    "nonfinite_gradient": nonfinite_gradient,
    "flip_weight": flip_weight,
    "flip_bank_row": flip_bank_row,
    "kill": lambda training: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda training: os.kill(os.getpid(), signal.SIGTERM),
}


def fork_training_rank(run, composed, rank, world, port, attempt, distributed):
    """Fork one rank of an attempt and return its process id."""

    def work(stop):
        faults = attempt.get("faults", [])
        if "kill_at" in attempt:
            faults = [*faults, {"at": attempt["kill_at"], "rank": attempt["kill_at"] % world, "kind": "kill"}]
        if attempt.get("stall", {}).get("rank") == rank:
            stall_reads(attempt["stall"]["at"])
        if attempt.get("late"):
            read_late()
        original = loop.launch_step

        def faulty_step(training, *rest):
            for fault in faults:
                if fault["at"] == training.step and fault["rank"] in (rank, "all"):
                    FAULTS[fault["kind"]](training)
            return original(training, *rest)

        loop.launch_step = faulty_step
        return main.train(RunDir(run), composed, stop=stop)

    variables = launcher_variables(rank, world, port) if world > 1 or distributed else {}
    return fork_rank(f"{run}/rank-logs.txt", variables, work)


def run_attempt(run, composed, world, attempt, distributed):
    """Run one attempt and return the exit codes of its ranks, negative if killed by that signal."""
    port = free_port()
    pids = [fork_training_rank(run, composed, rank, world, port, attempt, distributed) for rank in range(world)]
    for name, number in (("kill_after", signal.SIGKILL), ("stop_after", signal.SIGTERM)):
        if name in attempt:
            time.sleep(attempt[name])
            target = pids[int(rng.uniform(rng.key(0, run, name, str(attempt)), 1)[0] * world)]
            if os.waitid(os.P_PID, target, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(target, number)
    return [wait_for_exit_code(pid, 120, signal.SIGABRT) for pid in pids]


def run_scenario(scenario):
    """Run the attempts of a scenario until the run is finished, and return the result."""
    run = RunDir(scenario["run"])
    run.root.mkdir(parents=True)
    codes, worlds = [], scenario["worlds"]
    for number, attempt in enumerate(scenario["attempts"]):
        # composed once for all ranks; an attempt may change the machine section, but nothing that changes results
        composed = recipe.compose(scenario["recipe"], scenario["overrides"] + attempt.get("machine", []))
        composed = initial_weights.resolve(composed, run)
        world = worlds[min(number, len(worlds) - 1)]
        codes.append(run_attempt(str(run.root), composed, world, attempt, scenario.get("distributed", False)))
        if run.done.exists():
            break
    done = run.done.exists()
    return {
        "codes": codes,
        "done": done,
        "digest": checkpoint_digest(run) if done else None,
        "log": Path(run.root / "rank-logs.txt").read_text()[-3000:] if not done else "",
    }


if __name__ == "__main__":
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        result = run_scenario(scenario) | {"name": scenario["name"]}
        print(json.dumps(result | {"seconds": round(time.monotonic() - began, 2)}), flush=True)
