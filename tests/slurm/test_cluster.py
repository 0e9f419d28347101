"""On a real SLURM: two nodes with two tasks each, preemption, walltime, crashes, cancels, and chains of jobs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import loopback
from hpcssl.errors import SubmitError
from hpcssl.files import RunDir, read_lines
from slurm import attempts, chain, control, procs, records, sched, script, submit, watch
from slurm.cluster import Profile

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

FOUR = {"nodes": "2", "ntasks-per-node": "2"}
RECIPE = ["optim.batch=64", "bank.size=128", "schedule.steps=30", "machine.log_steps=1", "machine.devices=cpu",
          "machine.checkpoint_steps=7", "evals.linear.epochs=1"]


def say(*words):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def submit_msf(cluster, digits, tmp_path_factory):
    """Submit the same small training by the command line; the run folder and the jobs' ids by name."""
    def go(*words):
        run = RunDir(tmp_path_factory.mktemp("runs") / "run")
        out = say("slurm", "digits_msf", "--run", str(run.root), "-N2", "--ntasks-per-node=2", *words, *RECIPE,
                  f"data.train={digits / 'train'}", f"data.val={digits / 'val'}")
        jobs = records.submitted(run)
        assert out.splitlines()[0] == f"Submitted batch job {jobs['train'].job}"
        return run, {what: job.job for what, job in jobs.items()}
    return go


@pytest.fixture(scope="module")
def undisturbed(submit_msf):
    return submit_msf("--time", "10")


def ends(cluster, job, state="COMPLETED"):
    """Through as many requeues as it takes."""
    cluster.until(pushed(cluster, job, lambda: cluster.field(job, "JobState") == state), f"job {job} {state}", 180)


def pushed(cluster, job, true):
    """The condition, looked at while every requeue of the job is let go on without SLURM's two minutes of waiting.

    A little of it must pass: a node that has just ended a job refuses to start it ("already killed").
    """
    def look():
        if cluster.field(job, "Reason") == "BeginTime":
            time.sleep(2)
            cluster("scontrol", "update", f"jobid={job}", "StartTime=now")
        return true()
    return look


def training(run, step):
    return lambda: attempts.reached(run) >= step


def pending(pid, number):
    """Whether a signal waits for a process, or the process is gone."""
    if procs.look(pid) is None:
        return True
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["ShdPnd"], 16) & 1 << (number - 1))


def causes(run):
    return [a.cause for a in attempts.history(run)]


@pytest.mark.full
def test_the_end_of_the_time_changes_nothing(cluster, submit_msf, undisturbed):
    run, jobs = submit_msf("--time", "1")
    cluster.until(pushed(cluster, jobs["train"], training(run, 3)), "step 3", 120)
    tasks = list(loopback.tasks_of(jobs["train"]).values())
    assert len(tasks) == 4
    held = [p for p in map(procs.look, tasks) if p]
    # hold the training still until SLURM's warning has come: it comes when it likes, and may bring CONT itself
    procs.send(held, signal.SIGSTOP)
    cluster.until(lambda: all(pending(p.pid, signal.SIGUSR2) for p in held), "warning of the time limit", 70)
    procs.send(held, signal.SIGCONT)
    ends(cluster, jobs["train"])
    assert set(causes(run)[:-1]) == {"timeout"}
    assert causes(run)[-1] == "done"
    assert attempts.history(run)[0].error == "SIGUSR2"
    ends(cluster, undisturbed[1]["train"])
    assert say("hpcssl", "digest", str(run.root)) == say("hpcssl", "digest", str(undisturbed[0].root))


def test_a_preemption_changes_nothing_and_evaluations_run_once(cluster, submit_msf, undisturbed, digits):
    chained = ("knn:k=1+20", "linear")
    words = ["--time", "10", "--evals", ",".join(chained), "--eval-every", "1"]  # an epoch ends at step 22
    run, jobs = submit_msf(*words)
    chained = jobs.keys() - {"train"}
    assert chained == {"knn:k=[1,20]", "linear"}
    cluster.until(training(run, 5), "step 5", 120)
    cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    cluster.until(lambda: cluster.field(jobs["train"], "Restarts") == "1", "requeue")
    for job in chained:
        assert cluster.field(jobs[job], "JobState") == "PENDING"
    ends(cluster, jobs["train"])
    assert watch.wait(run, lambda text: None) == 0
    assert causes(run) == ["preempted", "done"]
    assert attempts.history(run)[0].error == "SIGTERM"
    assert cluster.field(jobs["train"], "Restarts") == "1"
    for job in chained:
        assert [a.cause for a in attempts.history(run, job)] == ["done"]
        assert sorted(row["step"] for row in read_lines(run.eval_rows(job.partition(":")[0]))) == [0, 22, 30]
    ends(cluster, undisturbed[1]["train"])
    assert say("hpcssl", "digest", str(run.root)) == say("hpcssl", "digest", str(undisturbed[0].root))
    line = say("slurm", "status", str(run.root)).strip()
    assert "\n" not in line
    assert all(word in line for word in (f"job={jobs['train']}", "state=COMPLETED", "attempt=2", "step=30/30",
                                         f"linear=COMPLETED job {jobs['linear']}"))
    before = run.jobs.read_text()
    assert say("slurm", "digits_msf", "--run", str(run.root), "-N2", "--ntasks-per-node=2", *words, *RECIPE,
               f"data.train={digits / 'train'}", f"data.val={digits / 'val'}") == ""
    assert run.jobs.read_text() == before


