"""Runs that are killed, stopped and resumed, all from one process that imported torch once.

``python attempts.py PLAN.json`` reads a list of scenarios and prints a JSON line for each. A scenario names a run
folder and its attempts one after another; each attempt forks its ranks, which join over gloo and train until the end,
until ``kill_at`` (a rank sends itself SIGKILL as it enters a step, so that the others lose it in a collective),
``kill_after`` or ``stop_after`` (seconds; to a rank drawn by address, whatever it is doing). ``harm`` lists what else
befalls a rank as it enters a step: ``{"at": STEP, "rank": RANK or "all", "kind": one of HARMS}``. ``stall``: from that
step on a read of this rank never ends, and the rank gets a TERM as it waits for it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.utils.tensorboard  # imported once here instead of in every rank

from hpcssl import rng
from hpcssl.data import loader
from hpcssl.files import RunDir
from hpcssl.train import loop, main, recipe
from hpcssl.train.checkpoint import digest_of

sys.path.append(str(Path(__file__).parents[1]))
from forked import code_of, fork_rank, free_port, place


def images(training):
    """Pixels that are not finite, for one step."""
    honest = training.images

    def bad(batch, numbers=None):
        training.images = honest
        return [x * float("inf") for x in honest(batch, numbers)]

    training.images = bad


def gradient(training):
    """A gradient that is not finite under a loss that is."""
    weight = next(training.pair.online.parameters())

    def bad(grad):
        hook.remove()
        return grad * float("inf")

    hook = weight.register_hook(bad)


def flip(training):
    """One bit of one weight."""
    weight = dict(training.pair.online.named_parameters())["backbone.layer1.0.conv1.weight"]
    weight.detach().permute(0, 2, 3, 1).reshape(-1).view(torch.int32)[5] ^= 1 << 12


def flip_remembered(training):
    """One bit of the row that was pushed last."""
    bank = training.bank
    bank.replicas()["key"][bank.pointer - 1].view(torch.int32)[3] ^= 1 << 12


def stall(at):
    honest = loader._Run._fill

    def stuck(run, slot, rows, scratch):
        if slot.step >= at:
            while run.asked < at:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        honest(run, slot, rows, scratch)

    loader._Run._fill = stuck


HARMS = {"images": images, "gradient": gradient, "flip": flip, "flip_remembered": flip_remembered,
         "kill": lambda training: os.kill(os.getpid(), signal.SIGKILL),
         "stop": lambda training: os.kill(os.getpid(), signal.SIGTERM)}


def rank_process(run, made, rank, world, port, attempt, group):
    """Fork one rank; the parent gets its pid."""
    def work(stop):
        harms = attempt.get("harm", [])
        if "kill_at" in attempt:
            harms = [*harms, {"at": attempt["kill_at"], "rank": attempt["kill_at"] % world, "kind": "kill"}]
        if attempt.get("stall", {}).get("rank") == rank:
            stall(attempt["stall"]["at"])
        honest = loop.train_step

        def harmed(training, batch, flags):
            for harm in harms:
                if harm["at"] == training.step and harm["rank"] in (rank, "all"):
                    HARMS[harm["kind"]](training)
            return honest(training, batch, flags)

        loop.train_step = harmed
        return main.train(RunDir(run), made, stop=stop)

    variables = place(rank, world, port) if world > 1 or group else {}
    return fork_rank(f"{run}/rank-logs.txt", variables, work)


def play(run, made, world, attempt, group):
    """One attempt; the exit codes of its ranks (negative: killed by that signal)."""
    port = free_port()
    pids = [rank_process(run, made, rank, world, port, attempt, group) for rank in range(world)]
    for name, number in (("kill_after", signal.SIGKILL), ("stop_after", signal.SIGTERM)):
        if name in attempt:
            time.sleep(attempt[name])
            victim = pids[int(rng.uniform(rng.key(0, run, name, str(attempt)), 1)[0] * world)]
            if os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(victim, number)
    return [code_of(pid, 120, signal.SIGABRT) for pid in pids]


def scenario(plan):
    run = RunDir(plan["run"])
    run.root.mkdir(parents=True)
    codes, worlds = [], plan["worlds"]
    for number, attempt in enumerate(plan["attempts"]):
        # composed once for all ranks; an attempt may change the machinery, never the science
        made = recipe.compose(plan["recipe"], plan["overrides"] + attempt.get("machine", []))
        codes.append(play(str(run.root), made, worlds[min(number, len(worlds) - 1)], attempt,
                          plan.get("group", False)))
        if run.done.exists():
            break
    done = run.done.exists()
    return {"codes": codes, "done": done, "digest": digest_of(run) if done else None,
            "log": Path(run.root / "rank-logs.txt").read_text()[-3000:] if not done else ""}


if __name__ == "__main__":
    for plan in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        print(json.dumps(scenario(plan) | {"name": plan["name"], "seconds": round(time.monotonic() - began, 2)}),
              flush=True)
