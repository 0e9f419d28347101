"""Many runs by one command: points, how many run at once, what is submitted again, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import pytest

from benchmarks import loopback
from hpcssl.api import Run as RunFolder
from hpcssl.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from hpcssl.files import read_lines
from hpcssl.results import command as results_command
from hpcssl.run_dir import RunDir
from slurm.backend import code_snapshot, local
from slurm.log import attempts, job_log
from slurm.manage import control, lanes, wait
from slurm.manage.lanes import ActiveRun, Lanes
from slurm.sweep import grid, tables
from tests.printed import numbers_in, printed_error
from tests.slurm import stubs
from tests.slurm.job_runner import JOB_TIMEOUT_S, skip_requeue_delay
from tests.waiting import wait_until

# -- the points -----------------------------------------------------------------------------------------------------


def test_points_are_the_combinations_and_their_names_show_the_values():
    words = ["optim.lr=0.03,0.1", "optim.batch=64", "seed=0..2"]
    shared, points = grid.parse_grid(words)
    assert shared == ["optim.batch=64"]
    assert [p.name for p in points] == [f"lr={lr}_seed={seed}" for lr in ("0.03", "0.1") for seed in range(3)]
    assert points[4].values == ("optim.lr=0.1", "seed=1")


def test_names_stay_short_distinct_and_usable_as_folders():
    _, points = grid.parse_grid(["views.size=16,32", "views.crops.size=8,'a b/c'", "x.list=[1,2],[1,3],[1 2]"])
    assert points[0].name == "views.size=16_crops.size=8_list=1-2-1"
    assert len({p.name for p in points}) == 12
    assert not any(set("/ %\\,") & set(p.name) for p in points)
    assert "x.list=[1,3]" in points[1].values
    _, points = grid.parse_grid(["a.seed=-1..1"])
    assert [p.values[0] for p in points] == ["a.seed=-1", "a.seed=0", "a.seed=1"]


@pytest.mark.parametrize(
    ("words", "what", "got"),
    [
        (["seed=3..1"], "sweep over seed", "empty range"),
        (["seed=0..99999"], "sweep over seed", "100,000"),
        (["optim.lr=0.1,,0.2"], "sweep over optim.lr", "empty value"),
        (["optim.lr=0.1,0.10"], "sweep over optim.lr", "0.1 and 0.10"),
        (["seed=0,1", "seed=2,3"], "sweep over seed", "twice"),
        (["optim.lr=0.1"], "sweep", "no key"),
        (["a=0..99", "b=0..99"], "sweep", "10,000"),
    ],
)
def test_an_invalid_grid_is_refused(words, what, got):
    with pytest.raises(ConfigError) as caught:
        grid.parse_grid(words)
    assert caught.value.what == what and got in caught.value.got and caught.value.fix


# -- the lanes ------------------------------------------------------------------------------------------------------


def append_to(line_up, count):
    """Append jobs; the ids that each waits for."""
    waits = []
    for number in range(count):
        lane = line_up.choose()
        waits.append(lane.tails)
        lane.append(f"new{number}")
    return waits


def test_new_runs_form_as_many_lanes_as_may_run():
    assert append_to(Lanes([], 2), 5) == [(), (), ("new0",), ("new1",), ("new2",)]
    assert append_to(Lanes([], None), 3) == [(), (), ()]


def test_runs_are_appended_to_the_lanes_that_are_there():
    active = [ActiveRun("1"), ActiveRun("2"), ActiveRun("3", waits_for=("1",)), ActiveRun("4", waits_for=("3",))]
    assert append_to(Lanes(active, 2), 4) == [("2",), ("new0",), ("new1",), ("4",)]
    assert append_to(Lanes(active, 3), 2) == [(), ("new0",)], "a higher limit opens a lane"
    assert append_to(Lanes(active, 1), 2) == [("2", "4"), ("new0",)], "a lower one joins lanes"


def test_a_lane_continues_with_the_successor_of_a_job_and_not_with_an_older_job_of_a_run():
    active = [ActiveRun("9", earlier_ids=("1",)), ActiveRun("2", waits_for=("1",))]
    assert append_to(Lanes(active, 1), 1) == [("2",)]
    # 5 waited for job 1 of a run whose new job 8 continues nothing: 8 is in no lane but its own
    assert append_to(Lanes([ActiveRun("8"), ActiveRun("5", waits_for=("1",))], 3), 3) == [(), ("new0",), ("8",)]


def test_joined_lanes_do_not_open_more_when_the_limit_rises_again():
    active = [*map(ActiveRun, "1234"), ActiveRun("5", waits_for=("1", "3")), ActiveRun("6", waits_for=("2", "4"))]
    assert append_to(Lanes(active, 4), 2) == [("5",), ("6",)]


def test_lanes_of_local_runs_keep_their_gpus():
    active = [ActiveRun("a", gpus="1"), ActiveRun("b", waits_for=("a",), gpus="1")]
    line_up = Lanes(active, 2, ["0", "1"])
    assert sorted((lane.tails, lane.gpus) for lane in line_up.lanes) == [((), "0"), (("b",), "1")]


def test_dependencies_are_written_and_read():
    sbatch = lanes.add_dependency({"dependency": "afterok:3"}, ("7", "local-8"))
    assert sbatch == {"dependency": "afterany:7:local-8,afterok:3"}
    assert lanes.find_dependencies(sbatch) == ["7", "local-8"]
    assert lanes.add_dependency({"time": "9"}, ()) == {"time": "9"} and lanes.find_dependencies({}) == []


# -- the command, with programs in place of SLURM's -----------------------------------------------------------------


def read_dependencies(folder):
    """Job and dependency of each run's training."""
    jobs = {path.parent.name: job_log.latest_jobs(RunDir(path.parent))["train"] for path in folder.glob("*/jobs.jsonl")}
    return {name: (job.id, job.options.get("dependency", "")) for name, job in jobs.items()}


