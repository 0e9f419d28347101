"""A SLURM of two nodes on the loopback of this machine: for the tests and for the soak.

Nothing of a SLURM that is installed here for real is touched: every program gets ``SLURM_CONF``, own ports and a
private folder, and a munge that already runs is used as it is. Everything that was started is ended by pid.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from slurm import procs

CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmUser=root
SlurmdUser=root
MpiDefault=none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
KillWait=10
MinJobAge=3000
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=cancel Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """slurmctld and two slurmd, for as long as the test session lives."""

    def __init__(self, root: Path):
        self.root, self.processes = root, {}
        self.conf = root / "slurm.conf"

    def start(self) -> None:
        # munge refuses folders below one that others can write without the sticky bit, and needs to enter them all
        for folder in (self.root, *self.root.parents):
            if folder != Path("/") and folder.stat().st_uid == os.getuid():
                folder.chmod(folder.stat().st_mode | 0o755)
        for name in ("state", "spool.n1", "spool.n2"):
            (self.root / name).mkdir(parents=True)
        ports = _free_ports(3)
        self.conf.write_text(CONF.format(host=socket.gethostname(), root=self.root, munge=self._munge(),
                                         ctld=ports[0], first=ports[1], last=ports[2]))
        os.environ["SLURM_CONF"] = str(self.conf)
        self._spawn("slurmctld", "-D", "-c")
        for name in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", name)
        self.until(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D").split()[:1] == ["2"], "two idle nodes", 60)

    def __call__(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout

    def until(self, true, what: str, seconds: float = 60) -> None:
        limit = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < limit, f"no {what} within {seconds} s\n" + self._story()
            time.sleep(0.2)

    def field(self, job: str, name: str) -> str:
        found = [w for w in self("scontrol", "show", "job", "-o", job).split() if w.startswith(name + "=")]
        return found[0].partition("=")[2] if found else ""

    def stop(self) -> None:
        self("scancel", "--full", "-u", "root")
        self.until(lambda: not self("squeue", "-h", "-t", "R,CG"), "empty queue", 30)
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()

    def restart(self, name: str, after_s: float = 0.0) -> None:
        """Kill ``slurmctld``, ``slurmd n1`` or ``slurmd n2``, and start it again with what it has on its disk."""
        self.processes[name].kill()
        self.processes[name].wait()
        time.sleep(after_s)
        program, *node = name.split()
        self._spawn(program, "-D", *(["-N", *node] if node else []))
        if program == "slurmctld":
            self.until(lambda: "is UP" in self("scontrol", "ping"), "answer of slurmctld", 30)

    def sweep(self) -> None:
        """End whatever still runs that was started with this cluster's configuration: on the way out, however."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and procs.environment(int(folder.name)).get("SLURM_CONF") == str(self.conf):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(folder.name), signal.SIGKILL)

    def _munge(self) -> str:
        """The socket of a munge that runs already, or of one of our own with a key of our own."""
        system = Path("/run/munge/munge.socket.2")
        if system.exists() and subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return str(system)
        user = pwd.getpwnam("munge")
        folder = self.root / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for path in (folder, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        self._spawn("munged", "--foreground", f"--key-file={key}", f"--socket={folder}/socket",
                    f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed",
                    user="munge", group="munge")
        self.until(lambda: (folder / "socket").exists(), "munge socket", 20)
        return f"{folder}/socket"

    def _spawn(self, *words: str, **more) -> None:
        with open(self.root / f"{words[0]}.out", "ab") as log:
            name = f"{words[0]} {words[-1]}" if "-N" in words else words[0]
            self.processes[name] = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                                    start_new_session=True, cwd="/", **more)

    def _story(self) -> str:
        logs = "\n".join(f"== {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-15:])
                         for p in sorted(self.root.glob("*.log")) + sorted(self.root.glob("*.out")))
        return self("squeue", "-a") + self("sinfo", "-R") + logs


def missing() -> str | None:
    """Why no cluster can be started here; None if it can."""
    programs = [p for p in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if not _which(p)]
    if programs:
        return f"no {programs[0]} here: apt-get install slurm-wlm munge"
    return "slurmd needs root" if os.geteuid() != 0 else None


def tasks_of(job: str) -> dict[int, int]:
    """Rank and pid of the living tasks of a job on this machine, of SLURM (``12``) or local (``local-12``)."""
    rank_in, job_in = ("SUBMITIT_LOCAL_GLOBALID", "HPCSSL_LOCAL_JOB") if job.startswith("local") else (
        "SLURM_PROCID", "SLURM_JOB_ID")
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        about = procs.environment(int(folder.name))
        if about.get(job_in) != job or rank_in not in about:
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            process = procs.look(int(folder.name))
            # the interpreter itself, and neither srun nor what a task has started
            if b"slurm.start" in words and b"srun" not in words[0] and process is not None and process.alive:
                found[int(about[rank_in])] = process.pid
    return found


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    """``count`` ports in a row that nobody listens on, looked for from another place in every process."""
    for first in range(16_817 + os.getpid() % 500 * 17, 30_000, 17):
        sockets = []
        try:
            for k in range(count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", first + k))
            return [first + k for k in range(count)]
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise OSError("no free ports")
