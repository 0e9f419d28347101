"""Faults of processes and of the cluster.

Each function injects one fault into a running training, and returns what was hit. ``soak`` waits for what follows (the
requeue, the next attempt). The table of all kinds is in ``kinds``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos.commands import StuckError
from benchmarks.chaos.plan import Fault
from benchmarks.chaos.session import TargetMissing, TrainingSession
from hpcssl.distributed import launch
from slurm.backend import processes, sbatch_options

Inject = Callable[[TrainingSession, Fault], str]

# -- signals to the tasks --------------------------------------------------------------------------------------------


def signal_one_rank(number: signal.Signals, times: int = 1) -> Inject:
    """Return a fault that sends a signal to the target rank."""

    def inject(session: TrainingSession, fault: Fault) -> str:
        for _ in range(times):
            session.send_signal(require_tasks(session)[fault.rank], number=number)
            time.sleep(0.3 * fault.share * (times > 1))
        return f"rank {fault.rank}"

    return inject


def signal_all_ranks(number: signal.Signals, times: int = 1) -> Inject:
    """Return a fault that sends a signal to all ranks, in random order."""

    def inject(session: TrainingSession, fault: Fault) -> str:
        pids = require_tasks(session)
        for _ in range(times):
            session.send_signal(*(pids[rank] for rank in fault.ranks), number=number)
            time.sleep(0.3 * fault.share * (times > 1))
        return "all ranks"

    return inject


def pause_all_ranks(session: TrainingSession, fault: Fault) -> str:
    """Stop all ranks for about a second."""
    pids = require_tasks(session).values()
    session.send_signal(*pids, number=signal.SIGSTOP)
    time.sleep(0.5 + fault.share)
    session.send_signal(*pids, number=signal.SIGCONT)
    return "all ranks"


def kill_rank_zero(session: TrainingSession, _fault: Fault) -> str:
    """Kill rank 0."""
    session.send_signal(require_tasks(session)[0])
    return "rank 0"


# -- at a certain moment ---------------------------------------------------------------------------------------------


def during_start(inject: Inject) -> Inject:
    """Return a fault that is injected some seconds into the start of the attempt after the previous fault."""

    def inject_later(session: TrainingSession, fault: Fault) -> str:
        session.wait_for_start(session.initial_tasks)
        time.sleep(4 * fault.share)
        return inject(session, fault)

    return inject_later


def during_save(inject: Inject) -> Inject:
    """Return a fault that is injected when a checkpoint has begun that has no manifest yet."""

    def inject_later(session: TrainingSession, fault: Fault) -> str:
        deadline, maintained = time.monotonic() + 60, time.monotonic()
        while not session.is_saving():
            if session.is_finished or time.monotonic() > deadline:
                raise TargetMissing
            if time.monotonic() - maintained > 1:
                session.maintain()
                maintained = time.monotonic()
            time.sleep(0.001)
        return inject(session, fault)

    return inject_later


def start_stale_rank(session: TrainingSession, fault: Fault) -> str:
    """Start a rank of an earlier attempt: it has the new attempt's address, and the old attempt's token."""
    environ = processes.read_environment(next(iter(require_tasks(session).values())))
    inherited = {k: v for k, v in environ.items() if not k.startswith(("SUBMITIT_", "PYTHON"))}
    info = launch.LaunchInfo(
        rank=fault.rank or 1,
        local_rank=0,
        size=4,
        address="127.0.0.1",
        port=launch.port_for(_attempt_token(environ)),
        token=f"{session.job}-0-left-over",
    )
    program = (
        "import sys; from hpcssl.distributed.world import World; from hpcssl.errors import HpcsslError\n"
        "try: World.start('cpu', timeout_s=5).barrier()\n"
        "except HpcsslError as error: sys.exit('refused')\n"
        "sys.exit('let in')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=inherited | info.environment() | {"PYTHONPATH": str(session.run.code)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    session.stale_ranks.append(process)
    return f"the rendezvous, by a rank {info.rank} of another attempt"


def hold_port(session: TrainingSession, _fault: Fault) -> str:
    """Listen at the port of the next attempt's rendezvous before rank 0 does."""
    session.wait_for_start(session.initial_tasks)
    environ = processes.read_environment(next(iter(require_tasks(session).values())))
    port = launch.port_for(_attempt_token(environ))
    try:
        session.held_ports.append(socket.create_server(("", port)))
    except OSError as error:  # rank 0 was faster
        raise TargetMissing from error
    return f"port {port}"


def move_run_folder(session: TrainingSession, _fault: Fault) -> str:
    """Rename the run folder until the ranks have left, then put it back.

    Raises:
        StuckError: The ranks do not leave, or a folder came into being at the old path.
    """
    require_tasks(session)
    root = session.run.root
    moved = root.with_name(f"{root.name}-moved")
    root.rename(moved)
    try:
        deadline = time.monotonic() + 90
        while session.find_processes("slurm"):
            if time.monotonic() > deadline:
                raise StuckError("the job did not end after its run folder was moved")
            time.sleep(0.2)
        if root.exists():
            raise StuckError(f"the run folder was created again, with {sorted(p.name for p in root.iterdir())}")
    finally:
        if root.exists():
            root.rename(root.with_name(f"{root.name}-created-again"))
        moved.rename(root)
    return "the run folder"


# -- other processes of the job, and the cluster ---------------------------------------------------------------------


