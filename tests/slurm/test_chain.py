"""Evaluations with options, beside the training and after it: what is due, and what asking again submits."""

import json
import os
import signal

import pytest

from hpcssl.errors import EXIT_FAILED, SubmitError
from hpcssl.files import RunDir, atomic_write, read_lines
from slurm import attempts, beside, chain, control, local, procs, records, sched, script, submit, watch
from slurm.cluster import Profile


@pytest.mark.parametrize(("text", "written"), [
    ("knn,linear:protocol=moco,transfer:sets=dtd+pets", ["knn", "linear:protocol=moco", "transfer:sets=dtd+pets"]),
    ("knn:tau=0.1:k=[1,5], linear,", ["knn:k=[1,5]:tau=0.1", "linear"]),
    ("linear:val='/a,b:c':lr=1", ["linear:lr=1:val='/a,b:c'"]),
    ("knn@220:k=[1]", ["knn@220:k=[1]"]),
])
def test_an_entry_is_read_as_it_is_written(text, written):
    entries = chain.parse(text)
    assert [str(e) for e in entries] == written
    assert [chain.entry(str(e)) for e in entries] == entries


def test_lists_and_folders_are_settled_at_submission(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "list").mkdir(parents=True)
    asked = chain.entry("transfer:sets=dtd+pets:k=1:lr=1e+3:train=a:names=a/list:val='b c'")
    settled = chain.settled(asked, {"sets": True, "k": True})
    assert settled.overrides == ["k=[1]", "lr=1e+3", f"names={tmp_path}/a/list", "sets=[dtd,pets]"]
    assert settled.shards == {"train": f"{tmp_path}/a", "val": f"{tmp_path}/b c"}
    assert chain.settled(settled, {"sets": True, "k": True}) == settled


@pytest.fixture
def planned(stand_in):
    """A stand-in whose weights of steps 10 and 20, of 30, are to be evaluated by k-NN beside it, and told more."""
    def make(**told):
        run = stand_in(export=[5, 10, 20], **told)
        how = {"every": 10, "sbatch": {"nodes": "1"}}
        chain.write(run, {"knn": how, "linear:lr=1": how}, last=told.get("steps", 30), kind="local", profile=Profile())
        return run
    return make


def told(run, name):
    return sorted(row["eval"] for row in read_lines(run.eval_rows(name)))


def test_beside_the_training_each_once_and_the_last_ones_after_it(planned):
    run = planned(step_s=0.1, crash=["linear@10:lr=1"])
    local.launch(run, {"train": {}, "knn": {}, "linear:lr=1": {}})
    assert watch.wait(run, lambda text: None) == 1
    assert [a.cause for a in attempts.history(run)] == ["done"]
    # by jobs of their own, or by the evaluation of the last weights where it came first
    assert told(run, "knn") == ["knn", "knn@10", "knn@20"]
    assert told(run, "linear") == ["linear:lr=1", "linear@20:lr=1"]
    jobs = records.submitted(run)
    assert "knn@10" in jobs and "knn@5" not in jobs and not chain.due(run)
    assert 10 not in chain.left_over(run, chain.entry("linear:lr=1"))
    report = watch.report(run)
    assert report.evals["knn"].startswith("COMPLETED") and report.evals["knn@*"].endswith(" COMPLETED")
    assert "linear:lr=1=COMPLETED" in report.line() and "1 FAILED" in report.evals["linear@*:lr=1"]
    assert "linear@10:lr=1: job" in report.note and "told to crash" in report.note


def test_what_was_beside_a_killed_supervisor_is_made_up_for(planned, until):
    run = planned(steps=30, step_s=0.15)
    train = local.launch(run, {"train": {}, "knn": {}})[0]
    job = until(lambda: records.submitted(run).get("knn@10"), "job beside")
    assert local.ask(run, job).live
    leader = until(lambda: local.supervisor(run, job), "supervisor beside")["pid"]
    os.kill(leader, signal.SIGKILL)
    procs.clear(leader)
    assert local.ask(run, train).live
    assert watch.wait(run, lambda text: None, jobs=[train, records.submitted(run)["knn"]]) in (0, EXIT_FAILED)
    assert told(run, "knn") == ["knn", "knn@10", "knn@20"]


