"""What the doctor looks at on the login node: SLURM and its settings, the partition, the software and the folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import hpcssl
from hpcssl.errors import ConfigError, format_bytes, os_error_parts
from slurm.backend import partitions, scheduler
from slurm.doctor.findings import BROKEN, NOTE, OK, SKIPPED, WARNING, Finding
from slurm.doctor.probe_tools import free_bytes, try_lock
from slurm.log import job_log
from slurm.log.job_log import SbatchOptions

COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
MIN_FREE_BYTES = 10e9
WRITTEN_BYTES = 16 << 20
"""Bytes of the file that is written, synced and removed: a full quota shows by an error."""
KILL_WAIT_S = 30

Settings = dict[str, str]
"""What ``scontrol show config`` prints, by name."""


def check_commands() -> list[Finding]:
    """Check that the client commands of SLURM are on the PATH."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        fix = "log in to a machine of the cluster, or load its SLURM module"
        return [Finding("SLURM commands", BROKEN, f"not on the PATH: {', '.join(missing)}", "all of them", fix)]
    version = scheduler.run_command("sbatch", "--version").stdout.strip()
    return [Finding("SLURM commands", OK, version or "all are on the PATH")]


def read_settings(cluster: str | None) -> tuple[Settings, list[Finding]]:
    """Read the settings of the controller, and say whether it answers.

    Args:
        cluster: The cluster, where ``--clusters`` names one.
    """
    answer = scheduler.run_command("scontrol", "show", "config", cluster=cluster)
    settings = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", answer.stdout, re.M))
    if answer.returncode or not settings:
        got = " ".join(answer.stderr.split())[:200] or "no settings"
        fix = "check SLURM_CONF and munge; ask your site whether slurmctld runs"
        return {}, [Finding("controller", BROKEN, got, "an answer to `scontrol show config`", fix)]
    name, version = settings.get("ClusterName", "?"), settings.get("SLURM_VERSION", "?")
    return settings, [Finding("controller", OK, f"cluster {name} answers, SLURM {version}")]


def check_munge(settings: Settings) -> list[Finding]:
    """Check that munge makes a credential, and accepts it.

    Args:
        settings: What ``read_settings`` returned; empty if the controller did not answer.
    """
    kind = settings.get("AuthType", "auth/munge")
    if kind != "auth/munge":
        return [Finding("munge", SKIPPED, f"this cluster uses {kind}")]
    if not (shutil.which("munge") and shutil.which("unmunge")):
        if settings:
            return [Finding("munge", SKIPPED, "its commands are not on the PATH; SLURM answers, so it works")]
        fix = "install munge, or ask your site"
        return [Finding("munge", BROKEN, "no munge on the PATH", "munge and its daemon", fix)]
    socket = re.search(r"socket=([^,\s]+)", settings.get("AuthInfo", ""))
    where = ["-S", socket[1]] if socket else []
    made = _run("munge", "-n", *where)
    read = _run("unmunge", *where, text=made.stdout) if made.returncode == 0 else made
    if read.returncode:
        got = " ".join(read.stderr.split())[:200] or f"exit code {read.returncode}"
        fix = "start munged on this node (systemctl start munge), with the cluster's key and a synchronized clock"
        return [Finding("munge", BROKEN, got, "`munge -n | unmunge` succeeds", fix)]
    return [Finding("munge", OK, "a credential is made and accepted")]


def check_settings(settings: Settings) -> list[Finding]:
    """Look at the settings of SLURM that decide what happens to a job that is preempted, cancelled or requeued."""
    findings = []
    if settings.get("JobRequeue") == "0":
        text = "JobRequeue=0: SLURM requeues only jobs that request it, as those of hpcssl do"
        findings.append(Finding("requeue by default", NOTE, text))
    else:
        findings.append(Finding("requeue by default", OK, f"JobRequeue={settings.get('JobRequeue', '?')}"))
    match = re.match(r"\d+", settings.get("KillWait", ""))
    if match and int(match[0]) < KILL_WAIT_S:
        text = f"KillWait={match[0]} s: a cancelled job has no more time to save; keep machine.checkpoint_steps small"
        findings.append(Finding("time to save", NOTE, text))
    elif match:
        findings.append(Finding("time to save", OK, f"KillWait={match[0]} s"))
    text = ", ".join(f"{k}={settings[k]}" for k in ("MaxJobCount", "MaxArraySize", "MaxStepCount") if k in settings)
    if text:
        findings.append(Finding("limits of jobs", OK, text))
    return findings


