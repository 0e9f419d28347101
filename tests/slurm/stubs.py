"""A trainer and an evaluation without torch, which replace the real ones in the code snapshot of a run."""

from __future__ import annotations

import json
from pathlib import Path

from hpcssl.files import atomic_write
from hpcssl.run_dir import RunDir
from slurm.backend import code_snapshot

SETTINGS = "stub.json"
"""File in the run folder with the settings of the stubs.

``steps``: steps of the training. ``step_s``: seconds per step. ``hold_at``: the step at which the training waits, and
still handles signals, until the test changes the setting; what must happen before the training ends can then take as
long as it takes. ``crash_at``, ``crash_rank``: where the training fails; ``crash_attempts``: in how many attempts;
``crash_cause``, ``crash_message``: what it records, with the node in place of ``NODE``. ``export``: steps whose weights
are exported.
``crash``: evaluations that fail. ``hold_evaluation``: where evaluations wait, and still handle signals, while the
setting stands: ``start`` (before the attempt is recorded), ``middle``, or ``row`` (after the row is written).
``hold_at``, ``step_s`` and ``hold_evaluation`` are read again and again, the others at the start of each attempt.
"""
CRASH_MESSAGE = "the test requested a crash"
ARRIVAL_S = 4
"""Seconds that a stopped rank waits for the others to arrive; one that was killed never does."""

TRAINER = f'''
import json, os, time
from hpcssl.errors import Stopped
from hpcssl.files import append_line, atomic_write
from slurm.backend import processes

def train(run, *, stop, requeue, attempt, **_):
    def read_settings():
        return json.loads((run.root / "{SETTINGS}").read_text())
    settings = read_settings()
    rank = int(os.environ.get("RANK", "0"))
    state = run.root / f"state-{{rank}}"
    step = int(state.read_text()) if state.exists() else 0
    suffix = str(attempt['attempt'])
    stop_file, answer_file = (run.root / f"{{name}}-{{suffix}}" for name in ("stop", "answer"))
    pid_files = [run.root / f"pid-{{suffix}}-{{r}}" for r in range(int(os.environ.get("WORLD_SIZE", "1")))]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "HPCSSL_TOKEN")
    append_line(run.root / "ranks.jsonl", {{"attempt": attempt["attempt"], **{{k: os.environ.get(k) for k in names}}}})
    atomic_write(pid_files[rank], str(os.getpid()))
    stopped_at = None
    while not all(file.exists() for file in pid_files):
        stopped_at = (stopped_at or time.monotonic()) if stop.is_set() else None
        if stopped_at is not None and time.monotonic() - stopped_at > {ARRIVAL_S}:
            raise Stopped("rendezvous", got=stop.reason, expected="all ranks", fix="submit again")
        time.sleep(0.02)
    if rank == 0:
        append_line(run.attempts, {{**attempt, "event": "start", "first_step": step, "time": time.time()}})
    def record_end(cause, **fields):
        if rank == 0:
            append_line(run.attempts, {{**attempt, "event": "end", "cause": cause, "last_step": step, **fields}})
    def is_alive(r):
        process = processes.read_process(int(pid_files[r].read_text())) if pid_files[r].exists() else None
        return process is not None and process.is_alive
    while step < settings["steps"]:
        current = read_settings()
        if stop.is_set() and not stop_file.exists():
            atomic_write(stop_file, stop.reason)
        if stop_file.exists():
            atomic_write(state, str(step))
            if rank == 0 and any(file.exists() and not is_alive(r) for r, file in enumerate(pid_files)):
                record_end("error", why="a rank is gone", consequence=True)
                raise RuntimeError("a rank is gone")
            if rank == 0:
                reason = stop_file.read_text()
                cause, refused = requeue([reason])
                record_end(cause, signals=[reason])
                append_line(run.root / "requeues.jsonl", {{"refused": refused}})
                atomic_write(answer_file, cause)
            while rank != 0 and is_alive(0) and not answer_file.exists():
                time.sleep(0.02)
            return 75
        if step == current.get("hold_at"):
            time.sleep(0.02)
            continue
        is_crash = step == settings.get("crash_at") and rank == settings.get("crash_rank", 0)
        if is_crash and attempt["attempt"] <= settings.get("crash_attempts", 100):
            node = os.environ.get("SLURMD_NODENAME", "")
            why = settings.get("crash_message", "{CRASH_MESSAGE}").replace("NODE", node)
            record_end(settings.get("crash_cause", "error"), why=why)
            raise RuntimeError("{CRASH_MESSAGE}")
        step += 1
        if rank == 0:
            append_line(run.journal, {{"step": step}})
            if step in settings.get("export", []):
                atomic_write(run.weights_at(step), "weights")
        time.sleep(current.get("step_s", 0.02))
    record_end("done")
    atomic_write(state, str(step))
    if rank == 0:
        atomic_write(run.done, json.dumps({{"step": step, "weights": ""}}))
    return 0
'''
"""As in the real trainer, a signal to one rank stops all of them, and the others wait while rank 0 requests a requeue:
what SLURM then reports about the job's nodes depends on it. An attempt begins when all ranks have arrived, and nothing
is saved without a rank that has died."""

