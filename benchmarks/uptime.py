"""Effective training time under faults: ``python -m benchmarks uptime [--repeats N] [--out FILE]``.

Faults are injected into a training on the private two-node SLURM of the soak test, and every part of a recovery is
measured: the time to notice the fault, to launch the tasks again, to start them up to the first wait for data, and to
the first step; and the steps that were lost. Three ways to continue are compared:

- ``crash``: a rank is killed; the batch script launches the tasks again in the same allocation.
- ``hang``: a rank is stopped; the watchdog ends the attempt, and it continues in the same allocation.
- ``requeue``: a node is taken down; the job goes through the queue, with SLURM's own delay.

From these parts and the rate of faults of Llama 3's training the share of effective training time is computed for
larger clusters: 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of Models, section 3.3.4),
which is 2.0e-5 per GPU and hour. With n GPUs and the time T that one fault costs, the share is
``(1 - saves) / (1 + rate * n * T)``. T counts half a checkpoint period of replayed steps, and ``saves`` is the share of
the time for which saves hold up the training (``python -m benchmarks saving`` measures 0.1 s per save). The start-up of
a large model on many nodes takes longer than that of the small one here: ``--start-s`` sets another value.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks import loopback
from benchmarks.chaos import faults
from benchmarks.chaos.__main__ import soak_environment
from benchmarks.chaos.commands import TrainingCommands
from benchmarks.chaos.plan import draw_fault
from benchmarks.chaos.report import print_line
from benchmarks.chaos.session import TrainingSession
from benchmarks.common import report
from hpcssl.code_version import code_commit
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from hpcssl.timing.uptime import measure_uptime, to_unix_time

FAULTS_PER_GPU_HOUR = 419 / (54 * 24 * 16_384)
GPUS = (8, 64, 512, 2048, 4096)
STEPS = 100_000
"""Steps of the training; it is cancelled after the last fault."""
KINDS = {
    "crash": faults.signal_one_rank(signal.SIGKILL),
    "hang": faults.signal_one_rank(signal.SIGSTOP),
    "requeue": faults.set_node_state("down"),
}


@dataclass(frozen=True)
class Recovery:
    """What one fault cost.

    Attributes:
        notice_s: From the fault to the recorded end of the attempt.
        launch_s: From there to the launch of the next one.
        start_s: From there to its first wait for data.
        first_step_s: From there to its first step.
        steps_lost: Steps that were made again.
    """

    notice_s: float
    launch_s: float
    start_s: float
    first_step_s: float
    steps_lost: int


def measure_recovery(session: TrainingSession, kind: str, number: int) -> Recovery:
    """Inject one fault, and measure the recovery.

    Args:
        session: The training.
        kind: One of ``KINDS``.
        number: Number of the fault, which decides the target.
    """
    run = session.run
    goal = session.last_step() + 12
    session.wait_until(lambda: session.last_step() >= goal and len(session.task_pids()) == 4, f"step {goal}", 300)
    before, began = session.progress(), time.time()
    KINDS[kind](session, draw_fault(0, number, kind))
    peak = before.step

    def next_attempt() -> dict[str, float] | None:
        starts = [
            line for line in read_lines(run.attempts, {"event": str, "attempt": int}) if line.get("event") == "start"
        ]
        return next((line for line in starts if line["attempt"] > before.attempt), None)

    deadline = time.monotonic() + 600
    while (start := next_attempt()) is None:
        peak = max(peak, session.last_step())
        if time.monotonic() > deadline:
            raise SystemExit(f"{kind}: no further attempt; {session.describe()}")
        time.sleep(0.1)
    while session.last_step() <= start["first_step"] or run.journal.stat().st_mtime < start["time"]:
        time.sleep(0.05)
    first_step = time.time()
    ends = [
        line for line in read_lines(run.attempts) if line.get("event") == "end" and line["attempt"] == before.attempt
    ]
    ended = min((to_unix_time(line["time"]) for line in ends), default=start["began"])
    return Recovery(
        round(max(0.0, ended - began), 2),
        round(max(0.0, start["began"] - max(ended, began)), 2),
        round(start["time"] - start["began"], 2),
        round(first_step - start["time"], 2),
        int(peak - start["first_step"]),
    )


def compute_share(gpus: int, downtime_s: float, period_s: float, save_s: float) -> float:
    """Return the share of effective training time.

    Args:
        gpus: Number of GPUs.
        downtime_s: Seconds from a fault to the next step.
        period_s: Seconds between two checkpoints; half of it is trained again after a fault.
        save_s: Seconds for which one save holds up the training.
    """
    faults_per_s = FAULTS_PER_GPU_HOUR * gpus / 3600
    return (1 - save_s / period_s) / (1 + faults_per_s * (downtime_s + period_s / 2))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.uptime", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="faults of each kind (3)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--period-minutes", type=float, default=15.0, help="minutes between two checkpoints (15)")
    parser.add_argument(
        "--start-s", type=float, default=None, help="seconds of the start-up instead of the measured ones"
    )
    parser.add_argument("--save-s", type=float, default=0.1, help="seconds for which one save holds up the training")
    parser.add_argument("--out", type=Path, default=None, help="write the report here as JSON")
    options = parser.parse_args()
    if reason := loopback.explain_unavailable():
        parser.error(reason)
    measured: dict[str, list[Recovery]] = {}
    with soak_environment() as (cluster, folder, data):
        session = TrainingSession(cluster, RunDir(folder / "run"), TrainingCommands(data, STEPS), print_line)
        try:
            for kind in options.kinds:
                measured[kind] = []
                for number in range(options.repeats):
                    measured[kind].append(measure_recovery(session, kind, number))
                    print_line(f"{kind}: {measured[kind][-1]}")
            uptime = measure_uptime(session.run, time.time())
        finally:
            cluster("scancel", session.job)
    assert uptime is not None  # attempts were recorded
    shares = {}
    for kind, recoveries in measured.items():
        parts = {f.name: statistics.median(getattr(r, f.name) for r in recoveries) for f in fields(Recovery)}
        start_s = parts["start_s"] if options.start_s is None else options.start_s
        downtime = parts["notice_s"] + parts["launch_s"] + start_s + parts["first_step_s"]
        period_s = options.period_minutes * 60
        by_gpus = {str(n): round(compute_share(n, downtime, period_s, options.save_s), 4) for n in GPUS}
        shares[kind] = {"median": parts, "downtime_s": round(downtime, 1), "by_gpus": by_gpus}
        print_line(f"{kind:<8} {downtime:6.1f} s down; " + ", ".join(f"{n} GPUs {s:.3f}" for n, s in by_gpus.items()))
    body = {
        "conditions": {
            "commit": code_commit(),
            "faults_per_gpu_hour": FAULTS_PER_GPU_HOUR,
            "period_minutes": options.period_minutes,
            "save_s": options.save_s,
        },
        "shares": shares,
        "recoveries": {kind: [asdict(recovery) for recovery in values] for kind, values in measured.items()},
        "loopback_run": asdict(uptime) | {"share": round(uptime.share, 4)},
    }
    what = "recovery from faults on the loopback, and the share of effective training time computed from it"
    report("uptime", what, body, options.out)


if __name__ == "__main__":
    main()
