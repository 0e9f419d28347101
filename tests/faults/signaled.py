"""Trainings whose ranks get signals at chosen places, all forked from one process that imported torch once.

``python signaled.py PLAN.json`` runs scenarios and prints a JSON line for each. A scenario names a run folder and
``signals``, one entry per attempt: ``{"place": one of PLACES, "number": signal, "target": rank or "all"}`` or null.

Nothing here depends on how fast the machine is. This process forks the ranks and sends the signals, so that they come
from outside, as SLURM's do. A rank requests its signal when it arrives at the place. This process waits until the
rank's main thread sleeps (in a collective, since the other ranks are kept back, or in work that was made to wait), and
then sends it. Whoever waits for the delivery waits for a confirmation by the receiving process:
``signal.set_wakeup_fd`` lets the C handler itself write a byte into a pipe, even while the main thread is blocked in C
code and no Python handler can run.
"""

import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401 - imported once here instead of in every rank

from hpcssl.checkpoint import manager
from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.distributed import rendezvous
from hpcssl.distributed.liveness import record
from hpcssl.evals import online_knn
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from hpcssl.signals import Requeue
from hpcssl.train import loop, main, recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.forked import fork_rank, free_port, launcher_variables, wait_for_exit_code
from tests.waiting import PATIENCE_S, wait_until

SIGNAL_STEP = 3
"""Number of completed steps at which signals come that come at a step."""
LAST_STEP = 6
REQUEST = struct.Struct("ii")
"""A rank's request for a signal: its rank and the signal's number."""


class SignalPipes:
    """The pipes between the ranks of one attempt and the process that sends the signals.

    Args:
        world_size: Number of ranks.

    Attributes:
        requests: File descriptor from which the requests of all ranks are read.
    """

    def __init__(self, world_size):
        self.requests, self._request = os.pipe()
        self._deliveries = [os.pipe() for _ in range(world_size)]
        for _, end in self._deliveries:
            os.set_blocking(end, False)  # set_wakeup_fd requires it

    def record_deliveries(self, rank):
        """Called by a rank: from now on, every signal that reaches this process leaves a byte in its pipe."""
        signal.set_wakeup_fd(self._deliveries[rank][1])

    def request(self, rank, number):
        """Called by a rank: request a signal, and return at once."""
        os.write(self._request, REQUEST.pack(rank, int(number)))

    def count_delivered(self, rank):
        """How many signals have reached a rank. The bytes stay in the pipe, so that every process can count them."""
        waiting = fcntl.ioctl(self._deliveries[rank][0], termios.FIONREAD, struct.pack("i", 0))
        return struct.unpack("i", waiting)[0]

    def close(self):
        for end in (self.requests, self._request, *(end for pair in self._deliveries for end in pair)):
            os.close(end)


