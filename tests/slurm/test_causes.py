"""Why an attempt ended: the same scenarios on a real SLURM and on this machine, and what only SLURM does."""

import json
import os
import signal
import time

import pytest

from hpcssl.files import RunDir, read_lines
from slurm import attempts, control, procs, records, script, watch
from slurm.cluster import Profile

pytestmark = pytest.mark.timeout(300)
full = pytest.mark.full


def told(run, **values):
    path = run.root / "told.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- the same on both -----------------------------------------------------------------------------------------------


@full
def test_preempted_and_cancelled_by_hand(runner, stand_in):
    run = stand_in(steps=100_000)
    runner.submit(run)
    runner.reach(5)
    control.preempt(run)
    runner.until(lambda: len(runner.causes) == 2 and runner.step > attempts.history(run)[0].last_step + 5, "attempt 2")
    assert "last=preempted" in watch.report(run).line()
    control.cancel(run)
    assert runner.end() == "CANCELLED"
    assert runner.causes == ["preempted", "cancelled"]


@full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_a_crash_and_a_signal_is_a_stop(runner, stand_in, rank):
    run = stand_in(steps=100_000)
    runner.submit(run)
    runner.reach(5)
    runner.signal(rank, signal.SIGKILL)
    runner.until(lambda: len(runner.causes) == 2 and len(runner.tasks) == 2 and runner.step > 20, "attempt 2")
    told(run, steps=1)
    runner.signal(rank, signal.SIGUSR1)
    if not runner.cluster:  # the stand-in's ranks do not talk; srun ends the other one when the first has left
        runner.signal(1 - rank, signal.SIGUSR1)
    assert runner.end() == "COMPLETED"
    # on SLURM rank 0 of the stand-in may take srun's TERM and be gone before the batch script could tell of the KILL;
    # the trainer's rank 0 meets the dead rank in a collective
    first = {"killed", "stopped"} if runner.cluster and rank == 1 else {"killed"}
    assert runner.causes[0] in first and runner.causes[1:] == ["stopped", "done"]


@full
def test_more_time_limits_than_submitit_counts(runner, stand_in):
    run = stand_in(steps=100_000)
    # SLURM's shortest limit is a minute, and its warning comes up to a minute early: within half a minute
    limit = {"time": "1", "signal": "USR2@55"} if runner.cluster else {"time": "0:07", "signal": "USR2@4"}
    runner.submit(run, **limit)
    runner.until(lambda: len(runner.causes) > 4, "attempt 5", 240)
    told(run, steps=1)
    assert runner.end() == "COMPLETED"
    # a warning that comes before the interpreter has begun to run ends a rank: the others then see a TERM
    assert runner.causes[-1] == "done" and "timeout" in runner.causes
    assert set(runner.causes[:-1]) <= ({"timeout", "stopped"} if runner.cluster else {"timeout"})


@full
def test_its_own_error_twice_at_one_step(runner, stand_in):
    run = stand_in(crash_at=5)
    runner.submit(run)
    assert runner.end() == "FAILED"
    assert runner.causes == ["error", "error"]
    told(run, crash_at=None)
    runner.submit(run)  # a person asks again
    assert runner.end() == "COMPLETED"


@full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
@pytest.mark.parametrize("who", ["batch", "srun", "supervisor", "controller"])
def test_a_signal_to_any_process_of_a_job_loses_nothing(runner, stand_in, who, number):
    if (who in ("batch", "srun")) is (runner.cluster is None):
        pytest.skip("a process of the other kind of job")
    run = stand_in(steps=150)
    runner.submit(run)
    runner.reach(5)
    runner.signal(who, number)
    state = runner.end()
    if state != "COMPLETED":  # whoever ends a supervisor ends its job
        assert who == "supervisor" and runner.causes == ["stopped"]
        assert attempts.history(run)[0].last_step == int((run.root / "state-0").read_text())
        runner.submit(run)
        assert runner.end() == "COMPLETED"
    assert set(runner.causes[:-1]) <= ({"killed"} if (who, number) == ("srun", signal.SIGTERM) else {"stopped"})


