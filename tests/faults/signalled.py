"""Runs whose ranks get signals at chosen moments, all from one process that imported torch once.

``python signalled.py PLAN.json`` plays scenarios, and prints a JSON line for each. A scenario names a run folder and
``signals``, for one attempt after another: ``{"place": one of PLACES, "number": signal, "who": rank or "all", "times":
how often}`` or null. The ranks are forked; the signal comes from a process of its own while the victim is at the
place: blocked in a collective there, since the other ranks come later, or at work that was made to take longer.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401 - imported once here instead of in every rank

from hpcssl.evals import watch as watches
from hpcssl.files import RunDir, read_lines
from hpcssl.signals import Requeue
from hpcssl.train import checkpoint, loop, main, recipe
from hpcssl.train.checkpoint import digest_of
from hpcssl.world import World

sys.path.append(str(Path(__file__).parents[1]))
from forked import code_of, fork_rank, free_port, place

AT = 3
"""The step at which signals come that come at a step."""
HOLD_S = 0.4
PATIENCE_S = 60


def shoot(number, times):
    """Signals for this process from another one, the first while HOLD_S runs, which returns to the caller at once.

    A shell, and no fork of Python's: this process has threads, whose locks the child would inherit.
    """
    once = f"sleep {HOLD_S / 4}; kill -{int(number)} {os.getpid()};"
    subprocess.Popen(["sh", "-c", once * times], stdin=subprocess.DEVNULL)


class Harm:
    """What this rank does at the place, once: the victim is shot at, the others come late. With all ranks as victims,
    rank 0 comes late too, so that the others are shot at in the collective."""

    def __init__(self, plan, rank):
        self.place, self.number, self.times = plan["place"], plan["number"], plan.get("times", 1)
        self.victim = plan["who"] in (rank, "all")
        self.late = rank == 0 if plan["who"] == "all" else not self.victim

    def __call__(self):
        if self.place:
            self.place = None
            if self.victim:
                shoot(self.number, self.times)
            if self.late or self.times > 1:
                time.sleep(HOLD_S)

    # -- where ------------------------------------------------------------------------------------------------

    def arm(self):
        getattr(self, f"at_{self.place}")()

    def before(self, owner, name, when=lambda *args: True):
        honest = getattr(owner, name)

        def changed(*args, **options):
            if when(*args):
                self()
            return honest(*args, **options)

        setattr(owner, name, changed)

    def at_start(self):  # the rendezvous
        honest = World.start
        main.World = type("Late", (), {"start": lambda *args: (self(), honest(*args))[1]})

    def at_load(self):
        self.before(main.Training, "load")

    def at_data(self):
        honest = loop.Loop.go

        def go(it):
            batches = it.batches

            def slow(first, *rest):
                for step, batch in enumerate(batches(first, *rest)):
                    if first + step == AT:
                        self()
                        time.sleep(HOLD_S)
                    yield batch
            it.batches = slow
            return honest(it)
        loop.Loop.go = go

    def at_step(self):
        self.before(loop, "train_step", lambda training, *rest: training.step == AT)

    def at_evaluation(self):
        self.before(watches, "evaluate")

    def at_save(self):  # a periodic one, in flight while the training goes on
        self.before(checkpoint.Store, "begin", lambda store, state: state.step == 2)
        self.slow_parts()

    def at_stop(self):  # the save that a first signal asked for: it comes twice
        self.at_step()
        self.slow_parts()

    def at_last_save(self):
        self.before(checkpoint.Store, "save", lambda store, state: state.step == 6)
        self.slow_parts()

    def at_export(self):
        self.before(loop.Loop, "export", lambda it: it.training.step == 6)

    def at_requeue(self):
        self.at_step()
        again = Harm({"place": "requeue", "number": self.number, "who": "all", "times": 1}, 0)
        self.requeue = again

    def at_leaving(self):  # every word is written; the last collective
        self.before(main.World, "close")

    def slow_parts(self):
        honest = checkpoint.Store._write

        def slow(store, *rest):
            time.sleep(HOLD_S)
            return honest(store, *rest)
        checkpoint.Store._write = slow

    requeue = staticmethod(lambda: None)


PLACES = [name.removeprefix("at_") for name in vars(Harm) if name.startswith("at_")]


def rank_process(run, made, rank, world, port, plan):
    def work(stop):
        harm = Harm(plan, rank) if plan else None
        if harm:
            harm.arm()

        def requeue(signals):
            if harm:
                harm.requeue()
            time.sleep(HOLD_S if harm else 0)
            return Requeue("preempted")

        return main.train(RunDir(run), made, stop=stop, requeue=requeue, watch=watches.watch)

    return fork_rank(f"{run}/rank-logs.txt", place(rank, world, port), work)


def play(run, made, world, plan):
    """One attempt; the exit codes of its ranks (negative: killed by that signal)."""
    port = free_port()
    pids = [rank_process(run, made, rank, world, port, plan) for rank in range(world)]
    return [code_of(pid, PATIENCE_S) for pid in pids]


def scenario(plan):
    run = RunDir(plan["run"])
    run.root.mkdir(parents=True)
    made, codes, saved = recipe.compose(plan["recipe"], plan["overrides"]), [], []
    for signals in [*plan["signals"], None]:
        codes.append(play(str(run.root), made, plan["world"], signals))
        found = checkpoint.newest_valid(run)[0]
        saved.append(found.step if found else 0)
        if run.done.exists():
            break
    ends = [line for line in read_lines(run.attempts) if line["event"] == "end"]
    starts = [line for line in read_lines(run.attempts) if line["event"] == "start"]
    return {"codes": codes, "saved": saved, "causes": [x["cause"] for x in ends],
            "first": [x["first_step"] for x in starts], "last": [x["last_step"] for x in ends],
            "journal": [line["step"] for line in read_lines(run.journal) if "loss" in line],
            "digest": digest_of(run) if run.done.exists() else None,
            "log": Path(run.root / "rank-logs.txt").read_text()[-4000:]}


if __name__ == "__main__":
    for plan in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        print(json.dumps(scenario(plan) | {"name": plan["name"], "seconds": round(time.monotonic() - began, 2)}),
              flush=True)
