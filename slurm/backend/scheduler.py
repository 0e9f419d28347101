"""Queries and requests to SLURM, through its own commands.

No accounting database is needed: ``sacct`` is never called. What is called "measured" below was observed on SLURM
22.05 without accounting.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

from hpcssl.errors import ConfigError, SubmitError
from hpcssl.timing.uptime import to_unix_time
from slurm.backend import reasons, sbatch_options
from slurm.backend.owner import JobOwner, is_possibly_own, parse_owner

GONE = "GONE"
"""State of a job that SLURM no longer remembers."""

TIMEOUT_CODE = 124
"""Exit code of a command that gave no answer in time."""

REQUEUE_DISABLED = "Requested operation is presently disabled"
"""SLURM's answer to a requeue where jobs are not requeued."""

ACTIVE_STATES = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)
"""States of a job that is queued or running."""

CONTINUING_STATES = ("RUNNING", "SUSPENDED", "CONFIGURING", "SIGNALING", "RESIZING", "STOPPED", "UNKNOWN")
"""States of a job that SLURM has not begun to end. SIGNALING lasts for a moment after a signal was sent (measured)."""

LASTING_REASONS = ("DependencyNeverSatisfied", "NodeDown")
"""Reasons that still hold after the end of a job."""


@dataclass(frozen=True)
class JobState:
    """The state of a job as SLURM, or the local supervisor, reports it now.

    Attributes:
        name: SLURM's name of the state, ``GONE``, ``UNKNOWN`` (SLURM did not answer), or ``LOST`` (a local job whose
            supervisor died).
        reason: SLURM's reason for it; empty if there is none.
        restarts: How often the job was restarted.
        hint: What a user should know or do; empty if nothing.
        exit_code: Exit code; 128 + the number of the signal that ended it; None if unknown.
        time_limit_reached: Whether it ran until its time limit.
        preempted: Whether it was preempted with a grace time, or by a partition that cancels the jobs it preempts. Then
            SLURM does not requeue it unless asked to. A preemption without a grace time only raises ``restarts``.
        requeue_enabled: Whether SLURM would requeue it on request.
        remaining_s: Seconds until its time limit; None if it does not run or has no limit.
        nodes: Number of its nodes; None if unknown. While a job ends, a lost node is not counted.
        owner: Whose job it is; None if SLURM does not know it, and for a local job.
    """

    name: str
    reason: str = ""
    restarts: int = 0
    hint: str = ""
    exit_code: int | None = None
    time_limit_reached: bool = False
    preempted: bool = False
    requeue_enabled: bool = True
    remaining_s: int | None = None
    nodes: int | None = None
    owner: JobOwner | None = None

    @property
    def is_active(self) -> bool:
        """Whether the job is queued or running."""
        return self.name in ACTIVE_STATES

    @property
    def is_ending(self) -> bool:
        """Whether SLURM has begun to end the job, or has ended it."""
        return self.name not in CONTINUING_STATES


def is_installed() -> bool:
    """Return whether SLURM's client commands are on the PATH."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def require_slurm() -> None:
    """Raise ``SubmitError`` if SLURM's client commands are missing."""
    if not is_installed():
        raise SubmitError(
            "SLURM",
            got="no sbatch or srun on the PATH of this machine",
            expected="the client commands of SLURM",
            fix="log in to a machine of the cluster, load its SLURM module, or add --local",
        )