class SignalInjector:
    """Lets one rank get its signal at a place, once.

    A target requests its signal, and the other ranks arrive late: only after the delivery. If all ranks are targets,
    rank 0 arrives late too, so that the others get their signals in the collective.

    Args:
        plan: ``place``, ``number`` and ``target`` of the scenario.
        rank: This rank.
        world_size: Number of ranks.
        pipes: The pipes of this attempt.
        stop: This rank's ``StopFlag``.
    """

    def __init__(self, plan, rank, world_size, pipes, stop):
        self.place, self.number = plan["place"], plan["number"]
        self.rank, self.pipes, self.stop = rank, pipes, stop
        self.targets = list(range(world_size)) if plan["target"] == "all" else [plan["target"]]
        self.is_target = rank in self.targets
        self.is_late = rank == 0 if plan["target"] == "all" else not self.is_target
        self.has_arrived = False
        self.on_requeue = lambda: None

    def install(self):
        """Replace the functions of this process through which it arrives at the place."""
        getattr(self, f"at_{self.place}")()

    def arrive(self, wait=False):
        """Arrive at the place. ``wait``: every rank waits for the delivery, since nothing else would keep it there."""
        if self.has_arrived:
            return
        self.has_arrived = True
        self.request_signal()
        if self.is_late or wait:
            self.wait_for_delivery(1)

    def request_signal(self):
        """Request a signal for this rank, if it is a target."""
        if self.is_target:
            self.pipes.request(self.rank, self.number)

    def wait_for_delivery(self, count):
        """Wait until every target has got ``count`` signals, and a target also until its own handler has run."""
        wait_until(
            lambda: all(self.pipes.count_delivered(rank) >= count for rank in self.targets),
            lambda: f"{count} signals for each target: {[self.pipes.count_delivered(rank) for rank in self.targets]}",
        )
        if self.is_target and signal.getsignal(self.number) == self.stop._set_from_signal:
            wait_until(self.stop.is_set, "the flag of the signal that was delivered")

    def arrive_before(self, owner, name, when=lambda *args: True, wait=False):
        """Replace a function by one that arrives before it calls the original, if ``when`` holds of its arguments."""
        original = getattr(owner, name)

        def replacement(*args, **options):
            if when(*args):
                self.arrive(wait)
            return original(*args, **options)

        setattr(owner, name, replacement)

    def call_before_write(self, first_step, function):
        """Call ``function`` before this rank writes its part of the first checkpoint from ``first_step`` on."""
        original, pending = manager.CheckpointManager._write, [function]

        def write(checkpoints, step):
            if step >= first_step and pending:
                pending.pop()()
            return original(checkpoints, step)

        manager.CheckpointManager._write = write

    # -- places -------------------------------------------------------------------------------------------------

    def at_start(self):
        """Two signals before the ranks have met.

        A rank that is to stop while others are missing begins nothing (test_watchdog.py, "stop while missing"). Here
        all ranks come, so targets continue once they see all of them.
        """
        original = rendezvous.wait_for_all

        def wait_for_all(store, info, *rest):
            for count in (1, 2):
                self.request_signal()
                self.wait_for_delivery(count)
            if self.is_target:
                store.set(record.key(info.rank), record.first_record(info.rank))
                keys = [record.key(rank) for rank in range(info.size)]
                wait_until(lambda: store.contains(keys), "all ranks to come")
            original(store, info, *rest)

        rendezvous.wait_for_all = wait_for_all

    def at_load(self):
        self.arrive_before(main.TrainState, "load")

    def at_data(self):
        original = loop.Loop.run

        def run(this_loop):
            batches = this_loop.batches

            def slow_batches(first, *rest):
                for step, batch in enumerate(batches(first, *rest)):
                    if first + step == SIGNAL_STEP:
                        self.arrive(wait=True)
                    yield batch

            this_loop.batches = slow_batches
            return original(this_loop)

        loop.Loop.run = run

    def at_step(self):
        self.arrive_before(loop, "launch_step", lambda training, *rest: training.step == SIGNAL_STEP)

    def at_evaluation(self):
        self.arrive_before(online_knn, "evaluate")

    def at_last_evaluation(self):
        """After the last step: its checkpoint is written, and the run is not finished yet."""
        self.arrive_before(online_knn.OnlineKnn, "__call__", lambda evaluation, path, step: step == LAST_STEP)

    def at_scored(self):
        """The last evaluation has its scores: too late to stop anything."""
        original = online_knn.OnlineKnn.__call__

        def evaluate(evaluation, path, step):
            scores = original(evaluation, path, step)
            if step == LAST_STEP:
                self.arrive(wait=True)
            return scores

        online_knn.OnlineKnn.__call__ = evaluate

    def at_save(self):
        """A periodic save, which is written while the training continues."""
        self.arrive_before(manager.CheckpointManager, "begin", lambda checkpoints, state: state.step == 2)
        self.call_before_write(2, lambda: self.wait_for_delivery(1))

    def at_stop(self):
        """A second signal during the save that the first one caused."""
        self.at_step()

        def get_second_signal():
            self.request_signal()
            self.wait_for_delivery(2)

        self.call_before_write(SIGNAL_STEP + 1, get_second_signal)

    def at_last_save(self):
        self.arrive_before(manager.CheckpointManager, "save", lambda checkpoints, state: state.step == LAST_STEP)
        self.call_before_write(LAST_STEP, lambda: self.wait_for_delivery(1))

    def at_export(self):
        self.arrive_before(loop.Loop, "export", lambda this_loop: this_loop.training.step == LAST_STEP)

    def at_requeue(self):
        """A second signal during the request for another attempt, which only rank 0 makes."""
        self.at_step()

        def get_second_signal():
            before = self.pipes.count_delivered(self.rank)
            self.pipes.request(self.rank, self.number)
            wait_until(lambda: self.pipes.count_delivered(self.rank) > before, "the signal during the requeue")

        self.on_requeue = get_second_signal

    def at_leaving(self):
        """All is written, and the last collective follows."""
        self.arrive_before(main.World, "close", wait=True)