@full
def test_no_pickle_decides_anything(runner, stand_in):
    run = stand_in(steps=80)
    runner.submit(run)
    runner.reach(5)
    for path in run.logs.glob("*.pkl"):
        path.write_bytes(b"rot")
        path.with_suffix(".pkl.save_tmp").write_bytes(b"rot")
    control.preempt(run)
    assert runner.end() == "COMPLETED"
    assert runner.causes == ["preempted", "done"]


@pytest.fixture(scope="module")
def settings(digits):
    return ["optim.batch=64", "bank.size=128", "schedule.steps=30", "machine.log_steps=1", "machine.devices=cpu",
            "machine.checkpoint_steps=50", f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]


@pytest.fixture(scope="module")
def undisturbed(settings, make_runner, tmp_path_factory):
    from hpcssl.train.checkpoint import digest_of

    calm = make_runner(None)
    calm.submit_training(RunDir(tmp_path_factory.mktemp("calm") / "run"), *settings)
    assert calm.end() == "COMPLETED"
    return digest_of(calm.run)


@full
@pytest.mark.parametrize(("moment", "who", "numbers"), [
    ("start", 1, [signal.SIGTERM]), ("start", "all", [signal.SIGUSR2, signal.SIGTERM]),
    ("step", 0, [signal.SIGUSR1]), ("step", "all", [signal.SIGTERM, signal.SIGTERM])])
def test_signals_to_the_trainer_itself(runner, settings, undisturbed, tmp_path, moment, who, numbers):
    from hpcssl.train.checkpoint import digest_of

    run = RunDir(tmp_path / "run")
    runner.submit_training(run, *settings)
    if moment == "start":
        runner.until(lambda: len(runner.tasks) == 2, "two ranks")
    else:
        runner.reach(5)
    runner.signal(who, *numbers)
    assert runner.end() == "COMPLETED"
    assert runner.causes == ["stopped", "done"]
    ends = attempts.history(run)
    assert ends[1].first_step == ends[0].last_step  # no finished step was lost
    assert [line["step"] for line in read_lines(run.journal)] == list(range(1, 31))
    assert digest_of(run) == undisturbed


# -- what SLURM does ------------------------------------------------------------------------------------------------


def crowd_out(cluster):
    cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")


@pytest.fixture
def configured(on_slurm):
    """Lines for slurm.conf that hold for one test."""
    conf = on_slurm.cluster.conf
    before = conf.read_text()

    def add(*lines):
        conf.write_text(before + "".join(line + "\n" for line in lines))
        on_slurm.cluster("scontrol", "reconfigure")
    yield add
    add()


@pytest.mark.slurm
@pytest.mark.parametrize(("grace", "lines", "signals"), [
    pytest.param(20, [], ["SIGTERM"], marks=full),
    (0, [], ["SIGTERM"]),
    pytest.param(20, ["SlurmctldParameters=preempt_send_user_signal"], ["SIGUSR2"], marks=full),
    pytest.param(0, ["SlurmctldParameters=preempt_send_user_signal"], ["SIGTERM", "SIGUSR2"], marks=full),
])
def test_preemption_in_every_manner(on_slurm, stand_in, configured, grace, lines, signals):
    run, cluster = stand_in(steps=100), on_slurm.cluster
    configured(*lines)
    cluster("scontrol", "update", "partitionname=main", f"gracetime={grace}")
    try:
        on_slurm.submit(run)
        on_slurm.reach(5)
        crowd_out(cluster)
        on_slurm.until(lambda: on_slurm.causes[0], "end of attempt 1")
    finally:
        cluster("scontrol", "update", "partitionname=main", "gracetime=20")
    assert on_slurm.end() == "COMPLETED"
    assert on_slurm.causes == ["preempted", "done"]
    assert attempts.history(run)[0].error in signals


