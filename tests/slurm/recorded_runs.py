"""Recorded runs without jobs, and a program ``squeue`` with a given answer."""

from __future__ import annotations

import json
from pathlib import Path

from hpcssl import files
from hpcssl.run_dir import RunDir
from slurm.log import job_log

SQUEUE = """#!/bin/bash
echo "$@" >> {folder}/calls
[ -e {folder}/down ] && {{ echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1; }}
cat {folder}/queue
"""


class Squeue:
    """A program ``squeue`` with a given answer, which counts its calls."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        (self.bin / "squeue").write_text(SQUEUE.format(folder=folder))
        (self.bin / "squeue").chmod(0o755)
        for name in ("scontrol", "sacct"):
            (self.bin / name).write_text(f"#!/bin/bash\necho {name} >> {folder}/calls\nexit 1\n")
            (self.bin / name).chmod(0o755)
        self.answer()

    def answer(self, *rows: tuple[object, ...]) -> None:
        """Set the queue: id, state, reason, user, start, nodes, batch script, name and comment of each job."""
        (self.folder / "queue").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


def submit(run, job, what="train", **options):
    """Record a job as a submission does; its token."""
    token = f"{int(job):016x}"
    values = {"what": what, "kind": "slurm", "options": options, "token": token, "user": "me"}
    job_log.record_event(run, "submit", str(job), **values)
    return token


def make_run(root, job=7, step=30):
    """A run of 100 steps that has been submitted and has a journal; its folder and the token of its job."""
    run = RunDir(root)
    run.logs.mkdir(parents=True)
    files.atomic_write(run.config, json.dumps({"schedule": {"steps": 100}, "optim": {"batch": 8}}))
    lines = [{"step": 10, "eval": True, "knn20": 88.5}, {"step": step, "loss": 0.5, "epoch": 2.0, "images_per_s": 40.0}]
    lines.append({"step": step + 1, "loss": "nan", "epoch": 2.1})
    files.atomic_write(run.journal, "".join(json.dumps(line) + "\n" for line in lines))
    return run, submit(run, job)


def row(job, token, run, state="RUNNING", reason="None", start="N/A"):
    return job, state, reason, "me", start, 1, run.logs / "x_submission.sh", "name", f"a comment hpcssl={token}"
