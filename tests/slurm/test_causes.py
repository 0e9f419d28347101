"""The causes of attempts: the same scenarios on a real SLURM and on this machine, and those that only SLURM has."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, processes
from slurm.backend.profiles import Profile
from slurm.log import attempts, job_log
from slurm.manage import control, status, wait
from tests.slurm.job_runner import JobRunner
from tests.slurm.stubs import change_settings

pytestmark = pytest.mark.timeout(1200)
full = pytest.mark.full
ENDLESS = 100_000
"""More steps than a test takes; those that are to finish set ``steps=1`` later."""


def wait_for_second_attempt(runner):
    """Wait until attempt 2 has made a few steps."""
    runner.wait_until(
        lambda: len(runner.causes) == 2 and runner.step > attempts.read_attempts(runner.run)[0].last_step + 5,
        "attempt 2",
    )


# -- the same on both -----------------------------------------------------------------------------------------------


@full
def test_the_commands_preempt_and_cancel_are_the_recorded_causes(runner, make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    runner.submit(run)
    runner.wait_for_step(5)
    control.preempt(run)
    wait_for_second_attempt(runner)
    assert "last=preempted" in status.query_run(run).line()
    control.cancel(run)
    assert runner.wait_for_end() == "CANCELLED"
    assert runner.causes == ["preempted", "cancelled"]


@full
@pytest.mark.parametrize("rank", [0, 1])
def test_sigkill_of_a_rank_is_a_crash_and_sigusr1_is_a_stop(runner, make_stub_run, rank):
    run = make_stub_run(steps=ENDLESS)
    runner.submit(run)
    runner.wait_for_step(5)
    runner.signal(rank, signal.SIGKILL)
    runner.wait_until(lambda: len(runner.causes) == 2 and len(runner.tasks) == 2 and runner.step > 20, "attempt 2")
    change_settings(run, steps=1)
    runner.signal(rank, signal.SIGUSR1)
    assert runner.wait_for_end() == "COMPLETED"
    assert runner.causes == ["killed", "stopped", "done"]


@full
def test_the_time_limit_may_be_reached_more_often_than_submitit_requeues(runner, make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    # SLURM's shortest limit is a minute, and its warning comes up to a minute early: within half a minute
    limit = {"time": "1", "signal": "USR2@55"} if runner.cluster else {"time": "0:15", "signal": "USR2@7"}
    runner.submit(run, **limit)
    runner.wait_until(lambda: len(runner.causes) > 4, "attempt 5", timeout=600)
    change_settings(run, steps=1)
    assert runner.wait_for_end() == "COMPLETED"
    # a warning that comes before the interpreter runs ends a rank, and the others then get a TERM
    assert runner.causes[-1] == "done" and "timeout" in runner.causes
    assert set(runner.causes[:-1]) <= ({"timeout", "stopped"} if runner.cluster else {"timeout"})


@full
def test_two_errors_at_one_step_fail_the_job_and_a_new_submission_continues(runner, make_stub_run):
    run = make_stub_run(crash_at=5)
    runner.submit(run)
    assert runner.wait_for_end() == "FAILED"
    assert runner.causes == ["error", "error"]
    change_settings(run, crash_at=None)
    runner.submit(run)
    assert runner.wait_for_end() == "COMPLETED"


@full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
@pytest.mark.parametrize("target", ["batch", "srun", "supervisor", "controller"])
def test_a_signal_to_any_process_of_a_job_loses_no_step(runner, make_stub_run, target, number):
    if (target in ("batch", "srun")) is (runner.cluster is None):
        pytest.skip("a process of the other kind of job")
    run = make_stub_run(steps=150)
    runner.submit(run)
    runner.wait_for_step(5)
    runner.signal(target, number)
    state = runner.wait_for_end()
    if state != "COMPLETED":  # a signal to the supervisor ends its job
        assert target == "supervisor" and runner.causes == ["stopped"]
        assert attempts.read_attempts(run)[0].last_step == int((run.root / "state-0").read_text())
        runner.submit(run)
        assert runner.wait_for_end() == "COMPLETED"
    expected = {"killed"} if (target, number) == ("srun", signal.SIGTERM) else {"stopped"}
    assert set(runner.causes[:-1]) <= expected


@pytest.fixture(scope="module")
def overrides(digits):
    """A training of 30 steps."""
    return [
        "optim.batch=64",
        "bank.size=128",
        "schedule.steps=30",
        "machine.log_steps=1",
        "machine.devices=cpu",
        "machine.checkpoint_steps=50",
        f"data.train={digits / 'train'}",
        f"data.val={digits / 'val'}",
    ]


@pytest.fixture(scope="module")
def undisturbed_digest(overrides, tmp_path_factory):
    """Digest of the last checkpoint of a training that got no signal."""
    runner = JobRunner(None)
    runner.submit_training(RunDir(tmp_path_factory.mktemp("undisturbed") / "run"), *overrides)
    assert runner.wait_for_end() == "COMPLETED"
    return checkpoint_digest(runner.run)


@full
@pytest.mark.parametrize(
    ("moment", "target", "numbers"),
    [
        ("start", 1, [signal.SIGTERM]),
        ("start", "all", [signal.SIGUSR2, signal.SIGTERM]),
        ("step", 0, [signal.SIGUSR1]),
        ("step", "all", [signal.SIGTERM, signal.SIGTERM]),
    ],
)
def test_signals_to_the_trainer_do_not_change_its_result(
    runner, overrides, undisturbed_digest, tmp_path, moment, target, numbers
):
    run = RunDir(tmp_path / "run")
    runner.submit_training(run, *overrides)
    if moment == "start":
        runner.wait_until(lambda: len(runner.tasks) == 2, "two ranks")
    else:
        runner.wait_for_step(5)
    runner.signal(target, *numbers)
    assert runner.wait_for_end() == "COMPLETED"
    assert runner.causes == ["stopped", "done"]
    stopped, finished = attempts.read_attempts(run)
    assert finished.first_step == stopped.last_step, "no step was lost"
    assert [line["step"] for line in read_lines(run.journal)] == list(range(1, 31))
    assert checkpoint_digest(run) == undisturbed_digest


# -- only on SLURM --------------------------------------------------------------------------------------------------


def submit_preemptor(cluster):
    """Submit a job that preempts every job of the other partitions, and ends at once."""
    cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")


@pytest.fixture
def configure_slurm(slurm_runner):
    """``configure_slurm(*lines)`` adds lines to slurm.conf for one test."""
    conf = slurm_runner.cluster.conf
    before = conf.read_text()

    def configure(*lines):
        conf.write_text(before + "".join(line + "\n" for line in lines))
        slurm_runner.cluster("scontrol", "reconfigure")

    yield configure
    configure()


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("grace_s", "lines", "signals"),
    [
        pytest.param(20, [], ["SIGTERM"], marks=full),
        (0, [], ["SIGTERM"]),
        pytest.param(20, ["SlurmctldParameters=preempt_send_user_signal"], ["SIGUSR2"], marks=full),
        pytest.param(0, ["SlurmctldParameters=preempt_send_user_signal"], ["SIGTERM", "SIGUSR2"], marks=full),
    ],
)
def test_a_preemption_is_recorded_with_and_without_grace_time_and_user_signal(
    slurm_runner, make_stub_run, configure_slurm, grace_s, lines, signals
):
    run, cluster = make_stub_run(steps=100, hold_at=80), slurm_runner.cluster
    configure_slurm(*lines)
    cluster("scontrol", "update", "partitionname=main", f"gracetime={grace_s}")
    try:
        slurm_runner.submit(run)
        slurm_runner.wait_for_step(5)
        submit_preemptor(cluster)
        slurm_runner.wait_until(lambda: slurm_runner.causes[0], "end of attempt 1")
        change_settings(run, hold_at=None)
    finally:
        cluster("scontrol", "update", "partitionname=main", "gracetime=20")
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["preempted", "done"]
    assert attempts.read_attempts(run)[0].error in signals


@pytest.mark.slurm
@full
def test_a_preemption_is_recorded_when_slurm_answers_late(slurm_runner, make_stub_run, monkeypatch, tmp_path):
    """All ranks wait for the answer, so that no node of the attempt is done and missing from it."""
    run, cluster = make_stub_run(steps=100, hold_at=80), slurm_runner.cluster
    slow = tmp_path / "bin" / "scontrol"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n[ -z "$SLURM_PROCID" ] || sleep 4\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent), prepend=os.pathsep)
    cluster("scontrol", "update", "partitionname=main", "gracetime=0")
    try:
        slurm_runner.submit(run)
        slurm_runner.wait_for_step(5)
        submit_preemptor(cluster)
        slurm_runner.wait_until(lambda: slurm_runner.causes[0], "end of attempt 1")
        change_settings(run, hold_at=None)
    finally:
        cluster("scontrol", "update", "partitionname=main", "gracetime=20")
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["preempted", "done"]


@pytest.mark.slurm
def test_a_successor_continues_the_run_where_slurm_does_not_requeue(slurm_runner, make_stub_run):
    run, cluster = make_stub_run(steps=ENDLESS, hold_at=8), slurm_runner.cluster
    job = slurm_runner.submit(run)
    child = batch_script.submit(run, "knn", {"dependency": f"afterok:{job}"}, Profile())
    cluster("scontrol", "update", f"jobid={job}", "requeue=0")
    slurm_runner.wait_for_step(5)
    submit_preemptor(cluster)
    slurm_runner.wait_until(lambda: job_log.latest_jobs(run)["train"].id != job, "successor")
    successor = job_log.latest_jobs(run)["train"].id
    assert status.query_run(run).job == successor
    slurm_runner.job = successor
    slurm_runner.wait_until(lambda: len(slurm_runner.causes) == 2 and len(slurm_runner.tasks) == 2, "attempt 2")
    assert cluster.field(job, "JobState") == "FAILED" and cluster.field(job, "ExitCode") == "75:0"
    assert cluster.field(child, "Dependency").startswith(f"afterok:{successor}")
    # after a crash without a new step, which is not repeated in the allocation, the batch script submits a successor
    cluster("scontrol", "update", f"jobid={successor}", "requeue=0")
    change_settings(run, steps=1)
    slurm_runner.signal(1, signal.SIGKILL)
    slurm_runner.wait_until(lambda: job_log.latest_jobs(run)["train"].id != successor, "second successor")
    first_jobs = [recorded for recorded in job_log.all_jobs(run) if recorded.id in (job, child)]
    assert wait.wait_for_jobs(run, lambda text: None, jobs=first_jobs) == 0
    assert slurm_runner.causes == ["preempted", "killed", "done"]
    assert len(read_lines(run.eval_rows("knn"))) == 1


@pytest.mark.slurm
@full
def test_cancel_reaches_the_successor(slurm_runner, make_stub_run):
    run = make_stub_run(steps=ENDLESS)
    job = slurm_runner.submit(run)
    slurm_runner.cluster("scontrol", "update", f"jobid={job}", "requeue=0")
    slurm_runner.wait_for_step(5)
    slurm_runner.signal("all", signal.SIGTERM)
    slurm_runner.wait_until(lambda: len(slurm_runner.causes) == 2, "attempt 2")
    assert control.cancel(run) == [job_log.latest_jobs(run)["train"].id] != [job]
    assert slurm_runner.wait_for_end() == "CANCELLED"
    assert slurm_runner.causes == ["stopped", "cancelled"]


@pytest.mark.slurm
@full
def test_a_launch_whose_nodes_another_step_holds_is_given_up_and_the_job_requeued(
    slurm_runner, make_stub_run, monkeypatch
):
    """So it is after a kill of slurmstepd: SLURM may never learn that the step has ended, and holds its nodes."""
    monkeypatch.setattr(batch_script, "STEP_WAIT_S", 3)
    run, cluster = make_stub_run(steps=150, hold_at=120), slurm_runner.cluster
    module, begin = run.code / "slurm" / "job" / "relaunch.py", "    if what != job_log.TRAIN:\n"
    assert begin in module.read_text()
    wait = 'import time\n    while not (run.root / "go").exists():\n        time.sleep(0.05)\n'
    module.write_text(module.read_text().replace(begin, f"    {wait}{begin}"))
    job = slurm_runner.submit(run)
    slurm_runner.wait_for_step(5)
    slurm_runner.signal(1, signal.SIGKILL)
    slurm_runner.wait_until(lambda: slurm_runner.causes[0], "end of attempt 1")
    other = subprocess.Popen(["srun", f"--jobid={job}", "-N2", "-n2", "sleep", "1000"], stderr=subprocess.DEVNULL)
    try:
        slurm_runner.wait_until(lambda: f"{job}.1" in cluster("squeue", "--steps"), "other step")
        (run.root / "go").touch()
        slurm_runner.wait_until(lambda: len(slurm_runner.causes) == 3, "attempt 3")
    finally:
        other.kill()
        other.wait()
    change_settings(run, hold_at=None)
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["killed", "error", "done"]
    second = attempts.read_attempts(run)[1]
    assert second.launch == 1 and f"{job}.1 still has the nodes" in second.error


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("node", "requeue"),
    [("n2", "1"), pytest.param("n2", "0", marks=full), pytest.param("n1", "1", marks=full)],
)
def test_a_node_that_is_set_down_is_recorded_as_node_fail(slurm_runner, make_stub_run, node, requeue):
    run, cluster = make_stub_run(steps=150, hold_at=120), slurm_runner.cluster
    job = slurm_runner.submit(run)
    cluster("scontrol", "update", f"jobid={job}", f"requeue={requeue}")
    slurm_runner.wait_for_step(5)
    cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    slurm_runner.wait_until(lambda: slurm_runner.causes[0], "end of attempt 1")
    change_settings(run, hold_at=None)
    cluster("scontrol", "update", f"nodename={node}", "state=resume")
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["node_fail", "done"]


@pytest.mark.slurm
def test_a_spare_node_takes_the_place_of_a_lost_one(slurm_runner, make_stub_run):
    """Of two nodes one runs the tasks. The batch script stays on n1, so the tasks are brought to n2 first."""
    run, cluster = make_stub_run(steps=150, hold_at=120), slurm_runner.cluster
    module = run.code / "slurm" / "job" / "step_nodes.py"
    in_order = "[node for node in nodes if node not in down]"
    assert in_order in module.read_text()
    module.write_text(module.read_text().replace(in_order, in_order + "[::-1]"))
    job = slurm_runner.submit(run, **{"nodes": "1", "spare-nodes": "1"})
    slurm_runner.wait_for_step(5)
    assert [a.host for a in attempts.read_attempts(run)] == ["n2"]
    cluster("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm_runner.wait_until(lambda: slurm_runner.causes[0], "end of attempt 1")
    change_settings(run, hold_at=None)
    cluster("scontrol", "update", "nodename=n2", "state=resume")
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["node_fail", "done"]
    assert [(a.job, a.restart, a.host) for a in attempts.read_attempts(run)] == [(job, 0, "n2"), (job, 0, "n1")]


@pytest.mark.slurm
@full
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_that_dies_with_all_its_processes_is_recorded_as_node_fail(
    slurm_runner, make_stub_run, configure_slurm, node
):
    """n1 has the batch script, srun and rank 0: after its death nothing of the attempt is left to record the end."""
    run, cluster = make_stub_run(steps=ENDLESS), slurm_runner.cluster
    configure_slurm("SlurmdTimeout=10")
    slurm_runner.submit(run)
    slurm_runner.wait_for_step(5)
    # all that SLURM started on the node, and its daemon: none of them can report the end to the controller
    daemon = cluster.processes[f"slurmd {node}"]
    tasks = {rank: pid for rank, pid in slurm_runner.tasks.items() if (rank == 0) is (node == "n1")}
    batch = [slurm_runner.find_process(name) for name in ("batch", "srun")] if node == "n1" else []
    steps = {processes.read_process(pid).parent for pid in [*batch[:1], *tasks.values()]}
    daemon.kill()
    for pid in [*steps, *batch, *tasks.values()]:
        os.kill(pid, signal.SIGKILL)
    slurm_runner.wait_until(lambda: "DOWN" in cluster("scontrol", "show", "node", node), "node down")
    cluster.restart(f"slurmd {node}")
    change_settings(run, steps=1)
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["node_fail", "done"]
    # rank 0 on n1 survives the death of n2, but saves nothing without rank 1
    assert attempts.read_attempts(run)[0].error == f"lost {node}"


@pytest.mark.slurm
@full
def test_status_names_the_command_that_releases_a_job_whose_launch_failed(slurm_runner, make_stub_run):
    run, cluster = make_stub_run(steps=20), slurm_runner.cluster
    spool, moved = cluster.root / "spool.n1", cluster.root / "spool.n1.moved"
    spool.rename(moved)
    spool.write_text("")
    try:
        job = slurm_runner.submit(run, nodelist="n1,n2")
        slurm_runner.wait_until(lambda: "held" in status.query_run(run).state, "held job")
    finally:
        spool.unlink()
        moved.rename(spool)
    report = status.query_run(run)
    assert "launch_failed_requeued_held" in report.state and report.attempt == 0
    assert f"scontrol release {job}" in report.hint and report.hint in report.line()
    cluster("scontrol", "release", job)
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["done"]


@pytest.mark.slurm
@full
def test_status_names_the_command_that_removes_a_job_whose_dependency_failed(slurm_runner, make_stub_run):
    run, cluster = make_stub_run(crash_at=3), slurm_runner.cluster
    job = slurm_runner.submit(run)
    child = batch_script.submit(run, "knn", {"dependency": f"afterok:{job}"}, Profile())
    cluster("scontrol", "update", f"jobid={child}", "KillOnInvalidDependent=no")
    options = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=no", "-o", f"{run.logs}/%j", "-J", "run-linear"]
    options += ["--wrap", "true"]
    kept = cluster("sbatch", "--parsable", *options).strip()
    job_log.record_event(run, "submit", kept, what="linear", kind="slurm", options={})
    assert slurm_runner.wait_for_end() == "FAILED"
    slurm_runner.wait_until(lambda: "DependencyNeverSatisfied" in status.query_run(run).line(), "state of the child")
    assert f"scancel {kept}" in status.query_run(run).hint
    cluster("scancel", kept)


LATE_PROCESS = """
import sys
from hpcssl.run_dir import RunDir
from slurm.job import epilogue, requeue, task
from slurm.log import attempts
run = RunDir(sys.argv[1])
attempt = task.describe_attempt(run, "train")
assert attempt["attempt"] == 1
attempts.record_end(run, "train", attempt, "killed", "late")
print(requeue.handle_stop(run, "train", attempt, ["SIGTERM"]))
print(epilogue.finalize_step(run, "train", 137))
"""


@pytest.mark.slurm
@full
def test_a_leftover_process_of_attempt_1_does_not_change_attempt_2(slurm_runner, make_stub_run):
    """It records no end and requests no requeue, although it has the environment of attempt 1."""
    run = make_stub_run(steps=400, hold_at=300)
    job = slurm_runner.submit(run)
    slurm_runner.wait_for_step(5)
    environment = processes.read_environment(slurm_runner.tasks[0])
    control.preempt(run)
    slurm_runner.wait_until(lambda: len(slurm_runner.causes) == 2, "attempt 2")
    command = [sys.executable, "-c", LATE_PROCESS, str(run.root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    time.sleep(1)  # nothing must happen, and there is no event to wait for: more time could only find more
    assert slurm_runner.cluster.field(job, "Restarts") == "1" and slurm_runner.causes == ["preempted", None]
    change_settings(run, hold_at=None)
    assert slurm_runner.wait_for_end() == "COMPLETED"
    assert slurm_runner.causes == ["preempted", "done"]
