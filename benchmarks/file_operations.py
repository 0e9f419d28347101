"""The part ``files`` of ``benchmarks/size.py``: file operations of a training, counted with strace.

Trainings of the scanned digits are run by ranks that are forked from one process, which has imported everything, while
strace writes down each system call that names a file, and each ``fsync``. Trainings that differ in one respect only
give what an epoch, a save, a rank and a shard add. Reads and writes of open files are not counted.

``python -m benchmarks.file_operations FOLDER`` runs the ranks; strace starts it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

BATCH = 64  # five steps per epoch of 359 digits
CASES = {
    "base": {"ranks": 2, "data": "few", "steps": 5, "checkpoint_steps": 1000},
    "epochs": {"ranks": 2, "data": "few", "steps": 15, "checkpoint_steps": 1000},
    "saves": {"ranks": 2, "data": "few", "steps": 15, "checkpoint_steps": 3},
    "ranks": {"ranks": 4, "data": "few", "steps": 5, "checkpoint_steps": 1000},
    "shards": {"ranks": 2, "data": "many", "steps": 5, "checkpoint_steps": 1000},
    "stopped": {"ranks": 4, "data": "few", "steps": 5, "checkpoint_steps": 1000, "stop": 3},
    "resumed": {"ranks": 4, "data": "few", "steps": 5, "checkpoint_steps": 1000, "run": "stopped"},
}
"""Trainings: ``epochs`` has two epochs more than ``base``, and ``saves`` four saves more than ``epochs``. ``resumed``
goes on where ``stopped`` has ended; together they do what ``ranks`` does, and besides a save, an end and a resume."""
PER_SHARD = {"few": 50, "many": 12}
_CALLS = "trace=%file,fsync,fdatasync,clone,clone3,fork,vfork"
_LINE = re.compile(r"^(\d+) +(\w+)\(")
_CHILD = re.compile(r"^(\d+) .*?\b(?:clone3?|v?fork)\b.*\) += (\d+)$")


def run_cases(folder: Path) -> None:
    """Run the trainings. FOLDER/ranks.json gets case and rank of each process."""
    import torch.utils.tensorboard  # noqa: F401  (imported once here instead of in every rank)

    from hpcssl.run_dir import RunDir
    from hpcssl.signals import StopFlag
    from hpcssl.train import loop, main, recipe

    owners, launch_step = {}, loop.launch_step
    for number, (name, case) in enumerate(CASES.items()):
        overrides = [
            f"data.train={folder / str(case['data']) / 'val'}",
            "machine.devices=cpu",
            "views.size=16",
            f"optim.batch={BATCH}",
            "bank.size=128",
            f"schedule.steps={case['steps']}",
            "schedule.warmup_epochs=0",
            f"machine.checkpoint_steps={case['checkpoint_steps']}",
            "machine.checkpoint_minutes=0",
            "evals.knn_every_epochs=0",
        ]
        composed, pids = recipe.compose("digits_msf", overrides), []
        run = folder / f"run-{case.get('run', name)}"
        run.mkdir(exist_ok=True)
        stop = StopFlag()

        def stopping_step(training: Any, *rest: Any, case: Any = case, stop: StopFlag = stop) -> Any:
            if training.step + 1 == case.get("stop"):
                stop.set("enough")
            return launch_step(training, *rest)

        for rank in range(int(case["ranks"])):
            pid = os.fork()
            if pid == 0:
                variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["ranks"], "MASTER_ADDR": "127.0.0.1"}
                variables |= {"MASTER_PORT": 21_000 + os.getppid() % 4000 + number, "HPCSSL_TOKEN": name}
                os.environ.update({key: str(value) for key, value in variables.items()})
                code = 1
                try:
                    loop.launch_step = stopping_step
                    code = main.train(RunDir(run), composed, stop=stop.install())
                finally:
                    os._exit(code)
            owners[pid] = f"{name} {rank}"
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if set(codes) != {75 if "stop" in case else 0}:
            raise SystemExit(f"benchmarks.size: the training {name!r} of the part `files` failed")
    (folder / "ranks.json").write_text(json.dumps(owners))


def count_operations(folder: Path) -> dict[str, Counter[str]]:
    """Counts by what a file belongs to, for each ``CASE RANK``. Threads and children of a rank count as the rank."""
    lines = (folder / "trace").read_text(errors="replace").splitlines()
    parents = {child: pid for pid, child in (match.groups() for match in map(_CHILD.match, lines) if match)}
    owners = json.loads((folder / "ranks.json").read_text())
    counts: dict[str, Counter[str]] = {owner: Counter() for owner in owners.values()}
    for line in lines:
        match = _LINE.match(line)
        if match is None or match.group(2) in ("clone", "clone3", "fork", "vfork"):
            continue
        pid: str | None = match.group(1)
        while pid is not None and pid not in owners:
            pid = parents.get(pid)
        if pid is not None:
            case = owners[pid].split()[0]
            counts[owners[pid]][_kind_of(line, folder, case)] += 1
    return counts


def _kind_of(line: str, folder: Path, case: str) -> str:
    if f"{folder}/run-{CASES[case].get('run', case)}" in line:
        return "run folder"
    for name in PER_SHARD:
        if f"{folder}/{name}" in line:
            return "shards" if ".tar" in line else "index"
    return "of the system"


def measure_files(folder: Path, _quick: bool) -> dict[str, Any]:
    """File operations of a rank at its start, per epoch and per save, and what more ranks and more shards add."""
    strace = shutil.which("strace")
    if strace is None:
        raise SystemExit("benchmarks.size: the part `files` needs strace: apt-get install strace")
    sets = {}
    for name, samples in PER_SHARD.items():
        out = folder / name
        command = [sys.executable, "-m", "data_prep", "digits", str(out), "--samples-per-shard", str(samples)]
        subprocess.run(command, check=True, capture_output=True)
        sets[name] = len(list((out / "val").glob("*.tar")))
    command = [strace, "-f", "-y", "--seccomp-bpf", "-s", "4096", "-e", _CALLS, "-o", str(folder / "trace")]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, sys.executable, "-m", "benchmarks.file_operations", str(folder)], env=environ)
    if done.returncode:
        raise SystemExit(done.returncode)
    counts = count_operations(folder)
    result = {"shards, few and many": f"{sets['few']} and {sets['many']}"}
    kinds = ("run folder", "index", "shards", "of the system")
    for rank in (0, 1):
        of = {case: counts[f"{case} {rank}"] for case in CASES}
        epoch = {kind: (of["epochs"][kind] - of["base"][kind]) / 2 for kind in kinds}
        save = {kind: (of["saves"][kind] - of["epochs"][kind]) / 4 for kind in kinds}
        result[f"rank {rank}, start, one epoch, one save and end"] = _describe(of["base"])
        result[f"rank {rank}, each further epoch"] = _describe(epoch)
        result[f"rank {rank}, each further save"] = _describe(save)
        stop = {kind: of["stopped"][kind] + of["resumed"][kind] - of["ranks"][kind] for kind in kinds}
        result[f"rank {rank}, a stop and a resume, of 4 ranks"] = _describe(stop)
        result[f"rank {rank}, with two more ranks"] = _describe({k: of["ranks"][k] - of["base"][k] for k in kinds})
        more = {kind: of["shards"][kind] - of["base"][kind] for kind in kinds}
        result[f"rank {rank}, with {sets['many'] - sets['few']} more shards"] = _describe(more)
    return result


def _describe(counts: Any) -> str:
    return ", ".join(f"{name} {counts[name]:g}" for name in ("run folder", "index", "shards", "of the system"))


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
