"""A submission resolves the recipe once and opens each shard index once, since an index may be remote and large."""

from collections import Counter

import pytest

from hpcssl.data.shards import ShardSet
from hpcssl.train import recipe as recipes
from slurm import submission, submit
from slurm.backend import batch_script, partitions, scheduler
from slurm.log import job_log


@pytest.fixture
def calls(monkeypatch):
    """How often a recipe was composed, and each shard index was opened, by folder."""
    counter = Counter()
    compose, open_set = recipes.compose, ShardSet.open.__func__

    def counted_compose(*args, **kwargs):
        counter["compose"] += 1
        return compose(*args, **kwargs)

    def counted_open(cls, root, *args, **kwargs):
        counter[str(root)] += 1
        return open_set(cls, root, *args, **kwargs)

    monkeypatch.setattr(recipes, "compose", counted_compose)
    monkeypatch.setattr(ShardSet, "open", classmethod(counted_open))
    return counter


@pytest.fixture
def make_request(digits, tmp_path):
    """``make_request(evals, **options)``: a submission of the digits."""

    def make(evals, **options):
        overrides = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", "schedule.epochs=3"]
        return submission.SubmissionRequest(
            run=str(tmp_path / "run"), recipe="digits_msf", overrides=overrides, evals=evals, **options
        )

    return make


@pytest.fixture
def fake_slurm(monkeypatch):
    """A scheduler that numbers jobs from 1 and starts none."""
    count = iter(range(1, 100))

    def submit_job(run, what, sbatch, profile, avoided=None):
        job = str(next(count))
        job_log.record_event(run, "submit", job, what=what, kind="slurm", options=sbatch)
        return job

    monkeypatch.setattr(batch_script, "submit", submit_job)
    monkeypatch.setattr(partitions, "check_limits", lambda *_: None)
    monkeypatch.setattr(scheduler, "require_slurm", lambda: None)
    monkeypatch.setattr(submit.code_snapshot, "create_snapshot", lambda run: None)


@pytest.mark.parametrize("every", [0, 1])
def test_a_first_submission_opens_each_set_once(calls, make_request, digits, fake_slurm, every):
    jobs = submit.submit(make_request("knn,linear:lr=1", eval_every=every))
    assert [job.what for job in jobs] == ["train", "knn", "linear:lr=1"]
    assert calls == {"compose": 1, str(digits / "train"): 1, str(digits / "val"): 1}


def test_a_dry_run_opens_shards_that_two_evaluations_share_once(calls, make_request, digits, tmp_path):
    (tmp_path / "other").symlink_to(digits / "val")
    other = tmp_path / "other"
    submit.render_scripts(make_request(f"knn:val={other},linear:lr=1:val={other}"))
    assert calls == {"compose": 1, str(digits / "train"): 1, str(digits / "val"): 1, str(other): 1}
    assert not (tmp_path / "run").exists()
