"""The command line in two parts, and sbatch's own spellings of everything."""

import subprocess

import pytest

from hpcssl.errors import ConfigError
from slurm import options, shape


@pytest.mark.parametrize(("typed", "sbatch"), [
    ("--nodes=2", {"nodes": "2"}), ("--nodes 2", {"nodes": "2"}), ("-N2", {"nodes": "2"}), ("-N 2", {"nodes": "2"}),
    ("-pgpu -t 1-0", {"partition": "gpu", "time": "1-0"}), ("-HO", {"hold": True, "overcommit": True}),
    ("-HN3", {"hold": True, "nodes": "3"}), ("--exclusive", {"exclusive": True}), ("-k", {"no-kill": True}),
    ("--exclusive=user", {"exclusive": "user"}), ("--nice=100", {"nice": "100"}), ("--nice", {"nice": True}),
    ("--tasks-per-node=4", {"ntasks-per-node": "4"}), ("--comment=a=b", {"comment": "a=b"}), ("-d afterok:3", {
        "dependency": "afterok:3"}), ("--requeue", {"requeue": True}), ("--open-mode=append", {"open-mode": "append"}),
    ("--kill-on-invalid-dep yes", {"kill-on-invalid-dep": "yes"}), ("--segment=4", {"segment": "4"}),
])
def test_every_spelling_of_sbatch_is_taken_in_any_position(typed, sbatch):
    words = typed.split()
    for argv in (["digits_msf", "--run", "r", *words, "optim.lr=0.1"],
                 [*words, "digits_msf", "optim.lr=0.1", "--run=r"]):
        parts = options.split(argv)
        assert parts.sbatch == sbatch
        assert sorted(parts.ours) == ["--run=r", "digits_msf", "optim.lr=0.1"]


def test_what_is_ours_stays_ours():
    parts = options.split(["r.yaml", "--evals", "knn,linear", "--local", "-W", "--sbatch", "--any=1", "a.b=-3", "--",
                           "--nodes=9"])
    assert parts.sbatch == {}
    assert parts.ours == ["r.yaml", "--evals=knn,linear", "--local", "--wait", "--sbatch=--any=1", "a.b=-3", "--",
                          "--nodes=9"]


@pytest.mark.parametrize(("typed", "mend"), [
    ("--particion=gpu", "--partition"), ("--gpu-per-node=2", "--gpus-per-node"), ("--evalz=knn", "--evals"),
    ("-Z", "--sbatch"), ("--nodes", "VALUE"), ("--hold=yes", "alone"), ("--output=x", "logs RUN"),
    ("-o x", "logs RUN"), ("--array=0-3", "loop"), ("--wrap=ls", "profile"), ("--no-requeue", "leave it out"),
    ("--open-mode=truncate", "leave it out"), ("--signal=KILL@60", "USR2@300"), ("--signal=B:USR1@60", "USR2@300"),
    ("--time=soon", "2:00:00"), ("--quiet", "--parsable"), ("--test-only", "--dry-run"),
    ("--kill-on-invalid-dep=no", "leave it out"),
])
def test_what_cannot_be_meant_is_refused_with_its_mend(typed, mend):
    with pytest.raises(ConfigError, match="to mend: .*" + mend.replace("-", r"\-")) as caught:
        options.split(typed.split())
    assert caught.value.exit_code == 2


def test_no_option_can_start_a_line_of_the_batch_script():
    with pytest.raises(ConfigError, match="one line"):
        options.split(["--comment=x\ntouch here"])
    with pytest.raises(ConfigError, match="one line"):
        options.one("--comment=x\ntouch here")
    with pytest.raises(ConfigError, match="one long option"):
        options.one("comment=x; touch here")


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 5_400), ("0:30", 30), ("1:30", 90), ("2:00:00", 7_200), ("100:00:01", 360_001), ("1-0", 86_400),
    ("0-2", 7_200), ("1-12:30", 131_400), ("1-2:03:04", 93_784), ("infinite", None), ("UNLIMITED", None), ("-1", None),
])
def test_time_in_all_of_sbatchs_forms(text, seconds):
    assert options.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1-", "1-2:3:4:5", "-5", "1h", "0", "0:00", "1:-2", "1.5"])
def test_times_that_are_none(text):
    with pytest.raises(ConfigError):
        options.seconds(text)


