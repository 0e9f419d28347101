"""Batch scripts: written by submitit with the options of hpcssl, and handed to sbatch."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from submitit import SlurmExecutor

from hpcssl.errors import SubmitError
from hpcssl.files import atomic_write
from hpcssl.run_dir import RunDir
from hpcssl.signals import hold_signals
from slurm.backend import identity, permissions, resources, scheduler
from slurm.backend.owner import TOKEN_VARIABLE
from slurm.backend.profiles import Profile
from slurm.log import avoided_nodes, job_log
from slurm.log.job_log import SbatchOptions
from slurm.log.launches import (
    EXIT_RELAUNCH,
    LAUNCH_TIME_VARIABLE,
    LAUNCH_VARIABLE,
    NODES_VARIABLE,
    STEP_WAIT_S,
    WAIT_VARIABLE,
)

JOB_PREFIXES = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "HPCSSL_")
"""Prefixes of the variables that describe the job around a process."""
CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_TIME_FORMAT")
"""Variables with these prefixes that describe the cluster instead, and that a job submitted from a job needs."""
SBATCH_TIMEOUT_S = 120.0
"""Seconds after which a call of sbatch is given up, and its job is searched in the queue."""
LOST_ANSWERS = r"(?i)time[d -]*out|unable to contact|transmit|transport|communication|connect|send/recv|interrupted|i/o"
"""Messages of sbatch after which SLURM may still accept the job: its controller has got the request, or may get it."""


class BatchExecutor(SlurmExecutor):
    """submitit's executor, of which only the text of the batch script is used, with a command of our own.

    It does not check that SLURM is installed: a dry run needs none. The tasks run ``task_command`` instead of
    submitit's own command, so that there is no pickle that could be damaged, and submitit does not count timeouts.
    ``submit`` calls sbatch itself: submitit can neither give it up nor tell whether SLURM has accepted the job.

    Attributes:
        command: What each task runs.
    """

    command = ""

    @property
    def _submitit_command_str(self) -> str:
        return self.command

    @classmethod
    def affinity(cls) -> int:
        """Return submitit's preference for this executor; any positive number means available."""
        return 2


def build_executor(
    run: RunDir, what: str, sbatch: SbatchOptions, profile: Profile, token: str = "TOKEN"
) -> BatchExecutor:
    """Build the executor of one job. All text of a user is quoted in its script.

    Args:
        run: The run folder.
        what: ``train``, or the text of an evaluation.
        sbatch: Options of sbatch.
        profile: The cluster profile.
        token: The job's token (``identity``).
    """
    python = f"{profile.container} {shlex.quote(profile.python or sys.executable)}".strip()
    host_python = shlex.quote(profile.host_python) if profile.host_python else python
    executor = BatchExecutor(run.logs)
    executor.command = f"${WAIT_VARIABLE} {task_command(python, run, what)}"
    name, lead = resources.get_warning_signal(sbatch)
    options: SbatchOptions = {**sbatch, "requeue": True, "signal": f"{name}@{lead}", "kill-on-invalid-dep": "yes"}
    options |= {
        "job-name": identity.format_job_name(run, what, sbatch),
        "comment": identity.format_comment(token, sbatch),
    }
    spare = resources.count_spare_nodes(sbatch)
    if spare:
        options.pop(resources.SPARE_NODES)
        options |= {"nodes": str(resources.count_nodes(sbatch) + spare), "no-kill": True}
        executor.command = f"${NODES_VARIABLE} {executor.command}"
    options.pop("open-mode", None)  # submitit writes append, in its own spelling of the key
    tasks = resources.count_tasks_per_node(sbatch)
    if tasks is not None:
        executor.update_parameters(ntasks_per_node=tasks)
    executor.update_parameters(
        # no time limit and no wckey by default: those of the partition apply if the user gives none
        time=None,
        wckey=None,
        nodes=resources.count_nodes(sbatch) + spare,
        signal_delay_s=lead,
        srun_args=_srun_args(sbatch, profile),
        setup=_setup_lines(run, profile, token) + _launch_lines(host_python, run, what, sbatch),
        additional_parameters={name.replace("-", "_"): value for name, value in options.items()},
        teardown=[
            "code=$?",
            f"{host_python} -m slurm.job.epilogue {shlex.quote(str(run.root))} {shlex.quote(what)} $code",
            "code=$?",
            f"[ $code -eq {EXIT_RELAUNCH} ] || exit $code",
            f"{LAUNCH_VARIABLE}=$(({LAUNCH_VARIABLE} + 1))",
            f"{WAIT_VARIABLE}=--immediate={STEP_WAIT_S}",
            "done",
        ],
    )
    return executor


