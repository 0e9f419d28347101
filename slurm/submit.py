"""Submitting a run, in one pass: parse, resolve, check, snapshot the code, submit.

Submitting the same again submits only what is missing: no job that is queued or running, and no evaluation whose row
exists.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from hpcssl import config
from hpcssl.cli_runner import print_message
from hpcssl.errors import SubmitError
from hpcssl.run_dir import RunDir
from slurm.backend import (
    batch_script,
    code_snapshot,
    identity,
    local,
    partitions,
    permissions,
    profiles,
    resources,
    scheduler,
)
from slurm.job import avoidance, concurrent_evals
from slurm.log import job_log
from slurm.log.job_log import Job, SbatchOptions
from slurm.manage import control, evaluations
from slurm.manage.evaluations import EvalRequest
from slurm.submission import ResolvedEvaluation, Submission, SubmissionRequest, resolve_submission


def render_scripts(request: SubmissionRequest) -> str:
    """Return what ``--dry-run`` prints: all batch scripts of a submission.

    Those of evaluations depend on the job ``JOBID``; those of concurrent evaluations score the weights of ``STEP``.

    Raises:
        HpcsslError: See ``submission.resolve_submission``.
    """
    submission = resolve_submission(request)
    jobs = []
    for what, sbatch in submission.options.items():
        if what == job_log.TRAIN:
            jobs.append((what, sbatch))
            continue
        jobs.append((what, resources.add_dependency("JOBID", sbatch)))
        if submission.every:
            name, colon, words = what.partition(":")
            jobs.append((f"{name}@STEP{colon}{words}", resources.lower_priority(sbatch)))
    return "\n".join(
        f"# ---- {what}\n{batch_script.render(submission.run, what, sbatch, request.profile)}" for what, sbatch in jobs
    )


def submit(request: SubmissionRequest) -> list[Job]:
    """Submit what is missing of a training and its evaluations. Only one submission of a run takes place at a time.

    A run that ended early continues, with the current code; its evaluations that are still queued are submitted again.
    While the training is queued or running, or an evaluation of a finished run is, evaluations can be added.

    Returns:
        The new jobs, training first.

    Raises:
        ResumeError: The run was started with other values that its result depends on.
        SubmitError: SLURM refused; or jobs of the run are queued or running and were submitted with another recipe.
        HpcsslError: See ``submission.resolve_submission``.
    """
    if not request.local:
        scheduler.require_slurm()
    submission = resolve_submission(request)
    check_partitions(submission)
    return submit_resolved(submission)


def check_partitions(submission: Submission) -> None:
    """Check the options of a submission against the limits of its partitions (``partitions.check_limits``).

    Raises:
        ConfigError: A job could never start.
    """
    if not submission.request.local:
        for what, sbatch in submission.options.items():
            partitions.check_limits(sbatch, "" if what == job_log.TRAIN else "--eval-sbatch ")


def submit_resolved(submission: Submission, gpus: str | None = None) -> list[Job]:
    """Submit what is missing of a submission that has passed all checks; see ``submit``.

    Args:
        submission: The submission.
        gpus: ``CUDA_VISIBLE_DEVICES`` of local jobs; None to inherit it.
    """
    from hpcssl import run as runs  # imports torch, which the other commands do not wait for
    from hpcssl.preparation import branches
    from hpcssl.train.start.run_files import write_run_files

    run, request = submission.run, submission.request
    with job_log.submission_lock(run):
        permissions.secure_run_folder(run.root)
        identity.record_unrecorded_jobs(run)
        active = {job.what: job for job in control.active_jobs(run)}
        needs_training = not run.finished and job_log.TRAIN not in active
        submission = replace(submission, recipe=runs.resolve_for_run(submission.recipe, submission.shards, run))
        is_new = not run.config.exists()
        branches.write_branch(submission.branch, run)
        if submission.branch is not None and is_new:
            print_message(submission.branch.describe(), "hpcssl-submit")
        if needs_training or not active:
            write_run_files(run, submission.recipe, submission.shards)
        if needs_training:  # these depend on a training that did not succeed, or keep its code in use
            for job in active.values():
                control.cancel_job(run, job)
            active = {}
        if active:
            _refuse_change(submission, next(iter(active.values())))
        _write_plan(submission, keep=not needs_training)
        options = select_missing_jobs(submission, active, needs_training)
        concurrent = _select_missing_concurrent(submission, active)
        if not options and not concurrent:
            return []
        if not active:
            code_snapshot.create_snapshot(run)
        if request.allow_pipe:
            job_log.record_allowed_pipe(run, submission.recipe.data.train)
        parent = active.get(job_log.TRAIN)
        if request.local:
            jobs = local.launch(run, options, gpus) if options else []
        else:
            jobs = _submit_to_slurm(run, options, request.profile, parent.id if parent else None)
        # a running training submits due evaluations itself; it does not submit again those that have failed
        due = [] if run.finished else evaluations.due_requests(run)
        return jobs + concurrent_evals.submit_requests(run, [r for r in concurrent if r not in due])


def _refuse_change(submission: Submission, job: Job) -> None:
    """Raise ``SubmitError`` if a job that is queued or running was submitted with another recipe, or elsewhere."""
    from hpcssl.train import recipe as recipes

    run, request = submission.run, submission.request
    stored = recipes.read(run.config)
    changed = [
        name
        for name in config.differing(config.as_dict(submission.recipe), config.as_dict(stored))
        if not (run.finished and name.startswith("machine."))  # the training that would read them is over
    ]
    if not changed and job.kind == request.kind:
        return
    if changed:
        got = f"other values of {', '.join(changed)}"
    else:
        got = f"a submission {'with' if request.local else 'without'} --local"
    raise SubmitError(
        f"run {run.root}",
        got=f"{got}, while job {job.id} ({job.what}) is queued or running",
        expected="no job of this run in the queue, or the same command",
        fix=f"wait for the job (hpcssl-submit status {run.root}), or cancel it",
    )


def _write_plan(submission: Submission, keep: bool) -> None:
    """Store which concurrent evaluations the training submits. ``keep``: in addition to those of the stored plan."""
    run, request = submission.run, submission.request
    entries = evaluations.read_plan(run)["entries"] if keep else {}
    for what, sbatch in submission.options.items():
        if what != job_log.TRAIN and submission.every:
            entries[what] = {"every": submission.every, "sbatch": resources.lower_priority(sbatch)}
    profile = replace(request.profile, python=request.profile.python or sys.executable)
    if entries or run.chain.exists():
        evaluations.write_plan(run, entries, last=submission.last, kind=request.kind, profile=profile)


def select_missing_jobs(
    submission: Submission, active: dict[str, Job], needs_training: bool
) -> dict[str, SbatchOptions]:
    """Return the options of sbatch of the jobs to submit: the training, and evaluations of its last weights.

    Args:
        submission: The submission.
        active: The queued and running jobs of the run, by ``what``.
        needs_training: Whether the training is to be submitted.
    """
    selected = {}
    for what, sbatch in submission.options.items():
        if what == job_log.TRAIN:
            is_missing = needs_training
        elif what in active:
            is_missing = False
        else:
            evaluation = submission.evaluations[what]
            is_missing = not submission.run.finished or _has_missing_rows(
                submission.run, evaluation.request, evaluation
            )
        if is_missing:
            selected[what] = sbatch
    return selected


def _select_missing_concurrent(submission: Submission, active: dict[str, Job]) -> list[EvalRequest]:
    """Concurrent evaluations of this submission whose weights exist, without a job and without a row."""
    if not submission.every:
        return []
    return [
        request
        for request in evaluations.concurrent_requests(submission.run)
        if (evaluation := submission.evaluations.get(str(request.for_last_weights))) is not None
        and str(request) not in active
        and _has_missing_rows(submission.run, request, evaluation)
    ]


def _has_missing_rows(run: RunDir, request: EvalRequest, evaluation: ResolvedEvaluation) -> bool:
    """Whether a result row that the job of this evaluation would compute does not exist yet."""
    from hpcssl.evals.run import missing_weights

    step = "last" if request.step is None else request.step
    return bool(missing_weights(request.name, run, step=step, resolved=(evaluation.options, evaluation.sets)))


def _submit_to_slurm(
    run: RunDir, options: dict[str, SbatchOptions], profile: profiles.Profile, parent: str | None = None
) -> list[Job]:
    """Submit jobs, the evaluations depending on the training. If one is refused, the others are cancelled.

    ``parent``: id of the training's job if it was submitted before.
    """
    jobs: list[Job] = []
    for what, sbatch in options.items():
        if parent is not None:
            sbatch = resources.add_dependency(parent, sbatch)
        try:
            avoided = avoidance.find_nodes(run, what, options=sbatch)
            job_id = batch_script.submit(run, what, sbatch, profile, avoided=avoided)
        except SubmitError:
            for job in jobs:
                try:
                    control.cancel_job(run, job)
                except SubmitError as refusal:  # what sbatch has said is raised
                    print_message(f"job {job.id} ({job.what}) of this submission stays in the queue: {refusal}")
            raise
        jobs.append(job_log.latest_jobs(run)[what])
        parent = job_id if what == job_log.TRAIN else parent
    return jobs
