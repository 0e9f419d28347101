"""``hpcssl.submit``: submit a run from Python, and follow it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, Stopped, SubmitError
from hpcssl.run_dir import RunDir
from slurm.backend import profiles, resources, sbatch_options
from slurm.log.job_log import Job, SbatchOptions
from slurm.manage import control
from slurm.submission import SubmissionRequest

if TYPE_CHECKING:  # these import torch, which status and cancel do not wait for
    from hpcssl.api import Run
    from hpcssl.train.recipe import RecipeSource
    from slurm.manage.status import RunStatus


@dataclass(frozen=True)
class SubmittedRun:
    """A run with its jobs.

    Attributes:
        folder: The paths of the run folder.
        jobs: The jobs of this submission, training first. If nothing was missing, those that are queued or running.
        is_new: Whether this submission has submitted them.
    """

    folder: RunDir
    jobs: tuple[Job, ...]
    is_new: bool

    @property
    def ids(self) -> list[str]:
        """The ids of the jobs: those of SLURM, or ``local-...``."""
        return [job.id for job in self.jobs]

    @property
    def run(self) -> Run:
        """The run, with its journal, results and weights so far."""
        from hpcssl.api import Run

        return Run(self.folder.root)

    def status(self) -> RunStatus:
        """Return job, state, attempt, step, last end, evaluations and a hint, as ``hpcssl-submit status`` shows them.

        The state is ``UNKNOWN`` while SLURM does not answer.
        """
        from slurm.manage.status import query_run

        return query_run(self.folder)

    def wait(self, *, check: bool = True, write: Callable[[str], None] | None = None) -> int:
        """Follow the jobs to their end. Preempted jobs continue by themselves meanwhile. Ctrl-C ends only the waiting.

        Args:
            check: Whether to raise an error if a job did not succeed.
            write: Called with each line of progress, such as ``print``.

        Returns:
            The exit code of the training, or of the first evaluation that failed: 0 done, 75 cancelled.

        Raises:
            Stopped: With ``check``: a job was cancelled.
            SubmitError: With ``check``: a job failed.
        """
        from slurm.log import attempts
        from slurm.manage.status import describe_last_end
        from slurm.manage.wait import wait_for_jobs

        code = wait_for_jobs(self.folder, write or (lambda _line: None), jobs=self.jobs)
        if code == EXIT_DONE or not check:
            return code
        last_end = describe_last_end(attempts.read_attempts(self.folder)) or "no attempt"
        raise (Stopped if code == EXIT_STOPPED else SubmitError)(
            f"run {self.folder.root}",
            got=f"exit code {code}; last end of the training: {last_end}",
            expected="all jobs to succeed",
            fix=f"see `hpcssl-submit status {self.folder.root}`; the same submission continues",
        )

    def cancel(self) -> list[str]:
        """Cancel every queued or running job of the run for good. The training saves first.

        Returns:
            The ids of the jobs that were cancelled.

        Raises:
            SubmitError: There is none, or SLURM refused.
        """
        return control.cancel(self.folder)


def submit(
    recipe: RecipeSource | None = None,
    *overrides: str,
    run: str | os.PathLike[str],
    parent: str | os.PathLike[str] | None = None,
    evals: str | Sequence[str] = (),
    eval_every: int = 0,
    sbatch: Mapping[str, Any] | None = None,
    eval_sbatch: Mapping[str, Any] | None = None,
    cluster: str | os.PathLike[str] | None = None,
    spare_nodes: int = 0,
    local: bool = False,
    allow_pipe: bool = False,
    **values: Any,
) -> SubmittedRun:
    """Submit a recipe as a job that survives preemptions, time limits and requeues, followed by evaluations.

    The same call submits only what is missing: it continues a run, and finds its jobs again from another process.

    Args:
        recipe: See ``hpcssl.train``.
        overrides: See ``hpcssl.train``.
        run: The run folder. A run that it contains is continued.
        parent: See ``hpcssl.train``.
        evals: Evaluations after the training: ``["knn", "linear:protocol=msf"]``.
        eval_every: Also evaluate the weights of every so many epochs during the training; 0 for never.
        sbatch: Options of sbatch: ``{"nodes": 2, "time": "2-0", "exclusive": True}``.
        eval_sbatch: Those of evaluations; a dict under the name of one is for this one only.
        cluster: A cluster profile: its name, or a YAML file.
        spare_nodes: Nodes to allocate in addition, to replace lost ones.
        local: Run on this machine, without SLURM; of ``sbatch``, only the numbers of tasks and GPUs count.
        allow_pipe: See ``hpcssl.train``.
        values: See ``hpcssl.train``.

    Raises:
        HpcsslError: See ``hpcssl.train``. ``SubmitError`` if SLURM refused, or jobs are queued with another recipe.

    Example:
        ::

            submitted = hpcssl.submit("mine.yaml", run="runs/mine", sbatch={"ntasks-per-node": 2}, local=True)
            submitted.wait(write=print)
    """
    from hpcssl.api.overrides import collect_overrides, plain_source

    branch, evals = None if parent is None else os.fspath(parent), evals if isinstance(evals, str) else ",".join(evals)
    request = SubmissionRequest(
        run=os.fspath(run),
        recipe=plain_source(recipe, branch),
        overrides=collect_overrides(overrides, values),
        evals=evals or "knn" * bool(eval_every),
        eval_every=eval_every,
        sbatch=_parse_sbatch(sbatch or {}) | ({resources.SPARE_NODES: str(spare_nodes)} if spare_nodes else {}),
        local=local,
        profile=profiles.load_profile(None if cluster is None else os.fspath(cluster)),
        allow_pipe=allow_pipe,
        parent=branch,
        eval_sbatch=_parse_eval_sbatch(eval_sbatch or {}),
    )
    return submit_request(request)


def submit_request(request: SubmissionRequest) -> SubmittedRun:
    """Submit what is missing of a request; see ``submit``."""
    from slurm.submit import submit as submit_missing

    jobs = submit_missing(request)
    folder = RunDir(os.path.expanduser(request.run))
    return SubmittedRun(folder, tuple(jobs or control.active_jobs(folder)), is_new=bool(jobs))


def _parse_eval_sbatch(values: Mapping[str, Any]) -> dict[str, SbatchOptions]:
    """Options by the name of the evaluation; under an empty name, those of all evaluations."""
    common = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    own = {name: _parse_sbatch(value) for name, value in values.items() if isinstance(value, Mapping)}
    return ({"": _parse_sbatch(common)} if common else {}) | own


def _parse_sbatch(values: Mapping[str, Any]) -> SbatchOptions:
    """Options as sbatch takes them, checked like those of a command line."""
    words = []
    for name, value in values.items():
        option = f"--{name.lstrip('-').replace('_', '-')}"
        if value is not None and value is not False:
            words.append(option if value is True else f"{option}={value}")
    parts = sbatch_options.split_command_line(words)
    if parts.own:
        option = parts.own[0].partition("=")[0]
        raise ConfigError(
            "sbatch", got=option, expected="options of sbatch", fix="give it as an argument of hpcssl.submit of its own"
        )
    return parts.sbatch
