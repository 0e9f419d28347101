"""Submitting many runs: each by the rules of a single one, and no more trainings at once than a limit allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpcssl import config
from hpcssl.errors import ConfigError, SubmitError
from hpcssl.run_dir import RunDir
from slurm import submit as submitting
from slurm.backend import identity, local, resources, scheduler
from slurm.log import job_log
from slurm.log.job_log import Job
from slurm.manage import control, lanes
from slurm.submission import Submission, SubmissionRequest, resolve_submission
from slurm.sweep.folder import Definition, check_folder, open_folder


@dataclass(frozen=True)
class Plan:
    """Runs of one folder that have passed all checks.

    Attributes:
        root: The folder.
        definition: What it is for.
        submissions: The resolved runs.
        limit: How many trainings may run at once; None for all.
    """

    root: Path
    definition: Definition
    submissions: list[Submission]
    limit: int | None


@dataclass(frozen=True)
class RunState:
    """What there is of a run already.

    Attributes:
        submission: The run.
        jobs: Its queued and running jobs.
        missing: ``what`` of the jobs that a submission would add now, the training first.
    """

    submission: Submission
    jobs: list[Job]
    missing: list[str]

    @property
    def needs_training(self) -> bool:
        """Whether its training is to be submitted."""
        return job_log.TRAIN in self.missing


def resolve(root: Path, definition: Definition, requests: Sequence[SubmissionRequest], limit: int | None) -> Plan:
    """Check everything that can be checked before the first job exists. Nothing is written.

    Args:
        root: The folder of the runs.
        definition: What it is for.
        requests: The runs.
        limit: How many trainings may run at once; None for all, and for one with ``--local``.

    Raises:
        ConfigError: The folder is another one's, two runs would be the same, or a run is invalid.
        HpcsslError: See ``submission.resolve_submission``.
    """
    check_folder(root, definition)
    submissions: list[Submission] = []
    first_by_recipe: dict[str, str] = {}
    for request in requests:
        submission = resolve_run(request, limit)
        name = submission.run.root.name
        recipe = config.fingerprint(config.as_dict(submission.recipe))
        if recipe in first_by_recipe:
            raise ConfigError(
                f"folder {root}",
                got=f"{first_by_recipe[recipe]} and {name}, which are the same run",
                expected="runs that differ",
                fix="leave out one of the two values",
            )
        first_by_recipe[recipe] = name
        submissions.append(submission)
    if requests[0].local:
        limit = limit or 1
        check_gpus(submissions[0], limit)
    return Plan(root, definition, submissions, limit)


def resolve_run(request: SubmissionRequest, limit: int | None) -> Submission:
    """Resolve one run of a folder in which only ``limit`` trainings may run at once; None for all.

    Raises:
        ConfigError: Its own dependency cannot be joined with that on another run.
        HpcsslError: See ``submission.resolve_submission``.
    """
    if "?" in str(request.sbatch.get("dependency", "")) and limit is not None:
        raise ConfigError(
            "option --dependency",
            got=repr(request.sbatch["dependency"]),
            expected="conditions that must all hold, since --parallel adds one",
            fix="write commas instead of ?, or leave out --parallel",
        )
    return resolve_submission(request)


def check_gpus(submission: Submission, limit: int) -> None:
    """Raise ``ConfigError`` if this machine has too few GPUs for ``limit`` local trainings like this one."""
    count, names = resources.count_gpus_per_node(submission.options[job_log.TRAIN]), local.list_gpus()
    if count * limit > len(names):
        raise ConfigError(
            "option --parallel",
            got=f"{limit} trainings with {count} GPUs each",
            expected=f"no more than the {len(names)} GPUs of this machine",
            fix=f"set --parallel {len(names) // count}" if len(names) >= count else "request fewer GPUs per run",
        )


def query_runs(plan: Plan) -> list[RunState]:
    """Return what there is of each run, and what is missing.

    Raises:
        SubmitError: SLURM did not answer.
    """
    return [query_run(submission) for submission in plan.submissions]


def query_run(submission: Submission) -> RunState:
    """Return what there is of one run, and what is missing. Raises ``SubmitError`` if SLURM did not answer."""
    jobs = control.active_jobs(submission.run)
    active = {job.what: job for job in jobs}
    needs_training = not submission.run.finished and job_log.TRAIN not in active
    known = {} if needs_training else active
    missing = submitting.select_missing_jobs(submission, known, needs_training)
    return RunState(submission, jobs, list(missing))


def submit_all(plan: Plan, report: Callable[[RunDir, list[Job]], None]) -> list[RunDir]:
    """Submit what is missing of each run.

    Args:
        plan: The runs, from ``resolve``.
        report: Called after each run with its new jobs, of which there may be none.

    Returns:
        The runs that got new jobs.

    Raises:
        SubmitError: SLURM refused, or jobs of another kind are queued. Runs before that one have been submitted.
        ConfigError: Another command has taken the folder.
    """
    first = plan.submissions[0]
    if not first.request.local:
        scheduler.require_slurm()
    submitting.check_partitions(first)
    with open_folder(plan.root, plan.definition):
        for submission in plan.submissions:
            record_unrecorded_jobs(submission.run)
        states = query_runs(plan)
        for state in states:
            _refuse_other_kind(state)
        active = [lanes.describe_active(state.submission.run, state.jobs) for state in states]
        line_up = lanes.Lanes([run for run in active if run is not None], plan.limit, split_gpus(first, plan.limit))
        new = []
        for state in states:
            jobs = submit_run(state, line_up)
            report(state.submission.run, jobs)
            if jobs:
                new.append(state.submission.run)
    return new


def record_unrecorded_jobs(run: RunDir) -> None:
    """Record the jobs of a run whose submission was interrupted (``identity.record_unrecorded_jobs``)."""
    if run.jobs.exists():
        with job_log.submission_lock(run):
            identity.record_unrecorded_jobs(run)


def submit_run(state: RunState, line_up: lanes.Lanes) -> list[Job]:
    """Submit what is missing of one run. Its training is appended to a lane; on this machine, so are evaluations.

    Args:
        state: The run.
        line_up: The lanes of its folder.

    Raises:
        SubmitError: SLURM refused, or jobs of another kind are queued.
    """
    _refuse_other_kind(state)
    submission = state.submission
    waiting = [job_log.TRAIN] if state.needs_training else state.missing if submission.request.local else []
    if not waiting:
        return submitting.submit_resolved(submission)
    lane = line_up.choose()
    options = {what: lanes.add_dependency(submission.options[what], lane.tails) for what in waiting}
    jobs = submitting.submit_resolved(replace(submission, options=submission.options | options), lane.gpus)
    if added := lanes.describe_active(submission.run, jobs):
        lane.append(added.id)
    return jobs


def _refuse_other_kind(state: RunState) -> None:
    kind = state.submission.request.kind
    other = next((job for job in state.jobs if job.kind != kind), None)
    if other is not None:
        how = "without" if kind == "local" else "with"
        raise SubmitError(
            f"run {state.submission.run.root}",
            got=f"job {other.id} ({other.what}), which was submitted {how} --local",
            expected="no such job in the queue, or the same command",
            fix="wait for the job, or cancel it",
        )


def split_gpus(first: Submission, limit: int | None) -> list[str]:
    """Return ``CUDA_VISIBLE_DEVICES`` of each lane of local runs; empty if they request no GPUs.

    Args:
        first: One of the runs.
        limit: The number of lanes.
    """
    count = resources.count_gpus_per_node(first.options[job_log.TRAIN]) if first.request.local else 0
    names = local.list_gpus()
    return [",".join(names[i * count : (i + 1) * count]) for i in range(limit or 0)] if count else []
