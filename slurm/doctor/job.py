"""The doctor's job: submitted, followed, and removed from the queue and the disk whatever happens."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hpcssl import files
from hpcssl.distributed import launch
from hpcssl.errors import SubmitError
from hpcssl.run_dir import RunDir
from hpcssl.signals import hold_signals
from slurm.backend import batch_script, code_snapshot, identity, permissions, resources, sbatch_options, scheduler
from slurm.backend.profiles import Profile
from slurm.backend.scheduler import JobState
from slurm.doctor.probe_tools import MARK
from slurm.log import job_log
from slurm.log.job_log import SbatchOptions

TIME_LIMIT = "5"
"""Minutes of the job, unless the user gives ``--time``."""
WARNING_AFTER_S = 35
"""The warning of the time limit is requested this many seconds after the start; it may come 30 to 60 s early."""
REQUEUE_WAIT_S = 60.0
END_WAIT_S = 30.0
PROBE_VARIABLE = "HPCSSL_DOCTOR_PROBE"


@dataclass
class JobResult:
    """What the job has reported, and how it ended.

    Attributes:
        job: The job id.
        records: The results of the nodes, with ``seen``: when the login node has read them (Unix time).
        state: The last state that SLURM reported.
        started: Whether the job has ever run.
        log: The end of the job's output, without the results.
        requeue_s: Seconds from the requeue to the next start; None if the job was not seen to start again.
    """

    job: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    state: JobState = field(default_factory=lambda: JobState("UNKNOWN"))
    started: bool = False
    log: str = ""
    requeue_s: float | None = None

    def find(self, check: str) -> list[dict[str, Any]]:
        """Return the results of one check, one per node or pair of nodes."""
        return [record for record in self.records if record["check"] == check]


def read_probe() -> str:
    """Return the text of ``probe`` as one program without imports from this package."""
    folder = Path(__file__).parent
    tools, probe = ((folder / f"{name}.py").read_text() for name in ("probe_tools", "probe"))
    own_imports = re.compile(r"^from (__future__|slurm\.\S+) import (\([^)]*\)|.*)\n", re.M)
    return tools + "\n\n" + own_imports.sub("", probe)


def render_script(folder: Path, token: str, sbatch: SbatchOptions, profile: Profile) -> str:
    """Return the batch script.

    Args:
        folder: The folder of the check.
        token: The job's token.
        sbatch: Options of sbatch.
        profile: The cluster profile.
    """
    python = f"{profile.container} {shlex.quote(profile.python or sys.executable)}".strip()
    limit = sbatch_options.parse_time(str(sbatch.get("time", TIME_LIMIT))) or 300
    options: SbatchOptions = {
        "job-name": "hpcssl-doctor",
        "time": TIME_LIMIT,
        **sbatch,
        "ntasks-per-node": "1",
        "comment": identity.format_comment(token, sbatch),
        "output": str(folder / "job.log"),
        "error": str(folder / "job.log"),
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR2@{max(1, limit - WARNING_AFTER_S)}",
    }
    headers = [
        f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for name, value in options.items()
    ]
    nodes = resources.count_nodes(sbatch)
    restarted = f"{MARK} " + json.dumps({"check": "restarted", "node": "", "rank": 0, "time": 0})
    words = " ".join(shlex.quote(word) for word in (str(folder), token, str(launch.port_for(token))))
    srun = " ".join([f"srun --export=ALL --nodes={nodes} --ntasks={nodes}", *profile.srun])
    lines = [
        "#!/bin/bash",
        *headers,
        "trap : INT TERM USR1 USR2",
        f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || {{ echo; echo {shlex.quote(restarted)}; exit 0; }}',
        *profile.setup_lines(),
        f"export PYTHONPATH={shlex.quote(str(folder / 'code'))} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
        f"export {PROBE_VARIABLE}={shlex.quote(read_probe())}",
        f'{srun} {python} -c "${PROBE_VARIABLE}" {words}',
        'echo "the step ended with exit code $?"',
    ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def job_folder(parent: Path) -> Iterator[tuple[Path, str]]:
    """Create a folder for one check, and remove it at the end.

    Args:
        parent: The folder that all nodes should see.

    Yields:
        The folder, and a token.
    """
    token = identity.create_token()
    folder = parent / f".hpcssl-doctor-{token}"
    with permissions.private_umask():
        folder.mkdir()
    try:
        yield folder, token
    finally:
        files.remove(folder)


@contextlib.contextmanager
def end_by_exception() -> Iterator[None]:
    """Turn the signals that end a command into ``KeyboardInterrupt`` within the block, so that it can clean up."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(
    parent: Path, sbatch: SbatchOptions, profile: Profile, wait_s: float, write: Callable[[str], None]
) -> JobResult:
    """Submit the job, follow it, and remove it from the queue and the disk, also when this process is interrupted.

    Args:
        parent: The folder in which the job's folder is created.
        sbatch: Options of sbatch.
        profile: The cluster profile.
        wait_s: Seconds after which a job that has not started is given up.
        write: Called with what happens.

    Raises:
        SubmitError: sbatch refused.
        OSError: The folder cannot be written.
    """
    cluster, result = job_log.get_cluster(sbatch), JobResult()
    with end_by_exception(), job_folder(parent) as (folder, token):
        code_snapshot.create_snapshot(RunDir(folder))
        files.atomic_write(folder / "login", token)
        script = folder / "job.sh"
        files.atomic_write(script, render_script(folder, token, sbatch, profile))
        try:
            result.job = _submit(script, token, cluster)
            write(f"job {result.job} was submitted")
            _follow(folder, result, cluster, wait_s, write)
        finally:
            with hold_signals():
                _cancel(result.job or identity.find_accepted_job(token, cluster)[0], cluster)
    return result


