"""A sweep whose points a sampler chooses: what it proposes, what is submitted once, and what a finished run changes."""

from __future__ import annotations

import itertools
import os

import pytest

from hpcssl import files
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE, ConfigError, SubmitError
from hpcssl.results.command import render_records
from hpcssl.results.records import collect_records
from hpcssl.run_dir import RunDir
from slurm.log import job_log
from slurm.manage import control
from slurm.sweep import grid, many, space, study
from slurm.sweep.space import Axis
from slurm.sweep.study import COMPLETE, FAILED, PRUNED, RUNNING
from tests.printed import numbers_in, printed_error

pytest.importorskip("optuna")

LR = Axis("optim.lr", "0.01..1.0:log", low=0.01, high=1.0, log=True)
BATCH = Axis("optim.batch", "64,128", choices=("64", "128"))
K = Axis("method.k", "1..5", low=1, high=5, is_int=True)

# -- the space ------------------------------------------------------------------------------------------------------


def parse(*words, **defaults):
    return space.parse_space(words, lambda shared, key: defaults.get(key))


def test_ranges_and_lists_become_axes_and_other_values_are_shared():
    words = ["optim.lr=0.01..1.0:log", "data.train=../digits", "optim.batch=64,128", "method.k=1..5", "seed=3"]
    shared, axes = parse(*words)
    assert shared == ["data.train=../digits", "seed=3"]
    assert axes == [LR, BATCH, K]
    assert [axis.size for axis in axes] == [float("inf"), 2, 5]
    assert space.count_points(axes) == float("inf") and space.count_points([BATCH, K]) == 10


def test_the_recipe_says_whether_a_range_is_one_of_integers():
    assert parse("x=0..1", x=0.5)[1] == [Axis("x", "0..1", low=0, high=1)]
    assert parse("x=0..1", x=3)[1][0].is_int and parse("x=0..1")[1][0].is_int
    assert not parse("x=-1e-3..1")[1][0].is_int


@pytest.mark.parametrize(
    ("word", "got"),
    [
        ("x=1.0..0.1", "empty"),
        ("x=1..1", "single"),
        ("x=0..1:log", "logarithmic"),
        ("x=-1.0..1.0:log", "logarithmic"),
        ("x=0.1..b", "0.1..b"),
        ("x=0.1..1:lin", ":lin"),
        ("n=0.5..2", "0.5..2"),
        ("x=1..1e999", "1e999"),
        ("x=1,,2", "empty"),
        ("x=3", "no key"),
    ],
)
def test_an_invalid_space_is_refused(word, got):
    with pytest.raises(ConfigError) as caught:
        parse(word, n=4)
    assert got in caught.value.got and caught.value.fix


def test_real_ranges_without_a_sampler_are_refused():
    for word in ("optim.lr=0.1..1.0", "seed=1..4:log"):
        with pytest.raises(ConfigError) as caught:
            grid.parse_grid([word])
        assert "--sampler" in caught.value.fix


def test_values_are_short_and_stay_in_their_range():
    assert LR.format(0.0316227766) == "0.03162" and LR.format(1.0) == "1.0"
    assert Axis("x", "", low=0.00123456, high=0.9999999).format(0.99999999) == "0.9999999"
    assert Axis("x", "", low=0.00123456, high=1).format(0.00123457) == "0.001235"
    assert K.format(3.0) == "3" and BATCH.format("64") == "64"
    assert space.name_trial(7, {"optim.lr": "0.03162", "model.norm": "[a,b]"}) == "trial-0007_lr=0.03162_norm=a-b"


def test_corners_cover_every_end():
    assert len(space.list_corners([LR, BATCH, K])) == 8
    four = space.list_corners([LR, BATCH, K, Axis("y", "", choices=("a", "b", "c"))])
    assert {value for point in four for value in point.values()} == {"0.01", "1.0", "64", "128", "1", "5", *"abc"}


# -- the study ------------------------------------------------------------------------------------------------------


def open_study(folder, axes=(LR, BATCH, K), sampler="tpe", seed=0):
    return study.Study(folder, axes, sampler, seed)


def score_of(point):
    return 50 + 10 * float(point["optim.lr"]) + int(point["method.k"])


