"""The faults of the soak: one small function each (the table is ``chaos_kinds``).

A function does one thing to a running training and returns who suffered it. What comes after (the requeue, the next
attempt) is the scene's to wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos_plan import Fault
from benchmarks.chaos_scene import PERIOD, Scene, Stuck
from hpcssl import launch
from slurm import options, procs


class Missed(Exception):
    """Nobody was there to suffer it: the training has just ended."""


# -- signals to the tasks -------------------------------------------------------------------------------------------


def to_one(number: signal.Signals, times: int = 1) -> Callable:
    def strike(scene: Scene, fault: Fault) -> str:
        for _ in range(times):
            scene.kill(_victim(scene, fault), number=number)
            time.sleep(0.3 * fault.share * (times > 1))
        return f"rank {fault.rank}"
    return strike


def to_all(number: signal.Signals, times: int = 1) -> Callable:
    def strike(scene: Scene, fault: Fault) -> str:
        tasks = _tasks(scene)
        for _ in range(times):
            scene.kill(*(tasks[rank] for rank in fault.ranks), number=number)
            time.sleep(0.3 * fault.share * (times > 1))
        return "all ranks"
    return strike


def stop_and_continue(scene: Scene, fault: Fault) -> str:
    pids = _tasks(scene).values()
    scene.kill(*pids, number=signal.SIGSTOP)
    time.sleep(0.5 + fault.share)
    scene.kill(*pids, number=signal.SIGCONT)
    return "all ranks"


def to_rank_zero(scene: Scene, fault: Fault) -> str:
    scene.kill(_tasks(scene)[0])
    return "rank 0"


# -- while it starts, while it saves -----------------------------------------------------------------------------------


def in_the_start(strike: Callable) -> Callable:
    """``strike``, some seconds into the start of the attempt that the fault before has brought."""
    def later(scene: Scene, fault: Fault) -> str:
        scene.starting(scene.struck)
        time.sleep(4 * fault.share)
        return strike(scene, fault)
    return later


def in_a_save(strike: Callable) -> Callable:
    """``strike``, when a checkpoint has begun that has no manifest yet."""
    def later(scene: Scene, fault: Fault) -> str:
        limit, tended = time.monotonic() + 60, time.monotonic()
        while not scene.saving():
            if scene.done or time.monotonic() > limit:
                raise Missed
            if time.monotonic() - tended > 1:
                scene.tend()
                tended = time.monotonic()
            time.sleep(0.001)
        return strike(scene, fault)
    return later


def stranger(scene: Scene, fault: Fault) -> str:
    """A rank that was left over: it knows the new attempt's address, and has the old one's token."""
    there = procs.environment(next(iter(_tasks(scene).values())))
    words = {k: v for k, v in there.items() if not k.startswith(("SUBMITIT_", "PYTHON"))}
    attempt = "-".join(there.get(n, "0") for n in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    place = launch.Place(rank=fault.rank or 1, local_rank=0, size=4, address="127.0.0.1",
                         port=launch.port_of(attempt), token=f"{scene.job}-0-left-over")
    meet = ("import sys; from hpcssl.world import World; from hpcssl.errors import HpcsslError\n"
            "try: World.start('cpu', timeout_s=5).barrier()\n"
            "except HpcsslError as error: sys.exit('refused')\n"
            "sys.exit('let in')")
    left = subprocess.Popen([sys.executable, "-c", meet], env=words | place.environment() | {
        "PYTHONPATH": str(scene.run.code)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    scene.left_over.append(left)
    return f"the rendezvous, by a rank {place.rank} of another attempt"


# -- what belongs to the job and is no task --------------------------------------------------------------------------


def to_process(word: str, number: signal.Signals = signal.SIGKILL) -> Callable:
    def strike(scene: Scene, fault: Fault) -> str:
        pids = scene.processes(word)
        if not pids:
            raise Missed
        # of the two processes of an srun the first does the work
        victim = pids[0 if word == "srun" else int(fault.share * len(pids))]
        line = Path(f"/proc/{victim}/cmdline").read_text().strip("\0")
        scene.kill(victim, number=number)
        return line if word == "slurmstepd:" else word
    return strike


def preemption(scene: Scene, _fault: Fault) -> str:
    _tasks(scene)
    scene.cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    return "the job"


def requeue(scene: Scene, _fault: Fault) -> str:
    _tasks(scene)
    scene.cluster("scontrol", "requeue", scene.job)
    return "the job"


def walltime(scene: Scene, _fault: Fault) -> str:
    """The limit moves near; the training is held still until SLURM's warning of it, which comes when it likes."""
    ran = options.seconds(scene.cluster.field(scene.job, "RunTime"))
    tasks = [p for p in map(procs.look, _tasks(scene).values()) if p]
    procs.send(tasks, signal.SIGSTOP)
    try:
        scene.cluster("scontrol", "update", f"jobid={scene.job}", f"TimeLimit={ran // 60 + 2}")
        limit = time.monotonic() + 90
        while not all(_waits(p.pid, signal.SIGUSR2) for p in tasks):
            if time.monotonic() > limit:
                raise Stuck("no warning of the time limit")
            time.sleep(0.1)
    finally:
        procs.send([p for p in tasks if procs.same(p.pid, p.started)], signal.SIGCONT)
        scene.cluster("scontrol", "update", f"jobid={scene.job}", "TimeLimit=60")
    return "the job"