def _submit(script: Path, token: str, cluster: str | None) -> str:
    with hold_signals(), batch_script.without_job_environment():
        answer = scheduler.run_command("sbatch", str(script), timeout_s=batch_script.SBATCH_TIMEOUT_S)
        match = re.search(r"job (\d+)", answer.stdout) if answer.returncode == 0 else None
        job = match[1] if match else identity.find_accepted_job(token, cluster)[0]
    if job is None:
        raise SubmitError(
            "sbatch",
            got=" ".join(answer.stderr.split())[:400] or "no message",
            expected="a job id",
            fix="give the options that this cluster needs, such as -p PARTITION or -A ACCOUNT",
        )
    return job


def _cancel(job: str | None, cluster: str | None) -> None:
    """Cancel the job, and wait until none of its processes can write into the folder any more."""
    if job is None or not scheduler.query_job_or_unknown(job, cluster).is_active:
        return
    scheduler.run_command("scancel", job, cluster=cluster)
    deadline = time.monotonic() + END_WAIT_S
    while time.monotonic() < deadline and scheduler.query_job_or_unknown(job, cluster).is_active:
        time.sleep(0.5)


def _follow(folder: Path, result: JobResult, cluster: str | None, wait_s: float, write: Callable[[str], None]) -> None:
    """Read what the nodes report until the job has ended, or does not start in time."""
    began, requeued_at, pending_reason = time.monotonic(), None, None
    answered_at = began
    while True:
        files.atomic_write(folder / "tick", repr(time.time()))
        _read_output(folder / "job.log", result)
        result.state = state = scheduler.query_job_or_unknown(result.job, cluster)
        result.started = result.started or state.name not in ("PENDING", "CONFIGURING", "UNKNOWN")
        now = time.monotonic()
        answered_at = now if state.name != "UNKNOWN" else answered_at
        if not result.started and state.reason and state.reason != pending_reason:
            pending_reason = state.reason
            write(f"job {result.job} waits in the queue ({pending_reason})")
        granted = [record for record in result.find("requeue") if not record["refused"]]
        if granted and requeued_at is None:
            requeued_at = now
        if result.find("restarted"):
            result.requeue_s = now - (requeued_at or now)
            return
        if granted and state.name == "PENDING" and state.reason == "BeginTime" and now - (requeued_at or now) > 3:
            # a node that has just ended a job refuses to start it at once; SLURM itself waits for two minutes
            scheduler.run_command("scontrol", "update", f"jobid={result.job}", "StartTime=now", cluster=cluster)
        waited_s = max(now - answered_at, now - (requeued_at or now))  # for an answer of SLURM, or for the next start
        is_late = now - began > wait_s if not result.started else waited_s > REQUEUE_WAIT_S
        if is_late or (result.started and not state.is_active and state.name != "UNKNOWN"):
            time.sleep(0.5)
            _read_output(folder / "job.log", result)
            return
        time.sleep(0.3)


def _read_output(path: Path, result: JobResult) -> None:
    """Add the whole lines of the job's output that are not in ``result`` yet."""
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1]
    except OSError:
        return
    found = [line for line in lines if line.startswith(MARK + " {")]
    for line in found[len(result.records) :]:
        try:
            record = json.loads(line.removeprefix(MARK))
        except ValueError:
            record = {"check": "unreadable", "node": "", "rank": 0, "time": 0.0}
        result.records.append({**record, "seen": time.time()})
    result.log = " ".join(" ".join(line for line in lines if not line.startswith(MARK)).split())[-600:]
