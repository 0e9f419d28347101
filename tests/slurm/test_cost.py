"""What a sweep will cost, compared with what its runs write and take."""

from types import SimpleNamespace

import pytest

from hpcssl import files
from hpcssl.run import compose
from hpcssl.run_dir import RunDir
from hpcssl.train.gpu_memory import estimate_saved_bytes
from slurm.log import job_log
from slurm.sweep import cost
from slurm.sweep.many import RunState

IMAGES = 100


def make_state(root, *overrides, local=True, **sbatch):
    """A run of 10 epochs of 6 steps that is to be trained."""
    recipe = compose(
        "digits_msf", ["data.train=shards", "data.val=shards", "optim.batch=16", "schedule.epochs=10", *overrides]
    )
    submission = SimpleNamespace(
        run=RunDir(root),
        recipe=recipe,
        shards=range(IMAGES),
        last=60,
        options={job_log.TRAIN: sbatch},
        request=SimpleNamespace(local=local),
    )
    return RunState(submission, [], [job_log.TRAIN])


def hours_line(estimate):
    return next(line for line in estimate.describe() if "hours" in line)


@pytest.mark.parametrize("export_epochs, knn_every_epochs", [(0, 0), (3, 0), (0, 4), (3, 4), (2, 4), (7, 11)])
def test_the_disk_holds_every_file_of_weights_that_the_training_exports(tmp_path, export_epochs, knn_every_epochs):
    values = f"machine.export_epochs={export_epochs}", f"evals.knn_every_epochs={knn_every_epochs}"
    state = make_state(tmp_path, *values, "machine.keep_checkpoints=2", "machine.keep_every_steps=0")
    due = [  # as the training loop decides; the first and the last step are exported in any case
        epoch
        for epoch in range(1, 11)
        if (export_epochs and epoch % export_epochs == 0) or (knn_every_epochs and epoch % knn_every_epochs == 0)
    ]
    checkpoint, weights = estimate_saved_bytes(state.submission.recipe, IMAGES)
    assert cost.estimate_disk(state.submission) == 3 * checkpoint + (2 + len(due)) * weights


def test_hours_are_those_of_the_steps_that_are_left(tmp_path):
    estimate = cost.estimate([make_state(tmp_path / "a"), make_state(tmp_path / "b")], 30.0)
    assert estimate.device_hours == pytest.approx(2 * 60 * 30 / 3600) and "as given" in hours_line(estimate)
    journal = {"step": 20, "total_step_s": 30.0, "total_data_s": 10.0}
    files.append_line(RunDir(tmp_path / "a").journal, journal)
    measured = cost.estimate([make_state(tmp_path / "a"), make_state(tmp_path / "b")], None)
    assert measured.device_hours == pytest.approx((40 + 60) * 2 / 3600), "b takes 2 s per step, as a has measured"


def test_unknown_hours_say_what_is_unknown(tmp_path):
    estimate = cost.estimate([make_state(tmp_path / "a")], None)
    assert estimate.device_hours is None and "measured in a " in hours_line(estimate)
    assert "--step-seconds" in hours_line(estimate)
    chosen = cost.estimate([make_state(tmp_path / "a", local=False, ntasks="4")], 1.0)
    assert chosen.device_hours is None and "--ntasks-per-node" in hours_line(chosen)
    assert "--step-seconds" not in hours_line(chosen)
