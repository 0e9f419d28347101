"""Trainings in which one rank stops, hangs, fails or dies, forked from one process that imported torch once.

``python watched.py PLAN.json`` reads a list of scenarios and writes RUN.json for each: exit codes, the ends in
``attempts.jsonl``, and the ranks' logs. A scenario has ``world_size``, ``rank`` (the target), ``fault`` (a name of
``FAULTS``, injected when that rank begins step ``step``) and ``overrides`` of the recipe. A rank that was suspended is
killed at the end, as srun would do once the others have left.

After how many seconds without progress an attempt counts as hung depends on the machine's speed. So an undisturbed
training is timed first, while another one runs, as every scenario does; ``hang_units`` of a scenario is the limit in
units of that time (``measure_hang_unit``).
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
from hpcssl.distributed import rendezvous
from hpcssl.distributed.liveness import record
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from hpcssl.train import loop, main, recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.forked import exits_within, fork_rank, free_port, launcher_variables, wait_for_exit_code
from tests.waiting import PATIENCE_S, wait_until

MIN_HANG_S = 2.4
"""The watchdog polls every few tenths of a second, and needs a limit of some polls."""


def get_hang_seconds(training):
    """Seconds without progress after which an attempt with these options counts as hung."""
    return 60 * training.recipe.machine.hang_minutes


# -- faults: each is called as ``fault(training, is_target)`` on the target, ``mismatch`` on all ranks -----------------


def stuck_read(_training, _is_target):
    reader, _ = os.pipe()  # nothing is ever written to it
    Reader.read = lambda *_args, **_options: os.read(reader, 1)


def mismatch(training, is_target):
    if is_target:
        training.world.all_reduce_sum(torch.zeros(3))
    else:
        training.world.all_gather(torch.zeros(3))


def raise_error(_training, _is_target):
    raise ValueError("sample 7 is invalid")


def sleep_forever(_training, _is_target):
    while True:
        time.sleep(0.05)


def pause_in_debugger(training, _is_target):
    code = f"time.sleep({1.7 * get_hang_seconds(training)})"
    exec(compile(code, "/lib/pdb.py", "exec"))


FAULTS = {
    "sigstop": lambda _training, _is_target: os.kill(os.getpid(), signal.SIGSTOP),
    "sigkill": lambda _training, _is_target: os.kill(os.getpid(), signal.SIGKILL),
    "raise": raise_error,
    "sleep": sleep_forever,
    "mismatch": mismatch,
    "stuck_read": stuck_read,
    "slow": lambda _training, _is_target: time.sleep(1.0),
    "debugger": pause_in_debugger,
    "none": lambda _training, _is_target: None,
}


# -- scenarios --------------------------------------------------------------------------------------------------------


def fork_training_rank(scenario, composed, rank, port):
    """Fork one rank, and return its process id."""

    def train(stop):
        launch_step, is_target = loop.launch_step, rank == scenario["rank"]

        def faulty_step(training, *rest):
            if training.step == scenario["step"] and (is_target or scenario["fault"] == "mismatch"):
                FAULTS[scenario["fault"]](training, is_target)
            return launch_step(training, *rest)

        loop.launch_step = faulty_step
        arrived = get_arrival_file(scenario, rank)
        if 0 in scenario.get("absent", []):
            arrived.touch()  # no rank hosts the store: this rank only waits for rank 0
        wait_for_all = rendezvous.wait_for_all

        def report_and_wait(store, info, *rest):
            store.set(record.key(info.rank), record.first_record(info.rank))  # as the original does first
            arrived.touch()
            wait_for_all(store, info, *rest)

        rendezvous.wait_for_all = report_and_wait
        return main.train(RunDir(scenario["run"]), composed, stop=stop)

    token = scenario.get("tokens", ["attempt-2"] * scenario["world_size"])[rank]
    variables = launcher_variables(rank, scenario["world_size"], port, token) | {"SLURMD_NODENAME": f"n{rank}"}
    return fork_rank(f"{scenario['run']}/rank-{rank}.txt", variables, train)


def get_arrival_file(scenario, rank):
    """A file that exists once a rank has arrived at the rendezvous."""
    return Path(f"{scenario['run']}/rank-{rank}.arrived")


def run_scenario(scenario, hang_unit_s):
    """Run one attempt, and return its outcome."""
    run = RunDir(scenario["run"])
    run.root.mkdir(parents=True)
    limit = f"machine.hang_minutes={scenario['hang_units'] * hang_unit_s / 60}"
    composed = recipe.compose("digits_msf", [*scenario["overrides"], limit])
    port, size, absent = free_port(), scenario["world_size"], scenario.get("absent", [])
    pids = {rank: fork_training_rank(scenario, composed, rank, port) for rank in range(size) if rank not in absent}
    if "sigterm_rank" in scenario:
        wait_until(lambda: all(get_arrival_file(scenario, rank).exists() for rank in pids), "the ranks that arrive")
        os.kill(pids[scenario["sigterm_rank"]], signal.SIGTERM)
    if "suspend_limits" in scenario:
        wait_until(run.attempts.exists, "an attempt")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids.values():
                os.kill(pid, number)
            time.sleep(scenario["suspend_limits"] * 60 * composed.machine.hang_minutes)
    has_suspended_rank = scenario["fault"] == "sigstop"
    leaving = [rank for rank in pids if not (has_suspended_rank and rank == scenario["rank"])]
    in_time = all(exits_within(pids[rank], PATIENCE_S) for rank in leaving)
    timeout = 0 if has_suspended_rank or not in_time else PATIENCE_S
    codes = {rank: wait_for_exit_code(pid, timeout) for rank, pid in pids.items()}
    logs = {rank: Path(run.root / f"rank-{rank}.txt").read_text() for rank in pids}
    return {
        "name": scenario["name"],
        "codes": [codes.get(rank) for rank in range(size)],
        "in_time": in_time,
        "ends": [line for line in read_lines(run.attempts) if line["event"] == "end"],
        "logs": [logs.get(rank, "") for rank in range(size)],
    }


def fork_scenario(scenario, hang_unit_s):
    """Fork a process that runs one scenario and writes its outcome. Scenarios mostly wait, so two can run together."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        Path(scenario["run"] + ".json").write_text(json.dumps(run_scenario(scenario, hang_unit_s)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def measure_hang_unit(scenario):
    """The seconds that a step may take here: as long as a whole undisturbed training of a few steps takes.

    Another training runs at the same time, as another scenario does.
    """
    timed = [
        scenario | {"name": f"timed {n}", "run": f"{scenario['run']}-timed-{n}", "fault": "none", "hang_units": 0}
        for n in range(2)
    ]
    began = time.monotonic()
    pids = [fork_scenario(each, 0) for each in timed]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    seconds = time.monotonic() - began
    outcomes = [json.loads(Path(each["run"] + ".json").read_text()) for each in timed]
    assert codes == [0, 0] and all(each["codes"] == [0] * scenario["world_size"] for each in outcomes), outcomes
    print(f"two trainings at the same time took {seconds:.2f} s", file=sys.stderr)
    return max(MIN_HANG_S, seconds)


if __name__ == "__main__":
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    unit_s = measure_hang_unit(scenarios[0])
    for first in range(0, len(scenarios), 2):
        for pid in [fork_scenario(scenario, unit_s) for scenario in scenarios[first : first + 2]]:
            os.waitpid(pid, 0)
