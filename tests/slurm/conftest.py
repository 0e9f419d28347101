"""A real SLURM for the tests: two nodes on the loopback of this machine, with own ports and a private configuration.

Nothing of a SLURM that is installed here for real is touched: every program gets ``SLURM_CONF``, and a munge that
already runs is used as it is. Everything that was started is ended by pid.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
        self.root, self.processes = root, []
        self.conf = root / "slurm.conf"

    def start(self) -> None:
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
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()

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
            self.processes.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                                   start_new_session=True, cwd="/", **more))

    def _story(self) -> str:
        logs = "\n".join(f"== {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-15:])
                         for p in sorted(self.root.glob("*.log")) + sorted(self.root.glob("*.out")))
        return self("squeue", "-a") + self("sinfo", "-R") + logs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A private SLURM of two nodes with four CPUs each; partitions ``main`` (preemptable), ``cancel`` (preempted
    jobs are cancelled, without grace) and ``high``. Jobs are requeued only where they ask for it themselves."""
    missing = [p for p in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if not _which(p)]
    if missing:
        pytest.skip(f"no {missing[0]} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    # munge refuses folders below one that others can write without the sticky bit, and needs to enter them all
    root = tmp_path_factory.mktemp("cluster")
    for folder in (root, *root.parents):
        if folder != Path("/") and folder.stat().st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o755)
    made = Cluster(root)
    before = os.environ.get("SLURM_CONF")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


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


STAND_IN = '''
"""Instead of the trainer: counts steps, stops, crashes and finishes as RUN/told.json says. Starts in no time."""

import json, os, time
from hpcssl.files import append_line, atomic_write

def train(run, *, stop, requeue, attempt):
    told = json.loads((run.root / "told.json").read_text())
    rank = int(os.environ.get("RANK", "0"))
    state = run.root / f"state-{rank}"
    step = int(state.read_text()) if state.exists() else 0
    place = {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "HPCSSL_TOKEN")}
    append_line(run.root / "places.jsonl", {"attempt": attempt["attempt"], **place})
    if rank == 0:
        append_line(run.attempts, {**attempt, "event": "start", "first_step": step})
    def end(cause, **more):
        if rank == 0:
            append_line(run.attempts, {**attempt, "event": "end", "cause": cause, "last_step": step, **more})
    while step < told["steps"]:
        if stop.is_set():
            atomic_write(state, str(step))
            end("stopped", signals=[stop.reason])
            if rank == 0:
                answer = requeue()
                append_line(run.root / "answers.jsonl", {"answer": answer})
            return 75
        if step == told.get("crash_at") and rank == told.get("crash_rank", 0):
            end("error", why="the stand-in was told to crash")
            raise RuntimeError("told to crash")
        step += 1
        if rank == 0:
            append_line(run.journal, {"step": step})
            if step in told.get("export", []):
                atomic_write(run.weights_at(step), "weights")
        time.sleep(told.get("step_s", 0.02))
    end("done")
    atomic_write(state, str(step))
    if rank == 0:
        atomic_write(run.done, json.dumps({"step": step, "weights": ""}))
    return 0
'''

STAND_IN_EVALUATION = '''
import json, os, time
from dataclasses import replace
from hpcssl.files import append_line, read_lines
from slurm import attempts, chain

def evaluate(run, what, *, stop, requeue, attempt):
    attempts.begin(run, what, attempt)
    asked = chain.entry(what)
    if what in json.loads((run.root / "told.json").read_text()).get("crash", []):
        raise RuntimeError("the stand-in was told to crash")
    for _ in range(10):
        if stop.is_set():
            attempts.end(run, what, attempt, "stopped")
            requeue()
            return 75
        time.sleep(0.02)
    for name in (what, *(str(replace(asked, step=step)) for step in chain.left_over(run, asked))):
        if not any(row["eval"] == name for row in read_lines(run.eval_rows(asked.name))):
            append_line(run.eval_rows(asked.name), {"eval": name, "trained": run.done.exists()})
    attempts.end(run, what, attempt, "done")
    return 0
'''


@pytest.fixture
def stand_in(tmp_path):
    """A run folder whose frozen code has a trainer and an evaluation without torch: seconds become tenths."""
    from hpcssl.files import RunDir
    from slurm import freeze

    def make(**told) -> RunDir:
        run = RunDir(tmp_path / "run")
        freeze.freeze(run)
        run.logs.mkdir()
        (run.code / "hpcssl" / "run.py").write_text(STAND_IN)
        (run.code / "slurm" / "evaluate.py").write_text(STAND_IN_EVALUATION)
        (run.root / "told.json").write_text(json.dumps({"steps": 30, **told}))
        return run

    return make


@pytest.fixture(scope="session")
def until():
    """Wait for something to become true, and fail with its name."""
    def wait(true, what: str, seconds: float = 30):
        limit = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < limit, f"no {what} within {seconds} s"
            time.sleep(0.05)
        return found

    return wait


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of the scanned digits, made once per test session."""
    root = tmp_path_factory.getbasetemp() / "digits"
    if not root.exists():
        subprocess.run([sys.executable, "-m", "data_prep", "digits", str(root)], check=True, capture_output=True)
    return root