SWEEP = ["sweep", "digits_msf", "--out", "out", "optim.lr=0.03,0.1", "seed=0,1", "schedule.epochs=1"]


def test_a_sweep_submits_each_point_once_in_lanes(call, queue, tmp_path):
    code, out, err = call(*SWEEP, "--parallel=2", "--evals=knn", "--time=30")
    assert (code, err) == (EXIT_DONE, "")
    folder, names = tmp_path / "out", ["lr=0.03_seed=0", "lr=0.03_seed=1", "lr=0.1_seed=0", "lr=0.1_seed=1"]
    assert read_dependencies(folder) == {
        names[0]: ("7", ""),
        names[1]: ("9", ""),
        names[2]: ("11", "afterany:7"),
        names[3]: ("13", "afterany:9"),
    }
    scripts = "".join(path.read_text() for path in folder.glob("lr=0.1_seed=0/logs/*.sh"))
    assert "#SBATCH --dependency=afterany:7\n" in scripts and "#SBATCH --dependency=afterok:11\n" in scripts
    assert len(queue.jobs) == 8
    lines = out.splitlines()
    assert numbers_in(lines[0])[0] == 4 and numbers_in(lines[1]) == [4, 4] and "unknown" in lines[2]
    assert [line.split("(")[1] for line in lines if line.startswith("Submitted")][:2] == [
        f"{names[0]})",
        f"{names[0]}, knn)",
    ]

    code, out, err = call(*SWEEP, "--parallel=2", "--evals=knn", "--time=30")
    assert code == EXIT_DONE and len(queue.jobs) == 8 and "Submitted" not in out and "nothing to submit" in err

    for job in ("7", "8"):  # the first run ends without success
        queue.remove(job)
    assert call(*SWEEP, "--parallel=2", "--evals=knn", "--dry-run")[1].count("to submit: train, knn") == 1
    assert call(*SWEEP, "--parallel=2", "--evals=knn", "--time=30")[0] == EXIT_DONE
    # 9 runs, and 11 may run, so that the first run has to wait
    assert read_dependencies(folder)[names[0]] == ("15", "afterany:11") and len(queue.jobs) == 8