@pytest.mark.slurm
def test_another_job_takes_over_where_slurm_requeues_nothing(on_slurm, stand_in):
    run, cluster = stand_in(steps=100_000), on_slurm.cluster
    job = on_slurm.submit(run)
    child = script.submit(run, "knn", {"dependency": f"afterok:{job}"}, Profile())
    cluster("scontrol", "update", f"jobid={job}", "requeue=0")
    on_slurm.reach(5)
    crowd_out(cluster)
    on_slurm.until(lambda: records.submitted(run)["train"].job != job, "successor")
    next_ = records.submitted(run)["train"].job
    assert f"job={next_}" in watch.report(run).line()
    on_slurm.until(lambda: len(on_slurm.causes) == 2 and on_slurm.step > attempts.history(run)[0].last_step + 5,
                   "attempt 2")
    assert cluster.field(job, "JobState") == "FAILED" and cluster.field(job, "ExitCode") == "75:0"
    assert cluster.field(child, "Dependency").startswith(f"afterok:{next_}")
    # and again after a crash, from the batch script
    cluster("scontrol", "update", f"jobid={next_}", "requeue=0")
    on_slurm.job = next_
    told(run, steps=1)
    on_slurm.signal(1, signal.SIGKILL)
    on_slurm.until(lambda: records.submitted(run)["train"].job != next_, "second successor")
    assert watch.wait(run, lambda text: None, jobs=[j for j in records.every(run) if j.job in (job, child)]) == 0
    assert on_slurm.causes == ["preempted", "killed", "done"]
    assert len(read_lines(run.eval_rows("knn"))) == 1


@pytest.mark.slurm
@full
def test_cancel_reaches_the_successor(on_slurm, stand_in):
    run = stand_in(steps=100_000)
    job = on_slurm.submit(run)
    on_slurm.cluster("scontrol", "update", f"jobid={job}", "requeue=0")
    on_slurm.reach(5)
    on_slurm.signal("all", signal.SIGTERM)
    on_slurm.until(lambda: len(on_slurm.causes) == 2, "attempt 2")
    assert control.cancel(run) == [records.submitted(run)["train"].job] != [job]
    assert on_slurm.end() == "CANCELLED"
    assert on_slurm.causes == ["stopped", "cancelled"]


@pytest.mark.slurm
@pytest.mark.parametrize(("node", "requeue"), [("n2", "1"), pytest.param("n2", "0", marks=full),
                                               pytest.param("n1", "1", marks=full)])
def test_a_node_that_is_taken_down(on_slurm, stand_in, node, requeue):
    run, cluster = stand_in(steps=150), on_slurm.cluster
    job = on_slurm.submit(run)
    cluster("scontrol", "update", f"jobid={job}", f"requeue={requeue}")
    on_slurm.reach(5)
    cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    on_slurm.until(lambda: on_slurm.causes[0], "end of attempt 1")
    cluster("scontrol", "update", f"nodename={node}", "state=resume")
    assert on_slurm.end() == "COMPLETED"
    assert on_slurm.causes == ["node_fail", "done"]