def check_partition(settings: Settings, sbatch: SbatchOptions) -> list[Finding]:
    """Check the partition: whether it can run the job, and how it preempts jobs.

    Args:
        settings: What ``read_settings`` returned.
        sbatch: Options of sbatch.
    """
    try:
        partitions.check_limits(sbatch)
    except ConfigError as error:
        return [Finding("partition", BROKEN, f"{error.what}: {error.got}", error.expected, error.fix)]
    cluster = job_log.get_cluster(sbatch)
    answer = scheduler.run_command("scontrol", "-a", "show", "partition", "-o", cluster=cluster)
    found = [dict(re.findall(r"([A-Z]\w*)=(\S*)", line)) for line in answer.stdout.splitlines()]
    names = str(os.environ.get("SBATCH_PARTITION") or sbatch.get("partition", "")).split(",")
    used = [p for p in found if p.get("PartitionName") in names or (names == [""] and p.get("Default") == "YES")]
    if not used:
        fix = "name a partition: -p NAME, or partition: in the cluster profile"
        return [Finding("partition", BROKEN, "there is no default partition", "a partition", fix)]
    findings = []
    for partition in used:
        name, state = partition["PartitionName"], partition.get("State", "UP")
        if state != "UP":
            fix = "wait until your site opens it, or name another one (-p NAME)"
            findings.append(Finding("partition", BROKEN, f"{name} is {state}", "a partition that is UP", fix))
            continue
        limit = f"{name} is up, {partition.get('TotalNodes', '?')} nodes, MaxTime={partition.get('MaxTime', '?')}"
        findings.append(Finding("partition", OK, limit))
        findings += _judge_preemption(settings, partition)
    return findings


def _judge_preemption(settings: Settings, partition: dict[str, str]) -> list[Finding]:
    mode = partition.get("PreemptMode", "OFF")
    if settings.get("PreemptType", "preempt/none") in ("preempt/none", "(null)") or mode == "OFF":
        return [Finding("preemption", OK, "jobs of this partition are not preempted")]
    grace = int(re.sub(r"\D", "", partition.get("GraceTime", "0")) or 0)
    text = f"PreemptMode={mode}, GraceTime={grace} s"
    if mode in ("REQUEUE", "CANCEL") and not grace:
        fix = "save often (machine.checkpoint_steps), or ask for a GraceTime: a preempted job cannot save"
        return [Finding("preemption", WARNING, text, "a grace time in which a job can save", fix)]
    return [Finding("preemption", OK, text)]


def read_versions() -> dict[str, str]:
    """Return the versions of Python, torch and hpcssl on this node."""
    return {"python": platform.python_version(), "torch": metadata.version("torch"), "hpcssl": hpcssl.__version__}


def check_folder(folder: Path) -> list[Finding]:
    """Check the file system of a folder: it can be written, has locks, and space.

    Args:
        folder: An existing folder.
    """
    kind = find_file_system(folder)
    path = folder / f".hpcssl-doctor-{os.getpid()}"
    try:
        began = time.perf_counter()
        with open(path, "wb") as file:
            file.write(bytes(WRITTEN_BYTES))
            os.fsync(file.fileno())
        os.replace(path, path.with_suffix(".renamed"))
        took = time.perf_counter() - began
        path = path.with_suffix(".renamed")
        free = free_bytes(str(folder))
        with open(path, "rb") as file:
            lock = _judge_lock(path, file.fileno(), kind)
    except OSError as error:
        _, got, expected, fix = os_error_parts(error)
        return [Finding("folder", BROKEN, f"{folder} ({kind}): {got}", expected, fix)]
    finally:
        path.unlink(missing_ok=True)
    rate = WRITTEN_BYTES / took / 1e6
    text = f"{folder} ({kind}): written, synced and renamed at {rate:.0f} MB/s; {format_bytes(free)} free"
    if free < MIN_FREE_BYTES:
        fix = "free space there, or choose another folder: the checkpoints of one run need several GB"
        return [Finding("folder", WARNING, text, f"{format_bytes(MIN_FREE_BYTES)} free", fix), *lock]
    return [Finding("folder", OK, text), *lock]


def _judge_lock(path: Path, descriptor: int, kind: str) -> list[Finding]:
    from hpcssl.files import lock_descriptor

    own = lock_descriptor(descriptor)
    other = try_lock(str(path)) if own else "not tried"
    if own and other == "held":
        return [Finding("locks", OK, "the file system has locks")]
    got = f"{kind}: " + ("no locks" if own is None else f"a second lock of one file: {other}")
    fix = "mount the file system with locks (Lustre: -o flock; NFS: without nolock), or use another folder for runs"
    return [Finding("locks", BROKEN, got, "flock works", fix)]


def find_file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on, such as ``nfs4``; ``unknown`` where /proc is missing."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        _, mount, name = line.split()[:3]
        if len(mount) >= len(best) and folder.resolve().is_relative_to(mount.replace("\\040", " ")):
            best, kind = mount, name
    return kind


def _run(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))