def node_down(scene: Scene, fault: Fault) -> str:
    _tasks(scene)
    scene.cluster("scontrol", "update", f"nodename={fault.node}", "state=down", "reason=chaos")
    time.sleep(1 + fault.share)
    scene.cluster("scontrol", "update", f"nodename={fault.node}", "state=resume")
    return f"node {fault.node}"


def slurmd(scene: Scene, fault: Fault) -> str:
    scene.cluster.restart(f"slurmd {fault.node}", after_s=fault.share)
    return f"node {fault.node}"


def slurmctld(scene: Scene, fault: Fault) -> str:
    scene.cluster.restart("slurmctld", after_s=fault.share)
    return "the controller"


def second_job(scene: Scene, _fault: Fault) -> str:
    """A person starts the same training once more in the same folder, and is told who is there."""
    _tasks(scene)
    words = scene.trainer.words(scene.run)
    alone = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run([sys.executable, "-m", "hpcssl", "train", *words], capture_output=True, text=True,
                          timeout=120, env=alone)
    if done.returncode == 0 and "is finished" in done.stderr:  # while this one waited for the lock
        raise Missed
    if done.returncode == 0 or f"job {scene.job}" not in done.stderr:
        raise Stuck(f"a second writer was not refused by name: {done.returncode} {done.stderr.strip()[-300:]}")
    return "the run folder"


# -- the disk ------------------------------------------------------------------------------------------------------


def flip(scene: Scene, fault: Fault) -> str:
    path = _part(scene, fault)
    with open(path, "r+b") as file:
        file.seek(int(fault.share * path.stat().st_size))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1 << fault.number % 8]))
    return f"{path.parent.name}/{path.name}"


def truncate(scene: Scene, fault: Fault) -> str:
    path = _part(scene, fault)
    os.truncate(path, int(fault.share * path.stat().st_size))
    return f"{path.parent.name}/{path.name}"


def no_manifest(scene: Scene, _fault: Fault) -> str:
    folder = _newest_of_two(scene)
    (folder / "manifest.json").unlink()
    return folder.name


def half_written(scene: Scene, fault: Fault) -> str:
    """What a writer leaves that was killed: a temporary beside the parts, and a folder with one part alone."""
    newest = _sealed(scene)[-1]
    body = next(newest.glob("part-*")).read_bytes()
    (newest / ".part-0.safetensors.0badc0de.tmp").write_bytes(body[:int(fault.share * len(body))])
    step = int(newest.name[5:]) + 1
    folder = scene.run.checkpoint(step + (step % PERIOD == 0))  # and none that looks like a periodic one
    folder.mkdir(exist_ok=True)
    (folder / "part-0.safetensors").write_bytes(body)
    return folder.name


def full_disk(scene: Scene, fault: Fault) -> str:
    """Not a byte is free for some seconds."""
    filler = scene.run.root.parent / "filler"
    try:
        with open(filler, "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        time.sleep(0.5 + 2 * fault.share)
    finally:
        filler.unlink()
    return "the run's disk"


# -- what they share --------------------------------------------------------------------------------------------------


def _tasks(scene: Scene) -> dict[int, int]:
    tasks = scene.tasks()
    if len(tasks) < 4:
        raise Missed
    return tasks


def _victim(scene: Scene, fault: Fault) -> int:
    return _tasks(scene)[fault.rank]


def _sealed(scene: Scene, least: int = 1) -> list[Path]:
    """Whole checkpoints, oldest first, once there are so many."""
    limit = time.monotonic() + 60
    while True:
        found = [folder for folder in scene.checkpoints() if (folder / "manifest.json").exists()]
        if len(found) >= least:
            return found
        if scene.done or time.monotonic() > limit:
            raise Missed
        time.sleep(0.05)


def _newest_of_two(scene: Scene) -> Path:
    """The newest checkpoint, once there is another one: to go on with none is nobody's duty."""
    return _sealed(scene, 2)[-1]


def _part(scene: Scene, fault: Fault) -> Path:
    folder = _newest_of_two(scene)
    names = [part["file"] for part in json.loads((folder / "manifest.json").read_text())["parts"]]
    return folder / names[fault.rank]


def _waits(pid: int, number: int) -> bool:
    """Whether a signal waits for a process, or the process is gone."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    return bool(int(lines["ShdPnd"], 16) & 1 << (number - 1))
