"""Ranks that stop, hang, fail or die while the others watch, forked from one process that imported torch once.

``python watched.py PLAN.json`` reads a list of scenarios and writes RUN.json for each: exit codes, what
``attempts.jsonl`` says, and the ranks' logs. A scenario has ``world``, ``rank`` (whom it befalls), ``fault`` (a name
of ``FAULTS``, as that rank enters step ``at``) and ``machine`` (overrides). A rank that is stopped is killed at the
end, as srun would do once the others have left.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.utils.tensorboard  # imported once here instead of in every rank

from hpcssl.data.reader import Reader
from hpcssl.files import RunDir, read_lines
from hpcssl.train import loop, main, recipe

sys.path.append(str(Path(__file__).parents[1]))
from forked import code_of, fork_rank, free_port, over, place


def stuck_read(_training, _mine):
    reader, held = os.pipe()  # nobody ever writes to it
    Reader.read = lambda *_args, **_more: os.read(reader, held)


def mismatch(training, mine):
    if mine:
        training.world.sum(torch.zeros(3))
    else:
        training.world.gather(torch.zeros(3))


def torn(training, mine):
    training.world.gather(torch.zeros(3 + 40 * mine))


def raise_error(_training, _mine):
    raise ValueError("the seventh image of a rank's own")


def lag(_training, _mine):
    honest = loop.train_step
    loop.train_step = lambda *args: (time.sleep(0.1), honest(*args))[1]


def spin(_training, _mine):
    while True:
        time.sleep(0.05)


FAULTS = {
    "stop": lambda _training, _mine: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda _training, _mine: os.kill(os.getpid(), signal.SIGKILL),
    "raise": raise_error,
    "spin": spin,
    "mismatch": mismatch,
    "torn": torn,
    "stuck_read": stuck_read,
    "lag": lag,
    "slow": lambda _training, _mine: time.sleep(1.0),
    "debugged": lambda _training, _mine: exec(compile("time.sleep(4)", "/lib/pdb.py", "exec")),
    "none": lambda _training, _mine: None,
}


def rank_process(plan, made, rank, port):
    """Fork one rank; the parent gets its pid."""
    def work(stop):
        honest, mine = loop.train_step, rank == plan["rank"]

        def faulty(training, batch, flags):
            if training.step == plan["at"] and (mine or plan["fault"] in ("mismatch", "torn")):
                FAULTS[plan["fault"]](training, mine)
            return honest(training, batch, flags)

        loop.train_step = faulty
        return main.train(RunDir(plan["run"]), made, stop=stop)

    token = plan.get("tokens", ["attempt-2"] * plan["world"])[rank]
    variables = place(rank, plan["world"], port, token) | {"SLURMD_NODENAME": f"n{rank}"}
    return fork_rank(f"{plan['run']}/rank-{rank}.txt", variables, work)


def scenario(plan):
    run = RunDir(plan["run"])
    run.root.mkdir(parents=True)
    made = recipe.compose("digits_msf", plan["overrides"] + plan["machine"])
    port = free_port()
    pids = {r: rank_process(plan, made, r, port) for r in range(plan["world"]) if r not in plan.get("absent", [])}
    if "term" in plan:
        time.sleep(1)
        os.kill(pids[plan["term"]], signal.SIGTERM)
    if "suspend" in plan:
        while not run.attempts.exists():
            time.sleep(0.05)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids.values():
                os.kill(pid, number)
            time.sleep(plan["suspend"])
    waiting = [r for r in pids if not (r == plan["rank"] and plan["fault"] == "stop")]
    timely = [over(pids[r], plan.get("patience", 60)) for r in waiting]
    codes = {r: code_of(pid, 0 if plan["fault"] == "stop" or not all(timely) else 20) for r, pid in pids.items()}
    return {"name": plan["name"], "codes": [codes.get(r) for r in range(plan["world"])], "timely": all(timely),
            "done": run.done.exists(), "ends": [x for x in read_lines(run.attempts) if x["event"] == "end"],
            "logs": [Path(run.root / f"rank-{r}.txt").read_text() if r in pids else "" for r in range(plan["world"])]}


def play(plan):
    """Fork a process that plays one scenario into a file: they mostly wait, and two of them can do so together."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        Path(plan["run"] + ".json").write_text(json.dumps(scenario(plan)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    plans = json.loads(Path(sys.argv[1]).read_text())
    for some in zip(plans[::2], plans[1::2] + [None] * (len(plans) % 2), strict=True):
        for pid in [play(plan) for plan in some if plan]:
            os.waitpid(pid, 0)
