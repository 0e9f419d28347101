"""Questions to SLURM, through its own commands. No accounting database is needed: ``sacct`` is never asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime

from hpcssl.errors import ConfigError, SubmitError
from slurm import options

GONE = "GONE"
"""State of a job that SLURM no longer remembers."""

DISABLED = "Requested operation is presently disabled"
"""What SLURM answers where it requeues nothing."""

LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
        "SPECIAL_EXIT", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")

HELD = ("RUNNING", "SUSPENDED", "CONFIGURING", "SIGNALING", "RESIZING", "STOPPED", "UNKNOWN")
"""States of a job that goes on; SIGNALING shows for a moment when a signal was sent (measured)."""

MENDS = {
    "launch failed requeued held": "a node could not start the step: look at the node, then `scontrol release {job}`",
    "job requeued in held state": "look at the logs, then `scontrol release {job}`",
    "dependencyneversatisfied": "what it waits for did not succeed: mend that and submit again, after "
                                "`scancel {job}` if it is still in the queue",
    "jobhelduser": "`scontrol release {job}`",
    "jobheldadmin": "ask the administrators why they hold it",
    "nodedown": "it lost a node: submit again with the same command, and it goes on",
    "begintime": "it was requeued and starts by itself, after about two minutes",
    "preempted": "its partition cancels what it preempts: submit again with the same command, and it goes on",
}


@dataclass(frozen=True)
class State:
    """A job as SLURM sees it now. ``note`` is what a person should know or do, if anything."""

    name: str
    reason: str = ""
    restarts: int = 0
    note: str = ""
    exit_code: int | None = None
    out_of_time: bool = False
    preempted: bool = False
    """With a grace time, or by a partition that cancels what it preempts: nobody but us requeues it. Preemption by
    requeue without grace shows in ``restarts`` alone."""
    requeue: bool = True
    """Whether SLURM would requeue it (Requeue=1)."""
    left_s: int | None = None
    """Until its time limit; None where it does not run or has none."""
    nodes: int | None = None
    """How many it holds: while it ends, a lost one is left out."""

    @property
    def live(self) -> bool:
        return self.name in LIVE

    @property
    def ending(self) -> bool:
        """Whether SLURM has begun to end it, or has done so."""
        return self.name not in HELD


def installed() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def require() -> None:
    if not installed():
        raise SubmitError("SLURM", got="no sbatch or srun on this machine's PATH", expected="its client commands",
                          mend="log in to a machine of the cluster, load its module, or add --local")


def call(program: str, *words: str, cluster: str | None = None) -> subprocess.CompletedProcess:
    """Run one of SLURM's commands; never raises for its refusal."""
    where = ["-M", cluster] if cluster else []
    try:
        return subprocess.run([program, *where, *words], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return subprocess.CompletedProcess([program, *words], 127, "", f"{program}: no such command here")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([program, *words], 124, "", f"{program} did not answer within 60 s")


def ask(job: str, cluster: str | None = None) -> State:
    """The state of one job. Raises ``SubmitError`` where SLURM cannot be asked."""
    answer = call("scontrol", "show", "job", "-o", job, cluster=cluster)
    if answer.returncode:
        if "Invalid job id" in answer.stderr:
            return State(GONE)
        raise SubmitError(f"`scontrol show job {job}`", got=_line(answer.stderr), expected="an answer of SLURM",
                          mend="see whether `sinfo` answers, and ask again")
    return parse(job, answer.stdout)


def parse(job: str, text: str) -> State:
    """One line of ``scontrol show job -o``."""
    fields = dict(re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", text))
    reason = fields.get("Reason", "None")
    words = reason.replace("_", " ").lower()
    state = fields.get("JobState", GONE)
    if state not in LIVE and reason not in ("DependencyNeverSatisfied", "NodeDown"):
        reason = words = "None"  # what it once waited for
    words += " preempted" * (state == "PREEMPTED")
    note = next((mend.format(job=job) for key, mend in MENDS.items() if key in words), "")
    code, _, signal = fields.get("ExitCode", "0:0").partition(":")
    ran, allowed = _seconds(fields.get("RunTime", "")), _seconds(fields.get("TimeLimit", ""))
    return State(state, "" if reason == "None" else reason, int(fields.get("Restarts") or 0),
                 note, 128 + int(signal) if signal not in ("", "0") else int(code or 0),
                 out_of_time=ran is not None and allowed is not None and ran >= allowed,
                 preempted=fields.get("PreemptTime", "None") not in ("None", "(null)"),
                 requeue=fields.get("Requeue", "1") != "0",
                 left_s=allowed - ran if ran is not None and allowed is not None else None,
                 nodes=int(held[0]) if (held := re.match(r"\d+", fields.get("NumNodes", ""))) else None)


def cause(now: State, restart: int, nodes: int) -> str | None:
    """Why SLURM ends a job, in its own words; None where it does not, or where all it did was to warn.

    ``restart``: how often it had been restarted when the attempt began that is ending; ``nodes``: how many the attempt
    had, where all of them still run its tasks, else 0: an ending job shows no node that was lost, or that is done.
    All of it measured on 22.05, without accounting: while a job ends, its state is COMPLETING whatever the reason, so
    the other fields must tell.
    """
    if now.restarts > restart:  # SLURM has requeued it: for a lost node, or without a grace time
        return "node_fail" if now.nodes is not None and now.nodes < nodes else "preempted"
    if now.preempted:
        return "preempted"
    if now.out_of_time:
        return "timeout"
    if now.ending and now.reason == "JobLaunchFailure":
        return None  # its batch script was killed: nobody asked for the end, and a requeue is granted (measured)
    if now.ending and now.name != GONE:
        return "node_fail" if now.reason == "NodeDown" or now.name == "NODE_FAIL" else "cancelled"
    return None


def lost_nodes(nodelist: str, since: float) -> list[str]:
    """Nodes of an attempt that began at ``since`` (Unix time) which have gone since then: down, not answering, or with
    a daemon that was started later."""
    lost = []
    for line in call("scontrol", "show", "node", "-o", nodelist).stdout.splitlines():
        fields = dict(re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", line))
        down = re.search(r"DOWN|FAIL|NOT_RESPONDING|\*", fields.get("State", ""))
        if down or max(_moment(fields.get(k, "")) for k in ("BootTime", "SlurmdStartTime")) > since:
            lost.append(fields.get("NodeName", nodelist))
    return lost


def requeue(job: str) -> str | None:
    """Ask for another attempt of the job that this process belongs to. None if granted, else why not.

    Who asks must know that the job was not cancelled: `scontrol requeue` would bring it back to life (measured).
    """
    for patience_s in (1, 3, None):  # a controller that is busy for a moment must not cost the run its next attempt
        answer = call("scontrol", "requeue", job)
        if answer.returncode == 0:
            return None
        if patience_s is not None and DISABLED not in answer.stderr:
            time.sleep(patience_s)
        elif DISABLED in answer.stderr:
            break
    return _line(answer.stderr) or "scontrol refused without a reason"


def ask_quietly(job: str, cluster: str | None = None) -> State:
    try:
        return ask(job, cluster)
    except SubmitError as error:
        return State("UNKNOWN", note=error.got)


def own_job() -> tuple[str, int]:
    """Id of the SLURM job around this process, and how often it was restarted."""
    return os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _seconds(text: str) -> int | None:
    try:
        return options.seconds(text)
    except ConfigError:
        return None  # Partition_Limit, 00:00:00, or a word of a newer SLURM


def _moment(text: str) -> float:
    """Unix time of one of SLURM's, which are the machine's local ones; 0 for a word such as None."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