def run_trials(folder, count, *, sampler="tpe", interrupted=False):
    """Propose and end trials one by one; ``interrupted``: by a new command for each step, which is repeated."""
    opened = open_study(folder, sampler=sampler)
    for number in range(count):
        for _ in range(1 + interrupted):
            opened = open_study(folder, sampler=sampler) if interrupted else opened
            point = opened.propose()
        assert opened.add(point).number == number
        opened = open_study(folder, sampler=sampler) if interrupted else opened
        opened.complete(number, score_of(point))
    return opened.trials()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_proposes_the_same_after_interruptions(tmp_path, sampler):
    folders = [tmp_path / name for name in ("plain", "interrupted")]
    for folder in folders:
        folder.mkdir()
    plain, interrupted = (run_trials(f, 14, sampler=sampler, interrupted=k) for k, f in enumerate(folders))
    assert plain == interrupted and len({trial.name for trial in plain}) == 14
    assert all(trial.state == COMPLETE and trial.score == score_of(trial.point) for trial in plain)
    other = open_study(folders[0], sampler=sampler, seed=1)
    assert other.propose() != open_study(folders[0], sampler=sampler).propose()


def test_a_sampler_learns_from_the_scores(tmp_path):
    trials = run_trials(tmp_path, 30)
    first, last = ([float(t.point["optim.lr"]) for t in part] for part in (trials[:10], trials[20:]))
    assert sum(last) / 10 > 1.5 * sum(first) / 10


def test_no_point_is_proposed_twice_and_a_space_ends(tmp_path):
    opened = open_study(tmp_path, axes=(BATCH, K))
    points = []
    while (point := opened.propose()) is not None:
        points.append(point)
        trial = opened.add(point)
        opened.complete(trial.number, 90.0 if point["method.k"] == "1" else 10.0)
    assert len(points) == 10 and len({tuple(point.values()) for point in points}) == 10
    narrow = Axis("x", "", low=0.1, high=0.10001)  # two values of four digits
    (tmp_path / "narrow").mkdir()
    opened = open_study(tmp_path / "narrow", axes=(narrow,))
    while (point := opened.propose()) is not None:
        opened.add(point)
    assert 1 <= len(opened.trials()) <= 2


def test_a_torn_line_is_removed_and_damage_is_refused(tmp_path):
    trials = run_trials(tmp_path, 3)
    path = tmp_path / study.FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"worker')
    assert study.read_trials(tmp_path, (LR, BATCH, K)) == trials
    opened = open_study(tmp_path)
    assert opened.trials() == trials
    opened.add(opened.propose())
    assert len(open_study(tmp_path).trials()) == 4
    path.write_bytes(b"x" + whole)
    with pytest.raises(SubmitError) as caught:
        open_study(tmp_path)
    assert caught.value.what == f"study {path}" and caught.value.fix


def test_nothing_is_written_where_only_is_read(tmp_path):
    assert study.read_trials(tmp_path, (LR,)) == [] and not list(tmp_path.iterdir())
    (tmp_path / study.FILE).touch()
    assert study.read_trials(tmp_path, (LR,)) == []
    (tmp_path / study.FILE).unlink()
    run_trials(tmp_path, 2)
    before = (tmp_path / study.FILE).read_bytes()
    assert len(study.read_trials(tmp_path, (LR, BATCH, K))) == 2
    assert (tmp_path / study.FILE).read_bytes() == before


def test_a_trial_that_falls_behind_the_median_is_reported(tmp_path):
    opened = open_study(tmp_path, axes=(LR,))
    for number in range(5):
        opened.add(opened.propose())
        assert not opened.report(number, 2, 80.0 + number)
        opened.complete(number, 90.0)
    opened.add(opened.propose())
    opened.add(opened.propose())
    assert opened.report(5, 2, 70.0) and not opened.report(6, 2, 83.0)
    opened.request_pruning(5)
    assert open_study(tmp_path, axes=(LR,)).trials()[5].is_to_be_pruned
    opened.prune(5)
    opened.fail(6, "a reason")
    states = [(trial.state, trial.reason) for trial in open_study(tmp_path, axes=(LR,)).trials()[5:]]
    assert states == [(PRUNED, ""), (FAILED, "a reason")]


# -- the command, with programs in place of SLURM's -----------------------------------------------------------------

VALUES = ["optim.lr=0.01..1.0:log", "schedule.epochs=3", "evals.knn_every_epochs=1"]
SEARCH = ["sweep", "digits_msf", "--out", "out", "--sampler=random", "--trials=3", "--parallel=2", *VALUES]
STEPS = 33  # of three epochs of the 1,437 digits for training, by 128


@pytest.fixture
def trials(tmp_path):
    """``trials()``: those of the folder of the command, by number."""
    return lambda: study.read_trials(tmp_path / "out", [LR])


@pytest.fixture
def run_of(tmp_path):
    """``run_of(trial)``: its run folder."""
    return lambda trial: RunDir(tmp_path / "out" / trial.name)