def signal_process(word: str, number: signal.Signals = signal.SIGKILL) -> Inject:
    """Return a fault that signals a process of the job with ``word`` in its command line."""

    def inject(session: TrainingSession, fault: Fault) -> str:
        pids = session.find_processes(word)
        if not pids:
            raise TargetMissing
        # of the two processes of an srun, the first one does the work
        target = pids[0 if word == "srun" else int(fault.share * len(pids))]
        line = Path(f"/proc/{target}/cmdline").read_text().strip("\0")
        session.send_signal(target, number=number)
        return line if word == "slurmstepd:" else word

    return inject


def preempt_job(session: TrainingSession, _fault: Fault) -> str:
    """Submit a job of higher priority that needs all nodes."""
    require_tasks(session)
    session.cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    return "the job"


def requeue_job(session: TrainingSession, _fault: Fault) -> str:
    """Requeue the job by hand."""
    require_tasks(session)
    session.cluster("scontrol", "requeue", session.job)
    return "the job"


def reach_time_limit(session: TrainingSession, _fault: Fault) -> str:
    """Move the time limit near, and pause the training until SLURM has sent its warning, whose time is not exact."""
    run_time = sbatch_options.parse_time(session.cluster.field(session.job, "RunTime")) or 0
    tasks = [p for p in map(processes.read_process, require_tasks(session).values()) if p]
    processes.send_signals(tasks, signal.SIGSTOP)
    try:
        session.cluster("scontrol", "update", f"jobid={session.job}", f"TimeLimit={run_time // 60 + 2}")
        deadline = time.monotonic() + 90
        while not all(_is_signal_pending(p.pid, signal.SIGUSR2) for p in tasks):
            if time.monotonic() > deadline:
                raise StuckError("no warning of the time limit")
            time.sleep(0.1)
    finally:
        running = [p for p in tasks if processes.is_running(p.pid, p.start_ticks)]
        processes.send_signals(running, signal.SIGCONT)
        session.cluster("scontrol", "update", f"jobid={session.job}", "TimeLimit=60")
    return "the job"


def set_node_state(state: str) -> Inject:
    """Return a fault that puts a node into a state, such as ``down`` or ``drain``, for some seconds."""

    def inject(session: TrainingSession, fault: Fault) -> str:
        require_tasks(session)
        session.cluster("scontrol", "update", f"nodename={fault.node}", f"state={state}", "reason=chaos")
        time.sleep(1 + fault.share)
        session.cluster("scontrol", "update", f"nodename={fault.node}", "state=resume")
        return f"node {fault.node}"

    return inject


def restart_slurmd(session: TrainingSession, fault: Fault) -> str:
    """Kill and restart the daemon of a node."""
    session.cluster.restart(f"slurmd {fault.node}", after_s=fault.share)
    return f"node {fault.node}"


def restart_slurmctld(session: TrainingSession, fault: Fault) -> str:
    """Kill and restart the controller."""
    session.cluster.restart("slurmctld", after_s=fault.share)
    return "the controller"


def give_number_away(session: TrainingSession, fault: Fault) -> str:
    """Kill the job with the controller's state, as a power cut does, and let another job have its number.

    The session checks that the other job stays as it is.
    """
    require_tasks(session)
    session.send_signal(*session.find_processes("slurm", "srun"))
    session.cluster.lose_state(int(session.job))
    words = ["--parsable", "--requeue", "-w", fault.node, "-o", "/dev/null", "--wrap", "sleep 100000"]
    stranger = session.cluster("sbatch", *words).strip()
    if stranger != session.job:
        raise StuckError(f"the other job got the number {stranger}")
    session.strangers.append(stranger)
    return f"job {stranger}"


def interrupt_submission(session: TrainingSession, _fault: Fault) -> str:
    """Cancel the job, kill the command that submits it again before it has recorded the job, and repeat the command.

    Raises:
        StuckError: There are two jobs then, or none.
    """
    require_tasks(session)
    session.cluster("scancel", session.job)
    session.cluster.wait_until(lambda: not session.cluster("squeue", "-h", "-j", session.job), "cancel", 60)
    session.commands.submit_and_kill(session.run)
    session.job = session.commands.submit(session.run)
    queued = session.cluster("squeue", "-h", "-n", session.run.root.name, "-o", "%i").split()
    if queued != [session.job]:
        raise StuckError(f"the queue has the jobs {queued} of this run, expected {session.job}")
    return f"job {session.job}"


def start_second_writer(session: TrainingSession, _fault: Fault) -> str:
    """Start the same training in the same folder by hand. It must be refused, with the id of the job that runs there.

    Raises:
        StuckError: It was not refused.
    """
    require_tasks(session)
    words = session.commands.arguments(session.run)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        [sys.executable, "-m", "hpcssl", "train", *words], capture_output=True, text=True, timeout=120, env=environ
    )
    if done.returncode == 0 and f"{session.run.root} is finished" in done.stderr:  # it ended before the lock was free
        raise TargetMissing
    if done.returncode == 0 or f"job {session.job}" not in done.stderr:
        raise StuckError(f"a second writer was not refused by name: {done.returncode} {done.stderr.strip()[-300:]}")
    return "the run folder"


def require_tasks(session: TrainingSession) -> dict[int, int]:
    """Pids by rank. Raises ``TargetMissing`` unless all ranks run."""
    pids = session.task_pids()
    if len(pids) < 4:
        raise TargetMissing
    return pids


def _attempt_token(environ: dict[str, str]) -> str:
    """The token of the attempt of a task with these variables, as ``launch`` computes it."""
    return "-".join(environ.get(n, "0") for n in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))


def _is_signal_pending(pid: int, number: int) -> bool:
    """Whether a signal is pending for a process, or the process has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    return bool(int(lines["ShdPnd"], 16) & 1 << (number - 1))