def task_command(python: str, run: RunDir, what: str) -> str:
    """Return the shell command of each task.

    Args:
        python: The interpreter, quoted, with the container command before it.
        run: The run folder.
        what: ``train``, or the text of an evaluation.
    """
    return f"{python} -m slurm.job.bootstrap -u -m slurm.job.task {shlex.quote(str(run.root))} {shlex.quote(what)}"


def render(run: RunDir, what: str, sbatch: SbatchOptions, profile: Profile) -> str:
    """Return the batch script as sbatch would get it. See ``build_executor``."""
    return _format_script(build_executor(run, what, sbatch, profile))


def submit(
    run: RunDir,
    what: str,
    sbatch: SbatchOptions,
    profile: Profile,
    follows: str | None = None,
    avoided: Mapping[str, str] | None = None,
) -> str:
    """Submit one job to SLURM and record it.

    No signal comes between the two. If the process is killed there, or sbatch gives no answer, the request that was
    recorded before finds the job (``identity.record_unrecorded_jobs``).

    Args:
        run: The run folder.
        what: ``train``, or the text of an evaluation.
        sbatch: Options of sbatch.
        profile: The cluster profile.
        follows: Id of the job that this one continues.
        avoided: Nodes to exclude besides the user's own, with the reasons. They are not kept among the job's options.

    Returns:
        The job id.

    Raises:
        SubmitError: sbatch refused, with SLURM's message.
        OSError: The job cannot be recorded. It was cancelled, or not submitted.
    """
    profile = replace(profile, python=profile.python or sys.executable)
    token = identity.create_token()
    request: dict[str, Any] = {
        "what": what,
        "kind": "slurm",
        "options": sbatch,
        "profile": asdict(profile),
        "token": token,
        "user": identity.current_user(),
        **({"follows": follows} if follows else {}),
    }
    script = run.logs / f"{token}_submission.sh"
    text = _format_script(build_executor(run, what, add_excluded(sbatch, avoided or {}), profile, token))
    with hold_signals(), without_job_environment(), permissions.private_umask():
        atomic_write(script, text)
        job_log.record_request(run, **request)
        job, cluster = _call_sbatch(run, str(script), token, sbatch)
        if cluster and "clusters" not in sbatch:  # SBATCH_CLUSTERS: the other commands of SLURM do not read it
            request["options"] = {**sbatch, "clusters": cluster}
        try:
            job_log.record_event(run, "submit", job, **request)
            if avoided:
                avoided_nodes.record(run, what, job, avoided)
        except OSError:
            scheduler.run_command("scancel", job, cluster=job_log.get_cluster(request["options"]))
            raise
    return job


def add_excluded(sbatch: SbatchOptions, nodes: Iterable[str]) -> SbatchOptions:
    """Return the options of sbatch with more excluded nodes, besides the user's own."""
    names = [*([str(sbatch["exclude"])] if "exclude" in sbatch else []), *nodes]
    return sbatch | {"exclude": ",".join(names)} if names else sbatch