EVALUATION = f'''
import json, time
from dataclasses import replace
from hpcssl.files import append_line, read_lines
from slurm.log import attempts
from slurm.manage import evaluations

def evaluate(run, what, *, stop, requeue, attempt, **_):
    def hold(place):
        while json.loads((run.root / "{SETTINGS}").read_text()).get("hold_evaluation") == place and not stop.is_set():
            (run.root / f"held-{{place}}").touch()
            time.sleep(0.02)
    hold("start")
    attempts.record_start(run, what, attempt)
    request = evaluations.parse_request(what)
    if what in json.loads((run.root / "{SETTINGS}").read_text()).get("crash", []):
        raise RuntimeError("{CRASH_MESSAGE}")
    for _ in range(10):
        hold("middle")
        if stop.is_set():
            cause, _ = requeue([stop.reason])
            attempts.record_end(run, what, attempt, cause)
            return 75
        time.sleep(0.02)
    others = [str(replace(request, step=step)) for step in evaluations.remaining_steps(run, request)]
    for name in (what, *others):
        if not any(row["eval"] == name for row in read_lines(run.eval_rows(request.name))):
            append_line(run.eval_rows(request.name), {{"eval": name, "trained": run.done.exists()}})
    hold("row")
    attempts.record_end(run, what, attempt, "done")
    return 0
'''


def create_run(root: Path, **settings) -> RunDir:
    """Create a run folder whose code snapshot has the stubs. ``settings``: see ``SETTINGS``; 30 steps by default."""
    run = RunDir(root)
    code_snapshot.create_snapshot(run)
    run.logs.mkdir()
    (run.code / "hpcssl" / "run.py").write_text(TRAINER)
    (run.code / "slurm" / "job" / "evaluate.py").write_text(EVALUATION)
    (run.root / SETTINGS).write_text(json.dumps({"steps": 30, **settings}))
    return run


def change_settings(run: RunDir, **settings) -> None:
    """Change settings of the stubs, also while they run."""
    path = run.root / SETTINGS
    atomic_write(path, json.dumps(json.loads(path.read_text()) | settings))


SBATCH = """#!/bin/bash
cd {folder}
[ -e refuse ] && {{ echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1; }}
id=$(($(cat next) + 1))
echo $id > next
token=$(sed -n "s/^#SBATCH --comment=.*\\(hpcssl=[0-9a-f]*\\).*/\\1/p" "$1")
echo "$id PENDING $token" >> queue
{{ {then}
}}
echo "Submitted batch job $id"
"""
"""A program ``sbatch`` that accepts each job, and does something else before it says so."""


class QueueStub:
    """Programs in place of SLURM's, which keep a list of jobs and start none.

    Args:
        folder: Where the programs and their list are written. The folder ``bin`` in it belongs on the PATH.
        then: Shell commands of ``sbatch`` between the job and the answer.
    """

    def __init__(self, folder: Path, then: str = ":"):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "next").write_text("6\n")
        (folder / "queue").write_text("")
        (folder / "partitions").write_text("")
        (folder / "output").write_text("")
        self.set_sbatch(then)
        fields = r'$1 "\t" $2 "\tNone\troot\tN/A\t1\t\tx\t" $3'  # in the order of queue_snapshot.py
        snapshot = f"awk '{{{{print {fields}}}}}' {{folder}}/queue"
        self._write("squeue", f'case "$*" in *%S*) {snapshot};; *) cat {{folder}}/queue;; esac')
        self._write("scancel", 'sed -i "/^$1 /d" {folder}/queue')
        self._write(
            "scontrol",
            '[ "$3" = partition ] && exec cat {folder}/partitions\n'
            "line=$(grep \"^$4 \" {folder}/queue 2>/dev/null) || {{ echo 'Invalid job id specified' >&2; exit 1; }}\n"
            'echo "JobId=$4 JobName=x UserId=root(0) JobState=PENDING Comment=${{line##* }} StdErr=/dev/null" '
            '"StdOut=$(cat {folder}/output)"',
        )

    def set_sbatch(self, then: str) -> None:
        """Change what sbatch does between the job and the answer."""
        self._write("sbatch", SBATCH.format(folder=self.folder, then=then), "")

    def set_output(self, path: Path) -> None:
        """Set the file of the standard output that all jobs have."""
        (self.folder / "output").write_text(str(path))

    @property
    def jobs(self) -> list[str]:
        """Ids of the jobs in the queue."""
        return [line.split()[0] for line in (self.folder / "queue").read_text().splitlines()]

    def add_stranger(self, job: str) -> None:
        """Add a job that is not ours."""
        with open(self.folder / "queue", "a") as file:
            file.write(f"{job} RUNNING other\n")

    def remove(self, job: str) -> None:
        """Forget a job."""
        lines = (self.folder / "queue").read_text().splitlines(keepends=True)
        (self.folder / "queue").write_text("".join(line for line in lines if line.split()[0] != job))

    def _write(self, name: str, body: str, head: str = "#!/bin/bash\n") -> None:
        path = self.bin / name
        path.write_text(head + (body.format(folder=self.folder) if head else body))
        path.chmod(0o755)