def test_nothing_is_due_once_the_training_is_cancelled(planned):
    run = planned()
    records.note(run, "submit", "7", what="train", kind="slurm", options={})
    for step in (5, 10, 30):
        atomic_write(run.weights_at(step), "weights")
    assert [str(e) for e in chain.due(run)] == ["knn@10", "linear@10:lr=1"]
    records.note(run, "cancel", "7")
    assert chain.due(run) == []
    records.note(run, "cancel", "7", refused=True)
    assert len(chain.due(run)) == 2


def test_a_refused_cancel_is_taken_back(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    records.note(run, "submit", "7", what="train", kind="slurm", options={})
    monkeypatch.setattr(watch, "state_of", lambda run, job: sched.State("RUNNING"))
    monkeypatch.setattr(sched, "call", lambda *words, cluster: sched.subprocess.CompletedProcess(words, 1, "", "no"))
    with pytest.raises(SubmitError, match="got no"):
        control.cancel(run)
    assert not records.cancelled(run, "7")


@pytest.mark.parametrize(("machine", "train", "spare"), [
    ("auto", {}, None), ("auto", {"gpus-per-node": "1"}, "GPU-b"), ("auto", {"gpus-per-node": "2"}, None),
    ("cpu", {}, "")])
def test_beside_a_local_training_only_on_gpus_that_it_does_not_use(tmp_path, monkeypatch, machine, train, spare):
    run = RunDir(tmp_path)
    atomic_write(run.config, f"machine: {{devices: {machine}}}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert local.spare_gpus(run, train) == spare


# -- asking again, with a scheduler that only remembers ---------------------------------------------------------


@pytest.fixture
def ask(monkeypatch, digits, tmp_path):
    """``ask(evals, …)`` submits a recipe to a scheduler that gives numbers; what each new job does, by number.

    ``ask.states``: what it says of each job (pending without an entry); ``ask.missing``: evaluations without a row.
    """
    run = RunDir(tmp_path / "run")

    def handed(run, what, sbatch, profile):
        job = str(len(ask.sbatch) + 1)
        ask.sbatch[job] = sbatch
        records.note(run, "submit", job, what=what, kind="slurm", options=sbatch)
        return job

    def ask(evals="knn,linear:lr=1", every=0, *overrides, **more):
        jobs = submit.submit(submit.Request(
            run=str(run.root), recipe="digits_msf", evals=evals, eval_every=every, **more, overrides=[
                f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", "schedule.epochs=3", *overrides]))
        return {job.what: job.job for job in jobs}

    def state(run, job):
        return sched.State(ask.states.get(job.job, "PENDING"))

    ask.run, ask.sbatch, ask.states, ask.missing, ask.ended = run, {}, {}, set(), []
    monkeypatch.setattr(script, "submit", handed)
    monkeypatch.setattr(sched, "require", lambda: None)
    monkeypatch.setattr(submit.freeze, "freeze", lambda run: None)
    monkeypatch.setattr(watch, "state_of", state)
    monkeypatch.setattr(submit, "_missing", lambda run, entry: str(entry) in ask.missing)
    monkeypatch.setattr(control, "end", lambda run, job: ask.ended.append(job.job))
    return ask


def test_asking_again_submits_nothing_that_lives(ask):
    assert ask() == {"train": "1", "knn": "2", "linear:lr=1": "3"}
    assert ask.sbatch["2"]["dependency"] == ask.sbatch["3"]["dependency"] == "afterok:1"
    assert ask() == {}
    ask.states["1"] = "RUNNING"
    assert ask() == ask("knn") == {}
    assert ask("knn,linear:lr=2") == {"linear:lr=2": "4"}
    assert ask.sbatch["4"]["dependency"] == "afterok:1"
    with pytest.raises(SubmitError, match=r"machine\.log_steps, while job 1"):
        ask("knn", 0, "machine.log_steps=3")
    with pytest.raises(SubmitError, match="with --local, while job 1"):
        ask("knn", local=True)
    ask.states["1"] = "UNKNOWN"
    with pytest.raises(SubmitError, match="expected an answer of SLURM"):
        ask()


def test_a_training_that_failed_gets_its_chain_anew(ask):
    ask()
    ask.states |= {"1": "FAILED", "2": "CANCELLED"}  # 3 is still in the queue, and waits for 1
    assert ask() == {"train": "4", "knn": "5", "linear:lr=1": "6"}
    assert ask.ended == ["3"]
    assert ask.sbatch["6"]["dependency"] == "afterok:4"


def test_of_a_finished_run_only_what_is_missing(ask):
    ask("knn,linear:lr=1", 1)
    ask.states |= dict.fromkeys("123", "COMPLETED")
    for step in (0, 11, 22, 33):
        atomic_write(ask.run.weights_at(step), "weights")
    atomic_write(ask.run.done, json.dumps({"step": 33, "weights": str(ask.run.weights_at(33))}))
    assert ask("knn,linear:lr=1", 1) == ask("") == {}
    ask.missing = {"linear:lr=1", "knn@22", "linear@11:lr=1", "linear@22:lr=1"}
    assert ask("knn") == {}
    assert ask("knn,linear:lr=1", 1) == {"linear:lr=1": "4", "linear@11:lr=1": "5", "knn@22": "6",
                                         "linear@22:lr=1": "7"}
    assert "dependency" not in ask.sbatch["4"] and ask.sbatch["6"]["nice"] == "10000"
    assert ask("knn,linear:lr=1", 1) == {}
    ask.states["6"] = "FAILED"
    assert ask("knn", 1) == {"knn@22": "8"}


def test_a_running_training_submits_what_is_due_once(ask, capfd):
    ask("knn", 2, "machine.export_epochs=3", sbatch={"gres": "gpu:h100:4", "hold": True},
        eval_sbatch={"": {"dependency": "singleton", "time": "9"}, "knn": {"time": "30"}})
    assert ask.sbatch["2"] == {"nodes": "1", "gpus-per-node": "h100:1", "dependency": "afterok:1,singleton",
                               "time": "30"}
    assert "export_epochs: 1" in ask.run.config.read_text()
    for step in (11, 22):
        atomic_write(ask.run.weights_at(step), "weights")
    assert beside.main(ask.run.root) == 0
    assert beside.main(ask.run.root) == 0
    assert "submitted job 3 (knn@22)" in capfd.readouterr().err
    assert ask.sbatch["3"] == {"nodes": "1", "gpus-per-node": "h100:1", "dependency": "singleton", "time": "30",
                               "nice": "10000"}
    assert len(ask.sbatch) == 3
    ask.missing = {"knn@22"}
    ask.states["3"] = "FAILED"
    assert ask("knn", 2, "machine.export_epochs=3", sbatch={"gres": "gpu:h100:4", "hold": True}) == {"knn@22": "4"}


def test_a_full_queue_is_told_and_tried_again(ask, monkeypatch, capfd):
    ask("knn", 1)
    atomic_write(ask.run.weights_at(11), "weights")

    def refuse(*_):
        raise SubmitError("sbatch", got="QOSMaxSubmitJobPerUserLimit", expected="a job id", mend="wait")
    with monkeypatch.context() as patched:
        patched.setattr(script, "submit", refuse)
        assert beside.main(ask.run.root) == 1
    assert "QOSMaxSubmitJobPerUserLimit" in capfd.readouterr().err
    assert [str(e) for e in chain.due(ask.run)] == ["knn@11"]