def write_score(run, step, score):
    """A result row as the online k-NN writes it."""
    texts = ("weights_sha256", "fingerprint", "method", "arch", "train", "val", "commit", "time")
    metrics = {"knn1": score - 1.0, "knn20": score}
    row = {"eval": "knn", "identity": str(step), "step": step, "options": {"protocol": "msf"}, "metrics": metrics}
    files.append_line(run.eval_rows("knn"), row | dict.fromkeys(texts, "x"))


def finish(run, queue, score):
    """End the job of a run, and its training with this score."""
    write_score(run, STEPS, score)
    files.write_record(run.done, {"step": STEPS, "weights": ""})
    queue.remove(job_log.latest_jobs(run)["train"].id)


def crash(run, queue):
    """End the job of a run by two crashes at the same step."""
    job = job_log.latest_jobs(run)["train"].id
    for number in (1, 2):
        about = {"attempt": number, "job": job, "restart": number - 1, "launch": 0, "host": "n1"}
        files.append_line(run.attempts, {**about, "event": "start", "first_step": 0, "time": 1.0})
        files.append_line(run.attempts, {**about, "event": "end", "cause": "error", "last_step": 5, "why": "no memory"})
    queue.remove(job)


def test_trials_are_submitted_up_to_the_limit_and_continued_by_the_same_command(call, queue, trials, run_of):
    code, out, err = call(*SEARCH)
    assert (code, err) == (EXIT_DONE, "")
    lines = out.splitlines()
    assert numbers_in(lines[0]) == [3, 0, 0, 0, 0, 3] and numbers_in(lines[1])[0] == 3
    assert numbers_in(lines[2]) == [3, 0] and "unknown" in lines[3] and "20-NN" in out
    assert queue.jobs == ["7", "8"] and out.count("Submitted") == 2
    first, second = trials()
    assert first.state == second.state == RUNNING and first.name.startswith("trial-0000_lr=")
    recipe = run_of(first).config.read_text()
    assert f"lr: {first.point['optim.lr']}\n" in recipe, "the folder shows the value that is run"
    code, out, err = call(*SEARCH)
    assert code == EXIT_DONE and "nothing to submit" in err and "Submitted" not in out and len(queue.jobs) == 2

    finish(run_of(first), queue, 81.5)
    code, out, err = call(*SEARCH)
    assert (code, err) == (EXIT_DONE, "") and "81.50" in out and queue.jobs == ["8", "9"]
    assert [(trial.state, trial.score) for trial in trials()] == [(COMPLETE, 81.5), (RUNNING, None), (RUNNING, None)]
    finish(run_of(second), queue, 91.25)
    finish(run_of(trials()[2]), queue, 90.0)
    code, out, _ = call(*SEARCH)
    assert out.splitlines()[-1].startswith("best: trial 1,") and queue.jobs == []
    assert call(*SEARCH, "--trials=4")[0] == EXIT_DONE and len(queue.jobs) == 1, "trials may be added"