def _format_script(executor: BatchExecutor) -> str:
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def _call_sbatch(run: RunDir, script: str, token: str, sbatch: SbatchOptions) -> tuple[str, str]:
    """The id of the new job, and its cluster if SLURM names one.

    An error of sbatch does not mean that SLURM has not accepted the job.
    """
    answer = scheduler.run_command("sbatch", script, timeout_s=SBATCH_TIMEOUT_S)
    match = re.search(r"job (\d+)(?: on cluster (\S+))?", answer.stdout) if answer.returncode == 0 else None
    job, is_certain = (match[1], True) if match else identity.find_accepted_job(token, job_log.get_cluster(sbatch))
    if job is None:
        message = answer.stderr.strip()
        is_refusal = message and answer.returncode != scheduler.TIMEOUT_CODE and not re.search(LOST_ANSWERS, message)
        if is_certain and is_refusal:  # there is no job to look for later
            job_log.record_event(run, "withdrawn", "", token=token)
        raise SubmitError(
            "sbatch",
            got=_error_lines(answer.stderr or answer.stdout) or "no message",
            expected="a job id",
            fix="change the option that SLURM names; --dry-run prints the batch script",
        )
    return job, (match and match[2]) or ""


@contextlib.contextmanager
def without_job_environment() -> Iterator[None]:
    """Remove the variables of the job around this process: sbatch would take its sizes for those of the new job."""
    names = [n for n in os.environ if n.startswith(JOB_PREFIXES) and n not in CLUSTER_VARIABLES]
    removed = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(removed)


def _srun_args(sbatch: SbatchOptions, profile: Profile) -> list[str]:
    # --export=ALL: after `sbatch --export=NONE` srun would drop what the script exports
    args = ["--kill-on-bad-exit=1", "--export=ALL"]
    if "cpus-per-task" in sbatch:  # since 22.05 srun does not inherit it from sbatch
        args.append(f"--cpus-per-task={sbatch['cpus-per-task']}")
    return args + list(profile.srun)


def _setup_lines(run: RunDir, profile: Profile, token: str) -> list[str]:
    # code that somebody else has put in the place of ours would not refuse to run itself (see permissions.py), so the
    # shell checks the owner and the modes
    message = shlex.quote(
        f"hpcssl: {run.root}: it or its folder code belongs to another user, or others can write the code; "
        "the job does not run it"
    )
    root, code = (shlex.quote(str(folder)) for folder in (run.root, run.code))
    is_private = f'[ -O {root} ] && [ -O {code} ] && [ -z "$(find {code} ! -type l -perm /022 -print -quit)" ]'
    return [
        f"{is_private} || {{ echo {message} >&2; exit 1; }}",
        *profile.setup_lines(),
        # the code snapshot is first on Python's path, and the current folder is never on it
        f"export PYTHONPATH={shlex.quote(str(run.code))} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 {TOKEN_VARIABLE}={token}",
        # a signal does not end the shell while it waits for srun; srun does not inherit the handler
        "trap : INT TERM USR1 USR2",
    ]


def _launch_lines(python: str, run: RunDir, what: str, sbatch: SbatchOptions) -> list[str]:
    """The beginning of the loop that launches the tasks. The epilogue decides whether there is another turn."""
    lines = [
        f"{WAIT_VARIABLE}=",
        f"export {LAUNCH_VARIABLE}=0",
        "while true; do",
        f"export {LAUNCH_TIME_VARIABLE}=$(date +%s)",
    ]
    if resources.count_spare_nodes(sbatch):
        nodes, tasks = resources.count_nodes(sbatch), resources.count_processes(sbatch)
        words = f"{shlex.quote(str(run.root))} {shlex.quote(what)} {nodes} {tasks}"
        # if that fails SLURM chooses the nodes: the number of tasks must not depend on the spare ones
        without_answer = f'{NODES_VARIABLE}="--nodes={nodes} --ntasks={tasks}"'
        lines.append(f"{NODES_VARIABLE}=$({python} -m slurm.job.step_nodes {words}) || {without_answer}")
    return lines


def _error_lines(text: str) -> str:
    """The lines of an output of sbatch that have an error, or else all, as one line."""
    lines = [line for line in text.splitlines() if "error:" in line] or text.splitlines()
    return " ".join(" ".join(lines).split())[:400]


warnings.filterwarnings("ignore", message='"cpus_per_gpu" requires', module="submitit")