def by_stand_in(run, evals=()):
    parent = script.submit(run, "train", FOUR, Profile())
    children = [script.submit(run, name, {"dependency": f"afterok:{parent}"}, Profile()) for name in evals]
    return [parent, *children]


def test_preempt_and_cancel_by_hand(cluster, stand_in):
    run = stand_in(steps=100_000)
    job, child = by_stand_in(run, ["knn"])
    assert list(submit._living(run)) == ["train", "knn"]
    cluster.until(training(run, 5), "step 5")
    assert job in control.preempt(run)
    cluster.until(pushed(cluster, job, lambda: len(causes(run)) == 2 and training(run, 60)()), "second attempt")
    places = read_lines(run.root / "places.jsonl")
    assert len({p["MASTER_PORT"] for p in places}) == len({p["HPCSSL_TOKEN"] for p in places}) == 2
    assert sorted(p["RANK"] for p in places if p["attempt"] == 2) == ["0", "1", "2", "3"]
    assert control.cancel(run) == [job, child]
    ends(cluster, job, "CANCELLED")
    assert causes(run) == ["preempted", "cancelled"]
    assert [x["answer"] for x in read_lines(run.root / "answers.jsonl")] == [None, "the job was cancelled"]


def test_a_plain_scancel_is_not_brought_back_to_life(cluster, stand_in):
    run = stand_in(steps=100_000)
    job, child = by_stand_in(run, ["knn"])
    cluster.until(training(run, 5), "step 5")
    cluster("scancel", job)
    ends(cluster, job, "CANCELLED")
    ends(cluster, child, "CANCELLED")
    assert causes(run) == ["cancelled"] and "last=cancelled" in watch.report(run).line()
    assert read_lines(run.root / "answers.jsonl") == [{"answer": "the job was cancelled"}]
    assert "submit again" in watch.report(run).note
    assert not submit._living(run)


@pytest.mark.full
def test_a_killed_task_is_requeued_by_the_batch_script(cluster, stand_in):
    run = stand_in(steps=60)
    job, child = by_stand_in(run, ["knn"])
    cluster.until(training(run, 5), "step 5")
    os.kill(loopback.tasks_of(job)[3], signal.SIGKILL)
    ends(cluster, job)
    ends(cluster, child)
    assert causes(run)[-1] == "done"
    assert len(causes(run)) == 2
    assert len(read_lines(run.eval_rows("knn"))) == 1


def test_two_crashes_at_the_same_step_end_the_job_and_its_chain(cluster, stand_in):
    run = stand_in(crash_at=5, crash_rank=0)
    job, child = by_stand_in(run, ["knn"])
    ends(cluster, job, "FAILED")
    ends(cluster, child, "CANCELLED")
    assert causes(run) == ["error", "error"]
    report = watch.report(run)
    assert "two crashes in a row at the same step" in report.note
    assert watch.wait(run, lambda text: None) == 1
    assert not run.eval_rows("knn").exists()


def test_a_partition_that_cancels_what_it_preempts_loses_nothing(cluster, stand_in):
    """And what is evaluated beside it is submitted from inside the job, in whichever attempt."""
    run = stand_in(steps=150, step_s=0.05, export=[10, 80])
    look = run.code / "slurm" / "beside.py"
    look.write_text(look.read_text().replace("POLL_S = 5.0", "POLL_S = 0.2"))
    chain.write(run, {"knn": {"every": 10, "sbatch": {"nice": "1"}}}, last=150, kind="slurm",
                profile=Profile(python=sys.executable))
    job = script.submit(run, "train", FOUR | {"partition": "cancel"}, Profile())
    child = script.submit(run, "knn", {"dependency": f"afterok:{job}"}, Profile())
    cluster.until(lambda: "knn@10" in records.submitted(run), "evaluation beside the training")
    cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    ends(cluster, job)
    ends(cluster, child)
    assert causes(run) == ["preempted", "done"]
    assert cluster.field(job, "Restarts") == "1"
    for what in ("knn@10", "knn@80"):
        ends(cluster, records.submitted(run)[what].job)
    assert watch.report(run).evals["knn@*"] == "2 COMPLETED"
    assert sorted(row["eval"] for row in read_lines(run.eval_rows("knn"))) == ["knn", "knn@10", "knn@80"]


def test_sbatchs_refusal_is_one_sentence_and_leaves_no_half_chain(cluster, stand_in):
    run = stand_in()
    with pytest.raises(SubmitError, match=r"sbatch: got .*partition.* to mend: change the option"):
        submit._through_sbatch(run, {"train": {"time": "1"}, "knn": {"partition": "nowhere"}}, Profile())
    job = records.submitted(run)["train"].job
    cluster.until(lambda: not sched.ask(job).live, "cancel of the first job")


def test_the_variables_of_a_job_around_us_stay_outside(cluster, stand_in, monkeypatch):
    """Submitted from inside another job, whose sizes would otherwise become the new job's."""
    for name, value in {"SLURM_NTASKS": "9", "SLURM_JOB_ID": "99", "SLURM_PROCID": "3", "RANK": "5",
                        "WORLD_SIZE": "9"}.items():
        monkeypatch.setenv(name, value)
    run = stand_in()
    job = script.submit(run, "train", {"ntasks-per-node": "2", "export": "NONE"}, Profile())
    ends(cluster, job)
    assert {p["WORLD_SIZE"] for p in read_lines(run.root / "places.jsonl")} == {"2"}
    assert os.environ["SLURM_NTASKS"] == "9"