def test_a_kill_between_the_proposal_and_its_job_loses_no_trial(call, queue, trials, run_of, monkeypatch):
    submit, proposed = many.submit_run, []

    def interrupt(state, line_up):
        proposed.append(state.submission.run.root.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(many, "submit_run", interrupt)
    assert call(*SEARCH)[0] == EXIT_STOPPED and queue.jobs == []
    assert [trial.name for trial in trials()] == proposed and not run_of(trials()[0]).root.exists()
    monkeypatch.setattr(many, "submit_run", submit)
    assert call(*SEARCH)[0] == EXIT_DONE and len(queue.jobs) == 2
    assert [trial.name for trial in trials()][:1] == proposed and len(trials()) == 2
    assert all("train" in job_log.latest_jobs(run_of(trial)) for trial in trials())


@pytest.mark.parametrize("moment", [n if n % 6 == 2 else pytest.param(n, marks=pytest.mark.full) for n in range(1, 41)])
def test_a_kill_at_any_write_leaves_each_trial_with_one_job(call, queue, trials, run_of, monkeypatch, moment):
    sync, calls = os.fsync, itertools.count(1)

    def interrupt(descriptor):
        sync(descriptor)
        if next(calls) == moment:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    first = call(*SEARCH)[0]
    writes = next(calls) - 1
    monkeypatch.setattr(os, "fsync", sync)
    assert first == (EXIT_STOPPED if moment <= writes else EXIT_DONE) and writes < 41
    assert call(*SEARCH)[0] == EXIT_DONE
    assert [trial.number for trial in trials()] == [0, 1]
    assert [job_log.latest_jobs(run_of(trial))["train"].id for trial in trials()] == queue.jobs
    assert sorted(path.parent.name for path in run_of(trials()[0]).root.parent.glob("*/jobs.jsonl")) == sorted(
        trial.name for trial in trials()
    )
    finish(run_of(trials()[0]), queue, 81.5)
    assert call(*SEARCH)[0] == EXIT_DONE and len(trials()) == 3 and len(queue.jobs) == 2


def test_a_crashed_or_cancelled_run_is_a_failed_trial_and_a_lost_job_is_not(call, queue, trials, run_of):
    assert call(*SEARCH, "--parallel=3")[0] == EXIT_DONE
    crashed, cancelled, lost = trials()
    crash(run_of(crashed), queue)
    control.cancel(run_of(cancelled))
    queue.remove(job_log.latest_jobs(run_of(lost))["train"].id)
    code, out, _ = call(*SEARCH, "--parallel=3", "--trials=4")
    assert code == EXIT_DONE and out.count("failed: job") == 2
    states = [(trial.state, trial.name) for trial in trials()]
    assert states[:3] == [(FAILED, crashed.name), (FAILED, cancelled.name), (RUNNING, lost.name)]
    assert "no memory" in trials()[0].reason and "cancelled" in trials()[1].reason
    assert job_log.latest_jobs(run_of(lost))["train"].id == "10", "it is continued"
    assert queue.jobs == ["10", "11"] and len(trials()) == 4


def test_values_that_no_run_can_have_are_a_failed_trial(call, queue, trials, monkeypatch):
    resolve = many.resolve_run

    def refuse(request, limit):
        if "trial-0000" in request.run:
            raise ConfigError("a key", got="a value", expected="another", fix="change it")
        return resolve(request, limit)

    monkeypatch.setattr(many, "resolve_run", refuse)
    assert call(*SEARCH)[0] == EXIT_DONE and len(queue.jobs) == 2
    assert [trial.state for trial in trials()] == [FAILED, RUNNING, RUNNING] and "a key" in trials()[0].reason


def test_runs_that_fall_behind_are_cancelled(call, queue, trials, run_of, monkeypatch):
    words = [*SEARCH, "--parallel=6", "--trials=6", "--prune"]
    assert call(*words)[0] == EXIT_DONE
    for number, trial in enumerate(trials()):
        for epoch in (0, 1):
            write_score(run_of(trial), 11 * epoch, 20.0 if number == 5 else 60.0 + number)
        if number < 5:
            finish(run_of(trial), queue, 90.0)
    without = [word for word in words if word != "--prune"]
    assert call(*without)[0] == EXIT_DONE and len(queue.jobs) == 1, "only with --prune"
    write_score(run_of(trials()[5]), 22, 30.0)
    for trial in trials()[:5]:
        assert trial.reported == {1: 60.0 + trial.number, 3: 90.0}
    write_score(run_of(trials()[5]), 33, 31.0)
    prune = study.Study.prune
    monkeypatch.setattr(study.Study, "prune", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(*words)[0] == EXIT_STOPPED and queue.jobs == []
    assert trials()[5].state == RUNNING, "killed between the cancellation and its record"
    monkeypatch.setattr(study.Study, "prune", prune)
    assert call(*words)[0] == EXIT_DONE and queue.jobs == []
    assert [trial.state for trial in trials()] == [COMPLETE] * 5 + [PRUNED]


@pytest.mark.parametrize(
    ("typed", "what", "got", "fix"),
    [
        ("--sampler=tpe --trials=3 optim.rl=0.1..0.2", "recipe digits_msf, key optim.rl", "'rl'", "'lr'"),
        ("--sampler=tpe --trials=3 optim.lr=0.2..0.1", "sweep over optim.lr", "empty", "optim.lr=0.1..0.2"),
        ("--sampler=tpe --trials=3 optim.lr=0.0..0.1:log", "sweep over optim.lr", "logarithmic", ":log"),
        ("--sampler=tpa --trials=3 optim.lr=0.1..0.2", "option --sampler", "'tpa'", "'tpe'"),
        ("--sampler=tpe optim.lr=0.1..0.2", "sweep", "--trials", "--trials 20"),
        ("--trials=3 optim.lr=0.1..0.2", "sweep", "--sampler", "--sampler tpe"),
        ("--sampler=tpe --trials=3 seed=0,1", "option --trials", "3", "--trials 2"),
        ("--sampler=tpe --trials=3 optim.lr=0.1..0.2", "sweep with --sampler", "no evaluation", "--evals knn"),
        (
            "--sampler=tpe --trials=3 optim.lr=0.1..9 --evals=knn --objective=21-NN",
            "option --objective",
            "21-NN",
            "20-NN",
        ),
        (
            "--sampler=tpe --trials=3 optim.lr=0.1..9 --evals=knn --prune",
            "option --prune",
            "online",
            "knn_every_epochs",
        ),
        ("--sampler=tpe --trials=3 optim.lr=-1.0..9 --evals=knn", "optim.lr", "-1.0", ""),
    ],
)
def test_bad_input_is_refused_before_anything_is_created(refused_sweep, typed, what, got, fix):
    error = refused_sweep(*typed.split())
    assert error.what == what and got in error.got and fix in error.fix


def test_without_optuna_the_message_names_the_extra(call, queue, tmp_path, monkeypatch):
    monkeypatch.setattr("slurm.sweep.study.importlib.util.find_spec", lambda name: None)
    code, _, err = call(*SEARCH)
    assert code == EXIT_USAGE and "hpcssl[sweep]" in printed_error(err).fix and not (tmp_path / "out").exists()
    monkeypatch.undo()


def test_trials_below_one_are_refused_and_a_dry_run_writes_nothing(call, queue, tmp_path):
    code, _, err = call(*SEARCH, "--trials=0")
    assert code == EXIT_USAGE and "--trials" in err and len(err.splitlines()) == 1
    code, out, err = call(*SEARCH, "--dry-run", "--step-seconds=3.6")
    assert (code, err) == (EXIT_DONE, "") and not (tmp_path / "out").exists() and queue.jobs == []
    assert "99 steps" in out and "0.099" in out, "three runs of 33 steps of 3.6 s"


def test_the_folder_of_another_search_is_refused(call, queue, trials):
    assert call(*SEARCH)[0] == EXIT_DONE
    for change in ("--sampler=tpe", "--sampler-seed=1", "--objective=1-NN", "optim.momentum=0.8", "seed=0..3"):
        code, _, err = call(*SEARCH, change)
        assert code == EXIT_USAGE and printed_error(err).what.startswith("folder "), change
    code, _, err = call("sweep", "digits_msf", "--out", "out", "seed=0,1", "schedule.epochs=3")
    assert code == EXIT_USAGE and "search" in printed_error(err).got
    assert len(queue.jobs) == len(trials()) == 2


# -- local runs -----------------------------------------------------------------------------------------------------


def test_a_local_search_ends_with_a_table_of_its_trials(call, tmp_path, trials, run_of):
    words = ["sweep", "digits_msf", "--out", "out", "--sampler=tpe", "--trials=2", "--parallel=2", "--local", "--wait"]
    values = ["optim.lr=0.01..1.0:log", "schedule.epochs=1", "evals.knn_every_epochs=1", "machine.devices=cpu"]
    code, out, _ = call(*words, *values)
    assert code == EXIT_DONE and [trial.state for trial in trials()] == [COMPLETE, COMPLETE]
    best = max(trials(), key=lambda trial: trial.score)
    assert (
        out.splitlines()[-1] == f"best: trial {best.number}, 20-NN {best.score:.2f}, optim.lr={best.point['optim.lr']}"
    )
    records = [record for record in collect_records([tmp_path / "out"]) if record["newest"]]
    assert {record["run"]: record["metrics"]["20-NN"] for record in records} == {
        f"out/{trial.name}": trial.score for trial in trials()
    }
    assert [str(record["differs"]["optim.lr"]) for record in records] == [t.point["optim.lr"] for t in trials()]
    assert best.point["optim.lr"] in render_records(records)
    assert run_of(best).finished and call(*words, *values)[1].count("Submitted") == 0


# -- jobs on a cluster ----------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_a_search_on_a_cluster_scores_its_jobs_and_continues_with_more_trials(call, cluster, trials, run_of):
    values = ["optim.lr=0.01..1.0:log", "schedule.epochs=1", "evals.knn_every_epochs=1", "machine.devices=cpu"]
    words = ["sweep", "digits_msf", "--out", "out", "--sampler=tpe", "--parallel=2", "--wait"]
    assert call(*words, "--trials=2", *values)[0] == EXIT_DONE
    first = trials()
    code, out, _ = call(*words, "--trials=3", *values)
    assert code == EXIT_DONE and [trial.state for trial in trials()] == [COMPLETE] * 3
    assert trials()[:2] == first and out.count("Submitted batch job") == 1
    jobs = [job_log.latest_jobs(run_of(trial))["train"].id for trial in trials()]
    assert len(set(jobs)) == 3 and all(job.isdigit() for job in jobs)
    assert cluster("squeue", "-h", "-o", "%i").split() == []