def run_command(
    program: str, *words: str, cluster: str | None = None, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands.

    Args:
        program: The command, such as ``scontrol``.
        words: Its arguments.
        cluster: The cluster, where the job was submitted with ``--clusters``.
        timeout_s: Seconds after which it is killed.

    Returns:
        The finished process. A missing command has the code 127, one that did not end 124, with a message in
        ``stderr``.
    """
    where = ["-M", cluster] if cluster else []
    try:
        return subprocess.run([program, *where, *words], capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError:
        return subprocess.CompletedProcess([program, *words], 127, "", f"{program}: command not found")
    except subprocess.TimeoutExpired:
        message = f"{program} did not answer within {timeout_s:g} s"
        return subprocess.CompletedProcess([program, *words], TIMEOUT_CODE, "", message)


def query_job(job: str, cluster: str | None = None) -> JobState:
    """Return the state of the job with this id.

    To a process of the job itself, another job with the same id is ``GONE``; everybody else compares
    ``JobState.owner`` (``identity.is_same_job``).

    Raises:
        SubmitError: SLURM did not answer.
    """
    answer = run_command("scontrol", "show", "job", "-o", job, cluster=cluster)
    if answer.returncode:
        if "Invalid job id" in answer.stderr:
            return JobState(GONE)
        raise SubmitError(
            f"`scontrol show job {job}`",
            got=_one_line(answer.stderr),
            expected="an answer of SLURM",
            fix="check that `sinfo` works, then run the command again",
        )
    state = parse_job(job, answer.stdout)
    return state if state.owner is None or is_possibly_own(job, state.owner) else JobState(GONE)


def query_job_or_unknown(job: str, cluster: str | None = None) -> JobState:
    """Return the state of a job; ``UNKNOWN`` with the error as its hint if SLURM did not answer."""
    try:
        return query_job(job, cluster)
    except SubmitError as error:
        return JobState("UNKNOWN", hint=error.got)


def parse_job(job: str, text: str) -> JobState:
    """Parse one line of ``scontrol show job -o``.

    Args:
        job: The job id, for hints.
        text: The line.
    """
    # a user's text must not look like a field: the name is left out, and of other texts, which come last, the first
    # field of a name counts
    without_name = re.sub(r"\sJobName=.*?(?=\sUserId=)", "", text, count=1)
    fields = dict(reversed(re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", without_name)))
    reason = fields.get("Reason", "None")
    state = fields.get("JobState", GONE)
    if state not in ACTIVE_STATES and reason not in LASTING_REASONS:
        reason = "None"  # SLURM still shows what the job waited for before
    code, _, signal = fields.get("ExitCode", "0:0").partition(":")
    run_time, limit = _parse_seconds(fields.get("RunTime", "")), _parse_seconds(fields.get("TimeLimit", ""))
    nodes = re.match(r"\d+", fields.get("NumNodes", ""))
    return JobState(
        state,
        "" if reason == "None" else reason,
        int(fields.get("Restarts") or 0),
        reasons.find_hint(reason, job, state),
        128 + int(signal) if signal not in ("", "0") else int(code or 0),
        time_limit_reached=run_time is not None and limit is not None and run_time >= limit,
        preempted=fields.get("PreemptTime", "None") not in ("None", "(null)"),
        requeue_enabled=fields.get("Requeue", "1") != "0",
        remaining_s=limit - run_time if run_time is not None and limit is not None else None,
        nodes=int(nodes[0]) if nodes else None,
        owner=parse_owner(text) if "UserId" in fields else None,
    )


def infer_cause(state: JobState, restart: int, nodes: int) -> str | None:
    """Infer from a job's state why SLURM ends it.

    While a job ends, its state is COMPLETING whatever the reason (measured), so the reason follows from other fields.

    Args:
        state: The job as SLURM reports it now.
        restart: How often the job had been restarted when the attempt that ends began.
        nodes: The number of nodes of the attempt if all of them still run its tasks, else 0: an ending job shows
            neither lost nodes nor those that are done.

    Returns:
        ``node_fail``, ``preempted``, ``timeout`` or ``cancelled``; None if SLURM does not end the job, or has only sent
        a warning.
    """
    if state.restarts > restart:  # SLURM has requeued it: a node was lost, or it was preempted without a grace time
        return "node_fail" if state.nodes is not None and state.nodes < nodes else "preempted"
    if state.preempted:
        return "preempted"
    if state.time_limit_reached:
        return "timeout"
    if state.is_ending and state.reason == "JobLaunchFailure":
        return None  # its batch script was killed: nobody asked for the end, and a requeue is granted (measured)
    if state.is_ending and state.name != GONE:
        return "node_fail" if state.reason == "NodeDown" or state.name == "NODE_FAIL" else "cancelled"
    return None


def find_lost_nodes(nodelist: str, since: float, *, only_down: bool = False) -> list[str]:
    """Return the nodes of an attempt that are down, do not answer, or have a daemon that was started after it began.

    Args:
        nodelist: The nodes of the attempt, as SLURM writes them (``n[1-2]``).
        since: When the attempt began (Unix time).
        only_down: Whether only nodes count that are down: a slow or restarted daemon does not end tasks.
    """
    lost = []
    for line in run_command("scontrol", "show", "node", "-o", nodelist).stdout.splitlines():
        fields = dict(re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", line))
        is_lost = re.search(r"DOWN|FAIL" if only_down else r"DOWN|FAIL|NOT_RESPONDING|\*", fields.get("State", ""))
        times = (to_unix_time(fields.get(key, "")) for key in ("BootTime", "SlurmdStartTime"))
        if is_lost or (max(times) > since and not only_down):
            lost.append(fields.get("NodeName", nodelist))
    return lost


def list_nodes(job: str) -> list[str]:
    """Return the nodes that a running job has now; empty if SLURM does not answer."""
    text = run_command("scontrol", "show", "job", "-o", job).stdout
    match = re.search(r"\sNodeList=(\S+)", text)
    return [] if match is None or match[1] == "(null)" else expand_nodes(match[1])


def expand_nodes(nodelist: str) -> list[str]:
    """Return the names in a list of nodes as SLURM writes it (``n[1-2]``)."""
    return run_command("scontrol", "show", "hostnames", nodelist).stdout.split()


def request_requeue(job: str) -> str | None:
    """Ask SLURM to requeue the job that this process belongs to.

    The caller must know that the job was not cancelled: SLURM requeues cancelled jobs as well (measured).

    Returns:
        None if SLURM does it, else its reason.
    """
    refusal = ""
    for pause_s in (1, 3, None):  # a controller that is busy for a moment must not cost the run its next attempt
        state = query_job_or_unknown(job)
        if state.name == GONE:  # its number may be that of another job by now
            return "SLURM no longer knows this job"
        answer = run_command("scontrol", "requeue", job) if state.name != "UNKNOWN" else None
        if answer is not None and answer.returncode == 0:
            return None
        refusal = state.hint if answer is None else _one_line(answer.stderr)
        if REQUEUE_DISABLED in refusal:
            break
        if pause_s is not None:
            time.sleep(pause_s)
    return refusal or "scontrol refused without a reason"


def current_job() -> tuple[str, int]:
    """Return the id of the SLURM job that this process runs in, and how often it was restarted."""
    return os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _parse_seconds(text: str) -> int | None:
    try:
        return sbatch_options.parse_time(text)
    except ConfigError:
        return None  # Partition_Limit, 00:00:00, or a word of a newer SLURM


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