@pytest.mark.slurm
@full
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_that_dies_with_all_its_processes(on_slurm, stand_in, configured, node):
    """n1 has the batch script, srun and rank 0: nobody is left to write anything down."""
    run, cluster = stand_in(steps=100_000), on_slurm.cluster
    configured("SlurmdTimeout=10")
    on_slurm.submit(run)
    on_slurm.reach(5)
    # all that SLURM started on the node, and its daemon; kill -9 leaves nobody who could tell the controller
    daemon = cluster.processes[f"slurmd {node}"]
    tasks = {rank: pid for rank, pid in on_slurm.tasks.items() if (rank == 0) is (node == "n1")}
    batch = [on_slurm._other("batch"), on_slurm._other("srun")] if node == "n1" else []
    steps = {procs.look(pid).parent for pid in [*batch[:1], *tasks.values()]}
    daemon.kill()
    for pid in [*steps, *batch, *tasks.values()]:
        os.kill(pid, signal.SIGKILL)
    on_slurm.until(lambda: "DOWN" in cluster("scontrol", "show", "node", node), "node down", 120)
    cluster.restart(f"slurmd {node}")
    told(run, steps=1)
    assert on_slurm.end() == "COMPLETED"
    assert on_slurm.causes == ["node_fail", "done"]
    assert attempts.history(run)[0].error == ("lost n1" if node == "n1" else "SIGTERM")  # rank 0 lived to say so


@pytest.mark.slurm
@full
def test_a_launch_that_failed_is_held_and_named_with_the_mend(on_slurm, stand_in):
    run, cluster = stand_in(steps=20), on_slurm.cluster
    spool, away = cluster.root / "spool.n1", cluster.root / "spool.n1.away"
    spool.rename(away)
    spool.write_text("")
    try:
        job = on_slurm.submit(run, nodelist="n1,n2")
        on_slurm.until(lambda: "held" in watch.report(run).line(), "held job")
    finally:
        spool.unlink()
        away.rename(spool)
    line = watch.report(run).line()
    assert "launch_failed_requeued_held" in line and f"scontrol release {job}" in line and "attempt=0" in line
    cluster("scontrol", "release", job)
    assert on_slurm.end() == "COMPLETED"
    assert on_slurm.causes == ["done"]


@pytest.mark.slurm
@full
def test_a_dependency_that_can_never_be_met_is_named_with_the_mend(on_slurm, stand_in, monkeypatch):
    run, cluster = stand_in(crash_at=3), on_slurm.cluster
    job = on_slurm.submit(run)
    child = script.submit(run, "knn", {"dependency": f"afterok:{job}"}, Profile())
    cluster("scontrol", "update", f"jobid={child}", "KillOnInvalidDependent=no")
    kept = cluster("sbatch", "--parsable", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=no", "-o", "/dev/null",
                   "--wrap", "true").strip()
    records.note(run, "submit", kept, what="linear", kind="slurm", options={})
    assert on_slurm.end() == "FAILED"
    on_slurm.until(lambda: "DependencyNeverSatisfied" in watch.report(run).line(), "state of the child")
    assert f"scancel {kept}" in watch.report(run).note
    cluster("scancel", kept)


@pytest.mark.slurm
@full
def test_what_is_left_of_an_attempt_changes_nothing_of_the_next(on_slurm, stand_in):
    """A process of attempt 1 that SLURM has lost wakes up while attempt 2 runs: it closes nothing, asks for nothing."""
    import subprocess
    import sys

    run = stand_in(steps=400)
    job = on_slurm.submit(run)
    on_slurm.reach(5)
    left = procs.environment(on_slurm.tasks[0])
    control.preempt(run)
    on_slurm.until(lambda: len(on_slurm.causes) == 2, "attempt 2")
    late = ("import sys\nfrom hpcssl.files import RunDir\nfrom slurm import after, again, attempts, job\n"
            "run = RunDir(sys.argv[1]); mine = job.this_attempt(run, 'train'); assert mine['attempt'] == 1\n"
            "attempts.end(run, 'train', mine, 'killed', 'late')\n"
            "print(again.after_stop(run, 'train', mine, ['SIGTERM']))\n"
            "print(after.settle(run, 'train', 137))\n")
    done = subprocess.run([sys.executable, "-c", late, str(run.root)], env=left, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    time.sleep(1)
    assert on_slurm.cluster.field(job, "Restarts") == "1" and on_slurm.causes == ["preempted", None]
    assert on_slurm.end() == "COMPLETED"
    assert on_slurm.causes == ["preempted", "done"]