@pytest.mark.parametrize(
    ("typed", "what", "got", "fix"),
    [
        ("optim.rl=0.1,0.2", "recipe digits_msf, key optim.rl", "'rl'", "'lr'"),
        ("seed=2..1", "sweep over seed", "empty", "seed=1..2"),
        ("seed=0,1 --evals=knm", "option --evals", "'knm'", "'knn'"),
        ("optim.batch=128 seed=0", "sweep", "no key", "seed=0..2"),
        ("seed=0,1 --array=0-3", "option --array", "--array=0-3", "sweep"),
        ("optim.lr_scaling=none,'none'", "sweep over optim.lr_scaling", "the same", ""),
        ("seed=0,1 --local --gpus-per-node=64", "option --parallel", "64", ""),
    ],
)
def test_bad_input_is_refused_before_anything_is_created(refused_sweep, typed, what, got, fix):
    error = refused_sweep(*typed.split())
    assert error.what == what and got in error.got and fix in error.fix


def test_the_folder_of_another_sweep_is_refused(call, queue, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    words = ["sweep", "digits_msf", "--out", "out", "schedule.epochs=1", "seed=0,1"]
    code, _, err = call(*words)
    assert code == EXIT_USAGE and printed_error(err).got == "other files"
    (tmp_path / "out" / "notes.txt").unlink()
    assert call(*words)[0] == EXIT_DONE and len(queue.jobs) == 2
    for other in ("sweep digits_msf --out out schedule.epochs=1 seed=0,2", "sweep digits_byol --out out seed=0,1"):
        code, out, err = call(*other.split())
        assert (code, out) == (EXIT_USAGE, "") and "digits_msf" in printed_error(err).got
    assert len(queue.jobs) == 2


def test_two_points_with_one_recipe_are_refused(call, queue, tmp_path):
    code, _, err = call("sweep", "digits_msf", "--out", "out", "optim.lr=0.1,1.0e-1", "seed=0")
    assert code == EXIT_USAGE and not (tmp_path / "out").exists()
    assert "0.1 and 1.0e-1" in printed_error(err).got


# -- tables ---------------------------------------------------------------------------------------------------------

TABLE = """
document: Digits
tables:
  small:
    title: Scanned digits
    source: measured
    rows: |
      method | knn20_top1 | linear_top1 | recipe
      MSF    | 90.0       | 91.0        | digits_msf
      SimCLR | 92.0       | 93.0        | digits_simclr
      other  | 50.0       | -           |
      NNCLR  | 94.0       | 95.0        | digits_nnclr
"""


def test_a_table_submits_its_recipes_with_the_evaluations_of_its_columns(call, queue, tmp_path):
    (tmp_path / "small.yaml").write_text(TABLE)
    words = ["table", "small.yaml", "--out", "out", "schedule.epochs=1"]
    assert call(*words, "--parallel=1")[0] == EXIT_DONE
    folder, recipes = tmp_path / "out", ["digits_msf", "digits_simclr", "digits_nnclr"]
    names = [f"{recipe}_seed=0" for recipe in recipes]
    assert read_dependencies(folder) == {
        names[0]: ("7", ""),
        names[1]: ("10", "afterany:7"),
        names[2]: ("13", "afterany:10"),
    }
    assert {*job_log.latest_jobs(RunDir(folder / names[1]))} == {"train", "knn", "linear"}
    code, out, _ = call(*words, "--parallel=1", "--seeds=2")
    assert code == EXIT_DONE and out.count("Submitted") == 9, "more seeds are added"
    assert read_dependencies(folder)["digits_msf_seed=1"][1] == "afterany:13"


def test_published_tables_are_found_by_name():
    assert tables.list_points("nnclr.table1", 2)[1] == [
        grid.Point(f"{recipe}_seed={seed}", (recipe, f"seed={seed}"))
        for recipe in ("nnclr_r50_ep1000", "nnclr_r50_ep800_mc")
        for seed in (0, 1)
    ]
    assert tables.derive_evaluations(tables.list_points("msf.imagenet", 1)[0]) == "linear,knn"
    with pytest.raises(ConfigError) as caught:
        tables.list_points("nnclr.table99", 1)
    assert caught.value.got == "'nnclr.table99'", "as it was typed"
    assert "nnclr.t9" not in caught.value.fix.split(), "a table without recipes is not suggested"
    with pytest.raises(ConfigError) as caught:
        tables.list_points("nnclr.t7b", 1)
    assert "recipe" in caught.value.expected
    with pytest.raises(ConfigError) as caught:
        tables.derive_evaluations(tables.list_points("bsim.t1", 1)[0])
    assert "svm:train=" in caught.value.fix and "linear" in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        tables.derive_evaluations(["linear_1pct_top1", "linear_10pct_top1"])
    assert "linear:train=SUBSET_1PCT,linear:train=SUBSET_10PCT" in caught.value.fix


# -- local runs -----------------------------------------------------------------------------------------------------


def launch(run, after=()):
    return local.launch(run, {"train": lanes.add_dependency({}, after)})[0]


def test_a_local_run_waits_for_the_one_before_it(tmp_path):
    first, second, third = (stubs.create_run(tmp_path / name, steps=5) for name in "abc")
    stubs.change_settings(first, hold_at=3)
    job = launch(first)
    waiting = launch(second, [job.id])
    cancelled = launch(third, [job.id, waiting.id])
    wait_until(lambda: attempts.last_known_step(first) == 3, "step 3")
    assert (local.query_job(second, waiting).name, local.query_job(second, waiting).reason) == ("PENDING", "Dependency")
    active = [lanes.describe_active(run, control.active_jobs(run)) for run in (first, second)]
    assert active == [ActiveRun(job.id), ActiveRun(waiting.id, waits_for=(job.id,))]
    assert control.cancel(third) == [cancelled.id]
    wait_until(lambda: local.query_job(third, cancelled).name == "CANCELLED", "end of the cancelled run")
    assert not attempts.read_attempts(third) and not attempts.read_attempts(second)
    stubs.change_settings(first, hold_at=None)
    assert wait.wait_for_jobs(second, lambda text: None) == 0
    assert first.finished and second.finished
    ended = json.loads((first.root / "jobs.jsonl").read_text().splitlines()[-1])
    assert ended["event"] == "ended"


# -- a real SLURM ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stubs_in_snapshots(monkeypatch):
    """Every run that is submitted runs the stubs, of 12 steps, and waits at step 6."""
    create = code_snapshot.create_snapshot

    def create_with_stubs(run):
        create(run)
        (run.code / "hpcssl" / "run.py").write_text(stubs.TRAINER)
        (run.code / "slurm" / "job" / "evaluate.py").write_text(stubs.EVALUATION)
        (run.root / stubs.SETTINGS).write_text(json.dumps({"steps": 12, "hold_at": 6}))

    monkeypatch.setattr(code_snapshot, "create_snapshot", create_with_stubs)


@pytest.mark.slurm
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("stubs_in_snapshots")
def test_the_limit_holds_on_a_cluster_through_a_preemption_and_a_kill(call, cluster, tmp_path):
    words = ["sweep", "digits_msf", "--out", "out", "optim.lr=0.03,0.1", "seed=0..2", "--parallel=2", "--evals=knn"]
    assert call(*words)[0] == EXIT_DONE
    runs = [RunDir(path.parent) for path in sorted((tmp_path / "out").glob("*/jobs.jsonl"))]
    jobs = {job_log.latest_jobs(run)["train"].id: run for run in runs}
    submitted = len(cluster("squeue", "-h", "-o", "%i").split())
    assert submitted == 12
    most = 0

    def poll(condition):
        nonlocal most
        lines = [line.split() for line in cluster("squeue", "-h", "-o", "%i %T %r").splitlines()]
        may_run = [
            job for job, state, reason in lines if job in jobs and reason != "Dependency" and state != "COMPLETING"
        ]
        most = max(most, len(may_run))
        skip_requeue_delay(cluster)
        return condition()

    def wait_for(condition, message):
        cluster.wait_until(lambda: poll(condition), message, JOB_TIMEOUT_S)

    def has_held(run):
        return attempts.last_known_step(run) == 6

    first, second = runs[:2]
    wait_for(lambda: has_held(first) and has_held(second), "two trainings")
    control.preempt(first)
    os.kill(loopback.find_task_pids(job_log.latest_jobs(second)["train"].id)[0], signal.SIGKILL)
    for run in (first, second):
        wait_for(lambda r=run: len(attempts.read_attempts(r)) == 2 and has_held(r), "second attempt")
    assert [attempts.read_attempts(run)[0].cause for run in (first, second)] == ["preempted", "killed"]
    assert not any(attempts.read_attempts(run) for run in runs[2:]), "a requeued job has not ended"
    code, out, err = call(*words)
    assert code == EXIT_DONE and "nothing to submit" in err and "Submitted" not in out
    for run in runs:
        stubs.change_settings(run, hold_at=None)
    wait_for(lambda: all(run.finished and read_lines(run.eval_rows("knn")) for run in runs), "end of all runs")
    assert most == 2
    assert [len(attempts.read_attempts(run)) for run in runs] == [2, 2, 1, 1, 1, 1]
    assert {job_log.latest_jobs(run)["train"].id for run in runs} == jobs.keys()


# -- real trainings -------------------------------------------------------------------------------------------------


@pytest.mark.slurm
@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_swept_run_has_the_digest_of_a_single_one_after_a_preemption_and_a_kill(call, cluster, tmp_path, digits):
    values = ["schedule.steps=150", "machine.devices=cpu", "machine.checkpoint_minutes=0.05"]
    words = ["sweep", "digits_msf", "--out", "out", "optim.lr=0.03,0.1", "seed=0..2", "--parallel=2", *values]
    assert call(*words)[0] == EXIT_DONE
    runs = [RunDir(path.parent) for path in sorted((tmp_path / "out").glob("*/jobs.jsonl"))]
    trains, most = [job_log.latest_jobs(run)["train"].id for run in runs], 0

    def wait_for(condition, message):
        nonlocal most

        def poll():
            nonlocal most
            states = [line.split() for line in cluster("squeue", "-h", "-t", "R", "-o", "%i").splitlines()]
            most = max(most, sum(line[0] in trains for line in states))
            skip_requeue_delay(cluster)
            return condition()

        cluster.wait_until(poll, message, 5 * JOB_TIMEOUT_S)

    wait_for(lambda: all(attempts.last_known_step(run) > 20 for run in runs[:2]), "steps of two trainings")
    control.preempt(runs[0])
    os.kill(loopback.find_task_pids(trains[1])[0], signal.SIGKILL)
    code, out, err = call(*words)
    assert code == EXIT_DONE and "nothing to submit" in err and "Submitted" not in out
    wait_for(lambda: all(run.finished for run in runs), "end of all trainings")
    assert most == 2 and len(runs) == 6
    causes = [[attempt.cause for attempt in attempts.read_attempts(run)] for run in runs]
    assert causes == [["preempted", "done"], ["killed", "done"], *[["done"]] * 4]
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    for run in runs[:3]:
        point = [word.replace("lr=", "optim.lr=") for word in run.root.name.split("_")]
        single = RunDir(tmp_path / f"single-{run.root.name}")
        train = [sys.executable, "-m", "hpcssl", "train", "digits_msf", "--run", str(single.root)]
        subprocess.run([*train, *point, *values, *data], check=True, capture_output=True)
        assert RunFolder(run.root).digest == RunFolder(single.root).digest
    assert len({RunFolder(run.root).digest for run in runs}) == 6


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_one_command_fills_a_table_of_three_recipes_with_two_seeds(call, tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(TABLE)
    words = ["table", "small.yaml", "--out", "out", "--seeds=2", "--parallel=2", "--local", "--wait"]
    assert call(*words, "schedule.epochs=2", "evals.linear.epochs=2", "machine.devices=cpu")[0] == EXIT_DONE
    results_command.main([tmp_path / "out"], as_json=True)
    shown = json.loads(capsys.readouterr().out)
    recipes = ("digits_msf", "digits_simclr", "digits_nnclr")
    trained = [record for record in shown if record["encoder"] == "trained"]
    single = {(record["recipe"], record["seed"]): record["metrics"] for record in trained if "n" not in record}
    assert single.keys() == {(recipe, seed) for recipe in recipes for seed in (0, 1)}
    means = {record["recipe"]: record for record in trained if "n" in record}
    assert means.keys() == {*recipes}
    for recipe in recipes:
        scores = [single[recipe, seed] for seed in (0, 1)]
        column = next(name for name in scores[0] if name.startswith("linear"))
        for name in ("20-NN", column):
            assert means[recipe]["metrics"][name] == pytest.approx(sum(one[name] for one in scores) / 2)
            assert means[recipe]["n"][name] == 2
