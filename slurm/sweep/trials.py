"""The trials of a search: reads what their runs have reached, asks the sampler for new ones, and submits them.

Everything is in the folder: the study's journal has the trials, and the run folders have the jobs. A pass reads both
again under the lock of the folder, so that a command may be killed at any point and run again, or run twice at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hpcssl.errors import ConfigError, DataError, EvalError, SubmitError, WorldError
from hpcssl.run_dir import RunDir
from slurm import submit as submitting
from slurm.backend import scheduler
from slurm.backend.scheduler import JobState
from slurm.log import attempts, job_log, retry
from slurm.log.job_log import Job
from slurm.manage import control, lanes, status
from slurm.manage.queue_snapshot import QueueSnapshot
from slurm.submission import Submission
from slurm.sweep import many
from slurm.sweep.folder import open_folder
from slurm.sweep.search import SearchPlan
from slurm.sweep.study import COMPLETE, RUNNING, Study, Trial

ReportJobs = Callable[[RunDir, list[Job]], None]


@dataclass(frozen=True)
class RunJobs:
    """The jobs of one run.

    Attributes:
        run: The run folder.
        states: The newest job of the training and of each evaluation with its state, by ``what``.
    """

    run: RunDir
    states: dict[str, tuple[Job, JobState]]

    @property
    def active(self) -> list[Job]:
        """The jobs that are queued or running, or whose state is unknown."""
        return [job for job, state in self.states.values() if state.is_active or state.name == "UNKNOWN"]

    @property
    def unknown(self) -> str:
        """Why SLURM did not answer; empty if it did."""
        return next((state.hint for _, state in self.states.values() if state.name == "UNKNOWN"), "")


@dataclass(frozen=True)
class Progress:
    """What a pass has found and done.

    Attributes:
        trials: All trials.
        is_complete: Whether no trial is to be added any more.
        has_active_jobs: Whether a job of a run is queued or running.
        has_changed: Whether a job was submitted, or a trial has ended.
    """

    trials: list[Trial]
    is_complete: bool
    has_active_jobs: bool
    has_changed: bool

    @property
    def open_trials(self) -> list[Trial]:
        """The trials whose result is missing."""
        return [trial for trial in self.trials if trial.state == RUNNING]

    @property
    def best(self) -> Trial | None:
        """The complete trial with the largest score; of several the first one."""
        complete = [trial for trial in self.trials if trial.state == COMPLETE]
        return max(complete, key=lambda trial: trial.score or 0.0, default=None)

    @property
    def is_over(self) -> bool:
        """Whether everything is done, or nothing goes on without a new command."""
        is_done = self.is_complete and not self.open_trials
        return not self.has_active_jobs and (is_done or not self.has_changed)


class TrialRunner:
    """Runs the trials of a search. What it remembers only saves work.

    Args:
        plan: The search.
        write: Called with a line for each trial that has ended.
        report_jobs: Called with each run that got jobs.
    """

    def __init__(self, plan: SearchPlan, write: Callable[[str], None], report_jobs: ReportJobs):
        self.plan, self._write, self._report_jobs = plan, write, report_jobs
        self._submissions: dict[int, Submission] = {}
        self._seen: set[int] = set()  # one command submits a run once: a run that ends early without a crash is odd
        self._idle: set[int] = set()  # trials that have ended, without a job
        self._is_first, self._is_exhausted, self._has_changed = True, False, False

    def advance(self) -> Progress:
        """Make one pass: end trials whose result is there, submit what is missing, and add new trials.

        Raises:
            SubmitError: SLURM refused a job, or the journal is damaged. The same command continues.
            ConfigError: Another command has taken the folder.
        """
        plan, self._has_changed = self.plan, False
        if self._is_first:
            if not plan.corners[0].request.local:
                scheduler.require_slurm()
            submitting.check_partitions(plan.corners[0])
        with open_folder(plan.root, plan.definition):
            study = Study(plan.root, plan.axes, plan.options.sampler, plan.options.seed)
            by_trial = self._query_jobs(study.trials())
            for trial in study.trials():
                if trial.state == RUNNING:
                    self._update(study, trial, by_trial[trial.number])
            if not any(jobs.unknown for jobs in by_trial.values()):
                self._submit(study, by_trial)
            trials = study.trials()
        self._is_first = False
        has_active_jobs = any(jobs.active for jobs in by_trial.values())
        is_complete = self._is_exhausted or len(trials) >= plan.options.trials
        return Progress(trials, is_complete, has_active_jobs, self._has_changed)

    def resolve(self, trial: Trial) -> Submission:
        """Return the submission of a trial's run. Raises ``HpcsslError``, see ``submission.resolve_submission``."""
        if trial.number not in self._submissions:
            self._submissions[trial.number] = self.plan.resolve_trial(trial)
        return self._submissions[trial.number]

    def _query_jobs(self, trials: list[Trial]) -> dict[int, RunJobs]:
        """The jobs of all runs that may have some, by one call of squeue (per cluster)."""
        runs = {t.number: RunDir(self.plan.root / t.name) for t in trials if t.number not in self._idle}
        if self._is_first:
            for run in runs.values():
                many.record_unrecorded_jobs(run)
        latest = {number: job_log.latest_jobs(run) for number, run in runs.items()}
        queue = QueueSnapshot(job for jobs in latest.values() for job in jobs.values())
        by_trial = {
            number: RunJobs(run, {w: (job, status.query_job(run, job, queue)) for w, job in latest[number].items()})
            for number, run in runs.items()
        }
        self._idle |= {
            t.number for t in trials if t.state != RUNNING and t.number in runs and not by_trial[t.number].active
        }
        return by_trial

    # -- what runs have reached -----------------------------------------------------------------------------

    def _update(self, study: Study, trial: Trial, jobs: RunJobs) -> None:
        """End a trial whose result is known. The states of its jobs were read before its files are."""
        if trial.is_to_be_pruned:
            self._prune(study, trial, jobs)
            return
        objective, is_finished = self.plan.objective, jobs.run.finished is not None
        is_behind = bool(objective.pruning) and self._report(study, trial, jobs.run)
        score = objective.read_score(jobs.run)
        if score is not None and math.isfinite(score):
            study.complete(trial.number, score)
            self._end(f"{_describe(trial)}: {objective.column} {score:.2f}")
            return
        job, state = jobs.states.get(objective.what if is_finished else job_log.TRAIN, (None, JobState("NONE")))
        if job is not None and job in jobs.active:
            if self.plan.options.prune and is_behind and not is_finished:
                study.request_pruning(trial.number)
                self._prune(study, trial, jobs)
        elif reason := _explain_failure(jobs.run, job, state) or (
            f"no score {objective.column}" if is_finished and (not objective.what or state.name == "COMPLETED") else ""
        ):
            study.fail(trial.number, reason)
            self._end(f"{_describe(trial)}: failed: {reason}")

    def _report(self, study: Study, trial: Trial, run: RunDir) -> bool:
        """Store new scores of the online k-NN, and return whether the newest one has fallen behind."""
        scores, is_behind = self.plan.objective.read_intermediate(run), False
        if not scores:
            return False
        submission = self.resolve(trial)
        steps_per_epoch = len(submission.shards) // submission.recipe.optim.batch
        for step, score in scores.items():
            epoch = step // steps_per_epoch  # the batch, and so the number of steps, may differ between trials
            if epoch not in trial.reported:
                is_behind = study.report(trial.number, epoch, score)
        return is_behind

    def _prune(self, study: Study, trial: Trial, jobs: RunJobs) -> None:
        if jobs.active:
            try:
                control.cancel(jobs.run)
            except SubmitError:
                if control.active_jobs(jobs.run):
                    raise
        study.prune(trial.number)
        self._end(f"{_describe(trial)}: pruned")

    def _end(self, text: str) -> None:
        self._has_changed = True
        self._write(text)

    # -- what is missing ------------------------------------------------------------------------------------

    def _submit(self, study: Study, by_trial: dict[int, RunJobs]) -> None:
        """Submit what is missing of the trials that are there, and add trials up to the limit."""
        trials = study.trials()
        active = [lanes.describe_active(jobs.run, jobs.active) for jobs in by_trial.values()]
        gpus = many.split_gpus(self.plan.corners[0], self.plan.limit)
        line_up = lanes.Lanes([run for run in active if run is not None], self.plan.limit, gpus)
        for trial in trials:
            # complete ones lack what was added to --evals
            if trial.state in (RUNNING, COMPLETE) and trial.number not in self._seen:
                self._submit_trial(trial, self.resolve(trial), line_up)
        count = len([trial for trial in trials if trial.state == RUNNING])
        while count < self.plan.limit and len(study.trials()) < self.plan.options.trials:
            added = self._add(study)
            if added is None:
                break
            if added.state == RUNNING:
                self._submit_trial(added, self.resolve(added), line_up)
                count += 1

    def _submit_trial(self, trial: Trial, submission: Submission, line_up: lanes.Lanes) -> None:
        self._seen.add(trial.number)
        state = many.query_run(submission)
        if trial.state == COMPLETE and state.needs_training:
            return  # its folder was removed: the score is known
        jobs = many.submit_run(state, line_up) if state.missing else []
        if jobs:
            self._idle.discard(trial.number)
            self._has_changed = True
            self._report_jobs(submission.run, jobs)

    def _add(self, study: Study) -> Trial | None:
        """Add a trial. One whose values no run can have fails at once. None if every point was tried."""
        point = study.propose()
        if point is None:
            self._is_exhausted = True
            self._write("no new point was found: the search ends here")
            return None
        proposed = Trial(len(study.trials()), RUNNING, point)
        try:
            self._submissions[proposed.number] = self.plan.resolve_trial(proposed)
        except (ConfigError, DataError, EvalError, WorldError) as error:
            trial = study.add(point, failed=str(error))
            self._end(f"{_describe(trial)}: failed: {error}")
            return trial
        return study.add(point)


def _describe(trial: Trial) -> str:
    return f"trial {trial.number} ({' '.join(trial.values)})"


def _explain_failure(run: RunDir, job: Job | None, state: JobState) -> str:
    """Why a job that has ended gets no other one; empty if a new one would continue it, as after a lost node."""
    if job is None or state.name == "COMPLETED":
        return ""
    history = attempts.read_attempts(run, job.what)
    if job_log.is_cancelled(run, job.id) or (history and history[-1].cause == "cancelled"):
        return f"job {job.id} was cancelled"
    decision = retry.decide_retry(history)
    return "" if decision.retry or history[-1].cause == "done" else f"job {job.id}: {decision.reason}"
