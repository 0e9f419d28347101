"""A private SLURM of two or more nodes on the loopback of this machine, for tests and for the soak test.

A SLURM that is installed here for real use is not touched: every program gets ``SLURM_CONF``, ports and a folder of its
own. A munge daemon that already runs is used as it is. Everything that was started is ended by its pid.
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
from collections.abc import Callable, Iterator
from pathlib import Path

from slurm.backend import processes

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
MessageTimeout=60
MinJobAge=3000
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=cancel Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class LoopbackCluster:
    """slurmctld and a slurmd per node. Calling it runs one of SLURM's commands: ``cluster("squeue", "-h")``.

    Partitions: ``main`` (preempted jobs may be requeued, after a grace time of 20 s), ``cancel`` (preempted jobs are
    cancelled, without a grace time) and ``high``, whose jobs preempt the others.

    Args:
        root: A folder for configuration, state and logs.
        nodes: Number of nodes, 2 or more, named n1, n2, …

    Attributes:
        conf: The configuration file.
        nodes: Names of the nodes.
        processes: The running programs, by name (``slurmctld``, ``slurmd n1``, ``slurmd n2``, …, ``munged``).
    """

    def __init__(self, root: Path, nodes: int = 2):
        self.root, self.nodes = root, [f"n{number}" for number in range(1, nodes + 1)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = root / "slurm.conf"

    def start(self) -> None:
        """Start the programs, set ``SLURM_CONF`` in this process, and wait until all nodes are idle.

        Raises:
            AssertionError: They do not become idle; the message has the ends of the logs.
        """
        # munge needs to enter all folders above its socket, and refuses those that others can write without sticky bit
        for folder in (self.root, *self.root.parents):
            if folder != Path("/") and folder.stat().st_uid == os.getuid():
                folder.chmod(folder.stat().st_mode | 0o755)
        for name in self._state_folders():
            (self.root / name).mkdir(parents=True)
        ports = _find_free_ports(1 + len(self.nodes))
        self.conf.write_text(
            CONF.format(
                host=socket.gethostname(),
                root=self.root,
                munge=self._start_munge(),
                ctld=ports[0],
                first=ports[1],
                last=ports[-1],
                nodes=len(self.nodes),
            )
        )
        os.environ["SLURM_CONF"] = str(self.conf)
        self._start_daemons()

    def __call__(self, *words: str) -> str:
        """Run a command of SLURM. Return its standard output, whether it succeeded or not."""
        return subprocess.run(words, capture_output=True, text=True, timeout=300).stdout

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = 300) -> None:
        """Wait until a condition holds.

        Args:
            condition: Called every 0.2 s.
            what: What is waited for, for the error.
            seconds: Time limit.

        Raises:
            AssertionError: The time is over; the message has the ends of SLURM's logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s\n" + self._describe()
            time.sleep(0.2)

    def field(self, job: str, name: str) -> str:
        """Return a field of ``scontrol show job``; empty if the job does not have it."""
        words = self("scontrol", "show", "job", "-o", job).split()
        values = [word.partition("=")[2] for word in words if word.startswith(name + "=")]
        return values[0] if values else ""

    def stop(self) -> None:
        """Cancel all jobs, and end the programs.

        Raises:
            AssertionError: The jobs do not end.
        """
        if "slurmctld" in self.processes:  # else these commands would reach another SLURM of this machine
            self("scancel", "--full", "-u", "root")
            self.wait_until(lambda: not self("squeue", "-h", "-t", "R,CG"), "empty queue", 120)
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()

    def restart(self, name: str, after_s: float = 0.0) -> None:
        """Kill a program, and start it again with its state on the disk.

        Args:
            name: ``slurmctld``, ``slurmd n1`` or ``slurmd n2``.
            after_s: Seconds in between.
        """
        self.processes[name].kill()
        self.processes[name].wait()
        time.sleep(after_s)
        program, *node = name.split()
        self._spawn(program, "-D", *(["-N", *node] if node else []))
        if program == "slurmctld":
            self.wait_until(lambda: "is UP" in self("scontrol", "ping"), "answer of slurmctld")

    def lose_state(self, next_job: int) -> None:
        """Kill the daemons, remove their state, and start them again, as those of a rebuilt cluster.

        Args:
            next_job: The id of the next job.
        """
        daemons = [name for name in self.processes if name.startswith("slurm")]
        for name in daemons:
            self.processes[name].kill()
            self.processes[name].wait()
        for folder in self._state_folders():
            shutil.rmtree(self.root / folder)
            (self.root / folder).mkdir()
        lines = [line for line in self.conf.read_text().splitlines() if not line.startswith("FirstJobId=")]
        self.conf.write_text("\n".join([*lines, f"FirstJobId={next_job}"]) + "\n")
        self._start_daemons()

    def kill_all(self) -> None:
        """Kill every process that was started with this cluster's configuration and still runs."""
        for pid in _all_pids():
            if processes.read_environment(pid).get("SLURM_CONF") == str(self.conf):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _start_daemons(self) -> None:
        self._spawn("slurmctld", "-D", "-c")
        for name in self.nodes:
            self._spawn("slurmd", "-D", "-N", name)
        idle = [str(len(self.nodes))]
        self.wait_until(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D").split()[:1] == idle, "idle nodes")

    def _state_folders(self) -> list[str]:
        return ["state", *(f"spool.{name}" for name in self.nodes)]

    def _start_munge(self) -> str:
        """The socket of a munge that already runs, or of a private one with a key of its own."""
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
        self._spawn(
            "munged",
            "--foreground",
            f"--key-file={key}",
            f"--socket={folder}/socket",
            f"--pid-file={folder}/pid",
            f"--log-file={folder}/log",
            f"--seed-file={folder}/seed",
            user="munge",
            group="munge",
        )
        self.wait_until(lambda: (folder / "socket").exists(), "munge socket")
        return f"{folder}/socket"

    def _spawn(self, *words: str, user: str | None = None, group: str | None = None) -> None:
        name = f"{words[0]} {words[-1]}" if "-N" in words else words[0]
        with open(self.root / f"{words[0]}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                user=user,
                group=group,
            )

    def _describe(self) -> str:
        """The queue, the nodes, and the ends of the logs."""
        logs = "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.root.glob("*.log")) + sorted(self.root.glob("*.out"))
        )
        return self("squeue", "-a") + self("sinfo", "-R") + logs