PLACES = [name.removeprefix("at_") for name in vars(SignalInjector) if name.startswith("at_")]


def fork_training_rank(run, composed, rank, world_size, port, plan, pipes):
    """Fork one rank of an attempt, and return its process id. ``plan``: the signal; None for no signal."""

    def train(stop):
        pipes.record_deliveries(rank)
        injector = SignalInjector(plan, rank, world_size, pipes, stop) if plan else None
        if injector:
            injector.install()

        def requeue(signals):
            if injector:
                injector.on_requeue()
            return Requeue("preempted")

        build = online_knn.build_online_knn
        return main.train(RunDir(run), composed, stop=stop, requeue=requeue, build_online_evaluation=build)

    return fork_rank(f"{run}/rank-logs.txt", launcher_variables(rank, world_size, port), train)


def is_asleep(pid, polls=10, pause=0.005):
    """Whether the main thread of a process sleeps, or has ended, in that many polls one after the other."""
    for _ in range(polls):
        text = Path(f"/proc/{pid}/task/{pid}/stat").read_text()
        if text.rpartition(")")[2].split()[0] not in "SZX":
            return False
        time.sleep(pause)
    return True


def send_when_asleep(pid, number):
    """Send a signal to a process whose main thread sleeps, or after ten seconds in any case.

    At which instruction the signal arrives makes the case harder or easier, but must not change how it ends.
    """
    deadline = time.monotonic() + 10
    while not is_asleep(pid) and time.monotonic() < deadline:
        pass
    os.kill(pid, number)  # a child without a wait() so far: the pid cannot belong to another process


def run_attempt(run, composed, world_size, plan):
    """Run one attempt, and return the exit codes of its ranks (negative: killed by that signal)."""
    port, pipes = free_port(), SignalPipes(world_size)
    pids = [fork_training_rank(run, composed, rank, world_size, port, plan, pipes) for rank in range(world_size)]
    running = {os.pidfd_open(pid): pid for pid in pids}
    deadline = time.monotonic() + 2 * PATIENCE_S
    while running and time.monotonic() < deadline:
        ready, _, _ = select.select([pipes.requests, *running], [], [], 1.0)
        if pipes.requests in ready:
            rank, number = REQUEST.unpack(os.read(pipes.requests, REQUEST.size))
            send_when_asleep(pids[rank], number)
        else:
            for descriptor in ready:
                os.close(descriptor)
                del running[descriptor]
    for descriptor in running:
        os.close(descriptor)
    pipes.close()
    return [wait_for_exit_code(pid) for pid in pids]


def run_scenario(scenario):
    """Run the attempts of a scenario, and one more without a signal, until the run is finished."""
    run = RunDir(scenario["run"])
    run.root.mkdir(parents=True)
    composed, codes, saved_steps = recipe.compose(scenario["recipe"], scenario["overrides"]), [], []
    for plan in [*scenario["signals"], None]:
        codes.append(run_attempt(str(run.root), composed, scenario["world_size"], plan))
        saved = manager.latest_valid(run)[0]
        saved_steps.append(saved.step if saved else 0)
        if run.done.exists():
            break
    starts = [line for line in read_lines(run.attempts) if line["event"] == "start"]
    ends = [line for line in read_lines(run.attempts) if line["event"] == "end"]
    return {
        "codes": codes,
        "saved_steps": saved_steps,
        "causes": [line["cause"] for line in ends],
        "first_steps": [line["first_step"] for line in starts],
        "last_steps": [line["last_step"] for line in ends],
        "journal": [line["step"] for line in read_lines(run.journal) if "loss" in line],
        "digest": checkpoint_digest(run) if run.done.exists() else None,
        "log": Path(run.root / "rank-logs.txt").read_text()[-4000:],
    }


if __name__ == "__main__":
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        outcome = run_scenario(scenario) | {"name": scenario["name"]}
        print(json.dumps(outcome | {"seconds": round(time.monotonic() - began, 2)}), flush=True)