@pytest.mark.slurm
def test_the_table_knows_every_option_of_the_installed_sbatch(cluster):
    """Against sbatch's own help: names, short forms, and whether a value follows."""
    import re

    text = subprocess.run(["sbatch", "--help"], capture_output=True, text=True).stdout
    found = re.findall(r"^\s{2,6}(?:-(\w),?\s+)?--([a-z][\w-]+)(\[?=)?", text, re.M)
    assert len(found) > 80
    for short, name, sign in found:
        if name in options.OURS:
            continue
        assert name in options.SBATCH, name
        assert options.SBATCH[name] == short, name
        if sign:
            assert name in (options.MAYBE_VALUE if sign == "[=" and name != "wrap" and name != "export"
                            else options.WITH_VALUE | options.MAYBE_VALUE), name


@pytest.mark.parametrize(("sbatch", "tasks", "gpus"), [
    ({}, 1, 0), ({"ntasks-per-node": "4"}, 4, 0), ({"gpus-per-node": "8"}, 8, 8), ({"gpus-per-node": "a100:4"}, 4, 4),
    ({"gres": "gpu:2"}, 2, 2), ({"gres": "lustre,gpu:h100:3(S:0-1)"}, 3, 3), ({"gpus": "8", "nodes": "2"}, 4, 4),
    ({"gpus-per-node": "4", "ntasks-per-node": "2"}, 2, 4), ({"ntasks": "7"}, None, 0),
    ({"gpus-per-task": "1", "ntasks": "4"}, None, 0), ({"gpus-per-node": "a100"}, 1, 1),
])
def test_processes_per_node(sbatch, tasks, gpus):
    assert (shape.tasks_per_node(sbatch), shape.gpus_per_node(sbatch)) == (tasks, gpus)


@pytest.mark.parametrize(("sbatch", "wanted"), [
    ({}, ("USR2", 300)), ({"time": "10"}, ("USR2", 120)), ({"time": "2:00:00"}, ("USR2", 300)),
    ({"time": "infinite"}, ("USR2", 300)), ({"signal": "USR1@60"}, ("USR1", 60)), ({"signal": "@77"}, ("USR2", 77)),
    ({"signal": "12", "time": "5"}, ("USR2", 60)), ({"signal": "R:TERM@5"}, ("TERM", 5)),
    ({"time": "0:03"}, ("USR2", 1)),
])
def test_lead_of_the_signal(sbatch, wanted):
    assert shape.signal(sbatch) == wanted


def test_an_evaluation_takes_over_the_site_and_not_the_size():
    train = {"nodes": "4", "gpus-per-node": "h100:8", "partition": "gpu", "account": "a", "time": "2-0",
             "dependency": "afterok:1", "ntasks-per-node": "8", "cpus-per-task": "6", "exclusive": True}
    assert shape.evaluation(train, {"time": "30"}) == {
        "nodes": "1", "gpus-per-node": "h100:1", "partition": "gpu", "account": "a", "time": "30",
        "cpus-per-task": "6", "exclusive": True}
    assert shape.evaluation({"ntasks": "3"}, {"ntasks-per-node": "2"}) == {"nodes": "1", "ntasks-per-node": "2"}


@pytest.mark.parametrize(("train", "given", "kept"), [
    ({"gres": "gpu:a100:4", "hold": True}, {}, {"gpus-per-node": "a100:1"}),
    ({"gres": "lustre:1,gpu:h100:3(S:0-1)"}, {}, {"gres": "lustre:1", "gpus-per-node": "h100:1"}),
    ({"gpus": "a100:8", "nodes": "2"}, {}, {"gpus-per-node": "a100:1"}),
    ({"gres": "gpu:2"}, {}, {"gpus-per-node": "1"}),
    ({"gpus-per-task": "1", "ntasks": "4"}, {}, {"gpus-per-node": "1"}),
    ({"gres": "lustre:1"}, {}, {"gres": "lustre:1"}),
    ({"gpus-per-node": "h100:8"}, {"gpus": "2"}, {"gpus": "2"}),
])
def test_an_evaluation_keeps_the_type_of_its_gpu(train, given, kept):
    assert shape.evaluation(train, given) == {"nodes": "1", **kept}


def test_what_an_evaluation_waits_for_besides():
    assert shape.after("7", {"time": "1"}) == {"time": "1", "dependency": "afterok:7"}
    assert shape.after("7", {"dependency": "singleton"}) == {"dependency": "afterok:7,singleton"}
    with pytest.raises(ConfigError, match="commas instead"):
        shape.after("7", {"dependency": "afterok:1?afterok:2"})
