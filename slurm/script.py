"""The batch script of a job, as submitit writes it with our defaults, and its way to sbatch."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpcssl.errors import SubmitError
from hpcssl.files import RunDir
from slurm import records, shape, trust
from slurm.cluster import Profile

INHERITED = ("SLURM_CONF", "SLURM_TIME_FORMAT")
"""Of the variables of a job in which somebody submits another one, only these are about the cluster."""


class Batch(SlurmExecutor):
    """submitit's executor, without its refusal where SLURM is absent: a dry run needs none. Its tasks run our command
    instead of submitit's, so that no pickle is ever read: a damaged one, or a ``.save_tmp`` left beside it, means
    nothing, and nobody counts timeouts.
    """

    command = ""

    @property
    def _submitit_command_str(self) -> str:
        return self.command

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(run: RunDir, what: str, sbatch: dict, profile: Profile) -> Batch:
    """The executor of one job. Nothing in the script is text of a user that is not quoted."""
    python = f"{profile.container} {shlex.quote(profile.python or sys.executable)}".strip()
    batch = Batch(run.logs)
    batch.command = command(python, run, what)
    name, lead = shape.signal(sbatch)
    options = {**sbatch, "requeue": True, "signal": f"{name}@{lead}", "kill-on-invalid-dep": "yes"}
    options.setdefault("job-name", run.root.name + ("" if what == records.TRAIN else f"-{what}"))
    options.pop("open-mode", None)  # submitit writes append, in its own spelling of the key
    tasks = shape.tasks_per_node(sbatch)
    if tasks is not None:
        batch.update_parameters(ntasks_per_node=tasks)
    batch.update_parameters(
        # no time and no key of submitit's own: the partition's limit holds where the user gave none
        time=None, wckey=None, nodes=shape.nodes(sbatch), signal_delay_s=lead,
        srun_args=_srun(sbatch, profile), setup=_setup(run, profile),
        additional_parameters={k.replace("-", "_"): v for k, v in options.items()},
        teardown=["code=$?", f"{python} -m slurm.after {shlex.quote(str(run.root))} {shlex.quote(what)} $code",
                  "exit $?"])
    return batch


def command(python: str, run: RunDir, what: str) -> str:
    """What each task runs. ``python``: the interpreter, quoted."""
    return f"{python} -m slurm.start -u -m slurm.job {shlex.quote(str(run.root))} {shlex.quote(what)}"


def text(run: RunDir, what: str, sbatch: dict, profile: Profile) -> str:
    """The batch script as sbatch would get it."""
    batch = executor(run, what, sbatch, profile)
    return batch._make_submission_file_text(batch._submitit_command_str, "dry-run")


def submit(run: RunDir, what: str, sbatch: dict, profile: Profile, follows: str | None = None) -> str:
    """Hand one job to sbatch; returns its id. Raises ``SubmitError`` with SLURM's own words."""
    profile = replace(profile, python=profile.python or sys.executable)
    batch = executor(run, what, sbatch, profile)
    try:
        with outside_any_job(), trust.ours_alone():
            job = batch.submit(str, what).job_id  # submitit pickles what it is given, which nobody reads: ``command``
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise SubmitError("sbatch", got=_reason(error), expected="a job id",
                          mend="change the option that SLURM names; --dry-run prints what it was given") from error
    records.note(run, "submit", job, what=what, kind="slurm", options=sbatch, profile=asdict(profile),
                 **({"follows": follows} if follows else {}))
    return job


@contextlib.contextmanager
def outside_any_job() -> Iterator[None]:
    """The environment without the variables of a job around this process: its sizes are not the new job's."""
    ours = [k for k in os.environ if k.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "HPCSSL_"))
            and k not in INHERITED]
    kept = {k: os.environ.pop(k) for k in ours}
    try:
        yield
    finally:
        os.environ.update(kept)


def _srun(sbatch: dict, profile: Profile) -> list[str]:
    # --export=ALL: under `sbatch --export=NONE` srun would drop what this script exports
    words = ["--kill-on-bad-exit=1", "--export=ALL"]
    if "cpus-per-task" in sbatch:  # since 22.05 srun does not take it over from sbatch
        words.append(f"--cpus-per-task={sbatch['cpus-per-task']}")
    return words + list(profile.srun)


def _setup(run: RunDir, profile: Profile) -> list[str]:
    # code that another has put in the place of ours would not refuse itself (slurm/trust.py): the shell does it
    told = shlex.quote(f"hpcssl: {run.root}: it or its folder code is not of the user of this job, or others can write "
                       "this code, and it is not run")
    root, code = (shlex.quote(str(folder)) for folder in (run.root, run.code))
    mine = f'[ -O {root} ] && [ -O {code} ] && [ -z "$(find {code} ! -type l -perm /022 -print -quit)" ]'
    return [f"{mine} || {{ echo {told} >&2; exit 1; }}", *profile.lines(),
            # frozen code first on the path, and the current folder never on it
            f"export PYTHONPATH={shlex.quote(str(run.code))} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
            # who waits for srun is not ended by a signal (a handler, which srun does not inherit)
            "trap : INT TERM USR1 USR2"]


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()
    return " ".join(" ".join(lines).split())[:400]


warnings.filterwarnings("ignore", message='"cpus_per_gpu" requires', module="submitit")
