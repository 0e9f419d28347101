"""What many runs will cost, before any is submitted: jobs, hours and disk space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hpcssl.errors import format_bytes
from hpcssl.run_dir import RunDir
from hpcssl.storage.records import RecordError, parse_record
from hpcssl.storage.tail import read_backward
from hpcssl.timing.phase_clock import COLUMNS
from slurm.backend import resources
from slurm.log import job_log
from slurm.manage import status
from slurm.submission import Submission
from slurm.sweep.many import RunState


@dataclass(frozen=True)
class Cost:
    """What is to be submitted, and what it needs.

    Attributes:
        runs: Number of runs.
        finished: How many of their trainings are finished.
        active: How many trainings are queued or running.
        trainings: Number of trainings to submit.
        evaluations: Number of evaluation jobs to submit.
        steps: Steps that are left in trainings that are not finished.
        device_hours: Hours times GPUs, or times processes if no GPUs are requested; None if they are unknown.
        device: ``GPU`` or ``process``.
        basis: Where the seconds per step are from, or why the hours are unknown.
        disk_bytes: Bytes of the checkpoints and weights of the trainings to submit.
    """

    runs: int
    finished: int
    active: int
    trainings: int
    evaluations: int
    steps: int
    device_hours: float | None
    device: str
    basis: str
    disk_bytes: int

    def describe(self) -> list[str]:
        """Return the cost as lines of ``name: value``."""
        jobs = f"{self.trainings} trainings and {self.evaluations} evaluations to submit"
        if self.device_hours is None:
            hours = f"unknown, since {self.basis}"
        else:
            hours = f"{self.device_hours:.3g} for {self.steps:,} steps, without evaluations ({self.basis})"
        return [
            f"runs: {self.runs} ({self.finished} finished, {self.active} queued or running)",
            f"jobs: {jobs}",
            f"{self.device} hours: {hours}",
            f"disk: about {format_bytes(self.disk_bytes)} for new runs" if self.trainings else "disk: no new run",
        ]


def estimate(states: Sequence[RunState], step_s: float | None) -> Cost:
    """Estimate the cost of what is missing.

    A run's seconds per step are those that it has measured itself, or else the mean of the runs beside it with the
    same recipe name, network, image size and batch.

    Args:
        states: The runs.
        step_s: Seconds per step that the user gives; None to use what was measured.
    """
    measured = {state.submission.run: _measure_step(state.submission.run) for state in states}
    by_kind: dict[tuple[object, ...], list[float]] = {}
    for state in states:
        if (own := measured[state.submission.run]) is not None:
            by_kind.setdefault(_describe_kind(state.submission), []).append(own)
    hours, steps, unknown = 0.0, 0, ""
    for state in states:
        submission = state.submission
        if submission.run.finished:
            continue
        left = max(0, submission.last - status.current_step(submission.run))
        steps += left
        known = by_kind.get(_describe_kind(submission), [])
        own = measured[submission.run] if measured[submission.run] is not None else fmean(known) if known else None
        seconds, devices = step_s if step_s is not None else own, count_devices(submission)
        if seconds is None:
            name = submission.run.root.name
            unknown = f"no step was measured in {name} (--step-seconds gives what `hpcssl train --dry-run` measures)"
        elif devices is None:
            unknown = "SLURM chooses the number of processes (--nodes and --ntasks-per-node state it)"
        else:
            hours += left * seconds * devices / 3600
    count = sum(len(values) for values in by_kind.values())
    first = states[0].submission
    basis = f"{step_s:g} s per step, as given" if step_s is not None else f"measured in {count} of these runs"
    return Cost(
        runs=len(states),
        finished=sum(state.submission.run.finished is not None for state in states),
        active=sum(any(job.what == job_log.TRAIN for job in state.jobs) for state in states),
        trainings=sum(state.needs_training for state in states),
        evaluations=sum(len(state.missing) - state.needs_training for state in states),
        steps=steps,
        device_hours=None if unknown else hours,
        device="GPU" if resources.count_gpus_per_node(first.options[job_log.TRAIN]) else "process",
        basis=unknown or basis,
        disk_bytes=sum(estimate_disk(state.submission) for state in states if state.needs_training),
    )


def count_devices(submission: Submission) -> int | None:
    """Return the GPUs of a training, or its processes if it requests none; None if SLURM chooses their number."""
    train = submission.options[job_log.TRAIN]
    gpus = resources.count_gpus_per_node(train) * resources.count_nodes(train)
    if gpus:
        return gpus
    return resources.count_local_tasks(train) if submission.request.local else resources.count_processes(train)


def estimate_disk(submission: Submission) -> int:
    """Return the bytes that the checkpoints and exported weights of a training take at most at one time.

    One checkpoint more than is kept exists while it is written. Logs, features of evaluations and the code snapshot are
    not counted.
    """
    from hpcssl.train import gpu_memory

    recipe, steps = submission.recipe, submission.last
    state, weights = gpu_memory.estimate_saved_bytes(recipe, len(submission.shards))
    machine = recipe.machine
    checkpoints = machine.keep_checkpoints + 1
    checkpoints += steps // machine.keep_every_steps if machine.keep_every_steps else 0
    epochs = steps // (len(submission.shards) // recipe.optim.batch)
    periods = machine.export_epochs, recipe.evals.get("knn_every_epochs", 0)  # k-NN scores an exported file, too
    exports = 2 + len({epoch for every in periods if every for epoch in range(every, epochs + 1, every)})
    return state * checkpoints + weights * exports


def _describe_kind(submission: Submission) -> tuple[object, ...]:
    """What decides the seconds per step, together with the machine."""
    recipe = submission.recipe
    return recipe.name, recipe.model.arch, recipe.views.size, recipe.optim.batch, count_devices(submission)


def _measure_step(run: RunDir) -> float | None:
    """Seconds per step so far, waits for data included; None before the first record."""
    fields = {"step": int, COLUMNS["step"]: float}
    for _, line in read_backward(run.journal) if run.journal.exists() else ():
        try:
            record = parse_record(line, fields, {COLUMNS["data"]: float})
        except RecordError:
            continue
        if record["step"] > 0:
            return float((record[COLUMNS["step"]] + record.get(COLUMNS["data"], 0.0)) / record["step"])
    return None
