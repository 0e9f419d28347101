"""The command line of the soak test, ``python -m benchmarks.chaos``; see the package."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import chaos, loopback
from benchmarks.chaos.commands import StuckError, TrainingCommands
from benchmarks.chaos.kinds import FAULT_GROUPS, KINDS
from benchmarks.chaos.plan import Fault, generate_groups
from benchmarks.chaos.report import SoakReport, print_line
from benchmarks.chaos.soak import Soak
from hpcssl.code_version import code_commit

STEPS = 600
"""Steps of each training."""
DISK_MB = 256
"""Size of the disk for run folders."""


@contextlib.contextmanager
def soak_environment() -> Iterator[tuple[loopback.LoopbackCluster, Path, Path]]:
    """Create a cluster, a small disk for run folders, and shards of digits; remove all of them afterwards.

    Yields:
        The cluster, the folder for run folders, and the folder of training shards.
    """
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder, cluster = root / "runs", loopback.LoopbackCluster(root / "cluster")
    cluster.root.mkdir()
    folder.mkdir()
    before, is_mounted = os.environ.get("SLURM_CONF"), False
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
        subprocess.run(
            [sys.executable, "-m", "data_prep", "digits", str(root / "digits")], check=True, capture_output=True
        )
        cluster.start()
        yield cluster, folder, root / "digits" / "train"
    finally:
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            cluster.stop()
        cluster.kill_all()
        os.environ.pop("SLURM_CONF", None) if before is None else os.environ.update(SLURM_CONF=before)
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)
        shutil.rmtree(root, ignore_errors=True)


def describe_environment(seed: int) -> dict[str, Any]:
    """Return what the figures depend on; nothing that identifies a machine or a person."""
    from benchmarks.common import versions  # imports torch, which nothing else here needs

    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    return {
        "benchmark": "chaos",
        "what": "random faults against MSF on digits, 2 nodes x 2 tasks on the loopback",
        "commit": code_commit(),
        "seed": seed,
        "machine": versions() | {"slurm": slurm},
    }


def main() -> int:
    """Run the command line. Returns the exit code."""
    description = (chaos.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="benchmarks.chaos", description=description)
    parser.add_argument("--hours", type=float, required=True, help="no fault is injected after this time")
    parser.add_argument("--seed", type=int, default=0, help="decides the sequence of faults")
    parser.add_argument("--faults", type=int, default=None, help="maximum number of faults (a group is completed)")
    parser.add_argument("--out", type=Path, default=None, help="write the report here as JSON, after every group")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of each training ({STEPS})")
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help="only groups with one of these kinds")
    options = parser.parse_args()
    if reason := loopback.explain_unavailable():
        parser.error(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it every attempt would compile the code snapshot again
    groups = [group for group in FAULT_GROUPS if not options.only or set(group) & set(options.only)]
    report = SoakReport(options.out, describe_environment(options.seed))
    with soak_environment() as (cluster, folder, data):
        soak = Soak(cluster, folder, TrainingCommands(data, options.steps), report)
        run(soak, report, generate_groups(options.seed, groups), options)
    report.write()
    body = report.body()
    print_line(
        f"{body['faults']} faults in {body['hours']:g} h; {body['trainings_finished']} trainings finished, digests "
        f"{'equal' if body['digest_equal'] else 'NOT equal'}; {len(report.violations)} violations"
    )
    print_line(json.dumps(body["steps_lost"]))
    return int(bool(report.violations) or not body["digest_equal"])


def run(soak: Soak, report: SoakReport, groups: Iterator[list[Fault]], options: argparse.Namespace) -> None:
    """Run the undisturbed training, then inject groups of faults until the time or the number is reached."""
    try:
        soak.run_undisturbed()
        for group in groups:
            if time.monotonic() - report.start > options.hours * 3600 or (
                options.faults is not None and len(report.log) >= options.faults
            ):
                break
            soak.inject(group)
        soak.finish()
    except KeyboardInterrupt:
        print_line("interrupted: the report has what was done so far")
    except (StuckError, subprocess.TimeoutExpired) as error:
        report.add_violation(f"the soak test ended early: {error}")


if __name__ == "__main__":
    sys.exit(main())