@contextlib.contextmanager
def running_cluster(root: Path, nodes: int = 2) -> Iterator[LoopbackCluster]:
    """Run a cluster for the time of the block, and restore ``SLURM_CONF``.

    Args:
        root: See ``LoopbackCluster``.
        nodes: Likewise.

    Raises:
        AssertionError: It does not start.
    """
    cluster, before = LoopbackCluster(root, nodes), os.environ.get("SLURM_CONF")
    try:
        cluster.start()
        yield cluster
    finally:
        try:
            cluster.stop()
        finally:
            os.environ.pop("SLURM_CONF", None)  # not set if the start has failed early
            os.environ.update({} if before is None else {"SLURM_CONF": before})


def explain_unavailable() -> str | None:
    """Return why no cluster can be started on this machine; None if it can."""
    missing = [program for program in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if not _find_program(program)]
    if missing:
        return f"{missing[0]} is not installed: apt-get install slurm-wlm munge"
    return "slurmd needs root" if os.geteuid() != 0 else None


def find_task_pids(job: str) -> dict[int, int]:
    """Return the pids of a job's running tasks on this machine, by rank.

    Args:
        job: The id of a SLURM job (``12``) or of a local job (``local-12``).
    """
    rank_variable, job_variable = (
        ("SUBMITIT_LOCAL_GLOBALID", "HPCSSL_LOCAL_JOB") if job.startswith("local") else ("SLURM_PROCID", "SLURM_JOB_ID")
    )
    pids = {}
    for pid in _all_pids():
        environ = processes.read_environment(pid)
        if environ.get(job_variable) != job or rank_variable not in environ or not is_of_this_cluster(environ):
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            process = processes.read_process(pid)
            # the interpreter of the task, and neither srun nor a child of the task
            is_task = b"slurm.job.bootstrap" in words and b"srun" not in words[0]
            if is_task and process is not None and process.is_alive:
                pids[int(environ[rank_variable])] = pid
    return pids


def is_of_this_cluster(environ: dict[str, str]) -> bool:
    """Return False for the environment of a process of another private cluster, whose jobs have the same numbers."""
    own = os.environ.get("SLURM_CONF")
    return own is None or environ.get("SLURM_CONF", own) == own


def _all_pids() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def _find_program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _find_free_ports(count: int) -> list[int]:
    """``count`` consecutive ports on which nobody listens. Each process begins its search at another port."""
    for first in range(16_817 + os.getpid() % 500 * 17, 30_000, 17):
        sockets: list[socket.socket] = []
        try:
            for k in range(count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", first + k))
            return [first + k for k in range(count)]
        except OSError:
            continue
        finally:
            for opened in sockets:
                opened.close()
    raise OSError("no free ports")
