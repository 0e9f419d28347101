"""Options of sbatch: every form that sbatch takes, refusals with a fix, times, signals, and numbers of tasks."""

import re
import subprocess

import pytest

from hpcssl.errors import EXIT_USAGE, ConfigError
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, resources, sbatch_options, sbatch_table
from slurm.backend.profiles import Profile


@pytest.mark.parametrize(
    ("typed", "sbatch"),
    [
        ("--nodes=2", {"nodes": "2"}),
        ("--nodes 2", {"nodes": "2"}),
        ("-N2", {"nodes": "2"}),
        ("-N 2", {"nodes": "2"}),
        ("-pgpu -t 1-0", {"partition": "gpu", "time": "1-0"}),
        ("-HO", {"hold": True, "overcommit": True}),
        ("-HN3", {"hold": True, "nodes": "3"}),
        ("--exclusive", {"exclusive": True}),
        ("-k", {"no-kill": True}),
        ("--exclusive=user", {"exclusive": "user"}),
        ("--nice=100", {"nice": "100"}),
        ("--nice", {"nice": True}),
        ("--tasks-per-node=4", {"ntasks-per-node": "4"}),
        ("--comment=a=b", {"comment": "a=b"}),
        ("-d afterok:3", {"dependency": "afterok:3"}),
        ("--requeue", {"requeue": True}),
        ("--open-mode=append", {"open-mode": "append"}),
        ("--kill-on-invalid-dep yes", {"kill-on-invalid-dep": "yes"}),
        ("--segment=4", {"segment": "4"}),
    ],
)
def test_options_of_sbatch_are_split_off_in_every_form_and_position(typed, sbatch):
    words = typed.split()
    for argv in (
        ["digits_msf", "--run", "r", *words, "optim.lr=0.1"],
        [*words, "digits_msf", "optim.lr=0.1", "--run=r"],
    ):
        parts = sbatch_options.split_command_line(argv)
        assert parts.sbatch == sbatch
        assert sorted(parts.own) == ["--run=r", "digits_msf", "optim.lr=0.1"]


def test_options_of_hpcssl_submit_and_words_after_two_dashes_are_kept():
    argv = ["r.yaml", "--evals", "knn,linear", "--local", "-W", "--sbatch", "--any=1", "a.b=-3", "--", "--nodes=9"]
    parts = sbatch_options.split_command_line(argv)
    assert parts.sbatch == {}
    assert parts.own == [
        "r.yaml",
        "--evals=knn,linear",
        "--local",
        "--wait",
        "--sbatch=--any=1",
        "a.b=-3",
        "--",
        "--nodes=9",
    ]


@pytest.mark.parametrize(
    ("typed", "what", "fix"),
    [
        ("--particion=gpu", "--particion", "--partition"),
        ("--gpu-per-node=2", "--gpu-per-node", "--gpus-per-node"),
        ("--evalz=knn", "--evalz", "--evals"),
        ("-Z", "-Z", "--sbatch"),
        ("--nodes", "--nodes", "VALUE"),
        ("--hold=yes", "--hold", "--hold alone"),
        ("--output=x", "--output", "logs RUN"),
        ("-o x", "--output", "logs RUN"),
        ("--array=0-3", "--array", "sweep"),
        ("--wrap=ls", "--wrap", "profile"),
        ("--no-requeue", "--no-requeue", "leave it out"),
        ("--open-mode=truncate", "--open-mode", "leave it out"),
        ("--signal=KILL@60", "--signal", "--signal=USR2@300"),
        ("--signal=B:USR1@60", "--signal", "--signal=USR2@300"),
        ("--time=soon", "--time", "2:00:00"),
        ("--quiet", "--quiet", "--parsable"),
        ("--test-only", "--test-only", "--dry-run"),
        ("--kill-on-invalid-dep=no", "--kill-on-invalid-dep", "leave it out"),
    ],
)
def test_an_unknown_or_reserved_option_is_refused_with_a_fix(typed, what, fix):
    with pytest.raises(ConfigError) as caught:
        sbatch_options.split_command_line(typed.split())
    assert caught.value.what == f"option {what}"
    assert fix in caught.value.fix
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("parse", "what"),
    [
        (lambda: sbatch_options.split_command_line(["--comment=x\ntouch here"]), "option --comment"),
        (lambda: sbatch_options.parse_option("--comment=x\ntouch here"), "option --comment"),
        (lambda: sbatch_options.parse_option("comment=x; touch here"), "option --sbatch"),
        (lambda: sbatch_options.parse_option("comment=x; touch here", "--eval-sbatch"), "option --eval-sbatch"),
    ],
)
def test_an_option_that_could_start_a_line_of_the_batch_script_is_refused(parse, what):
    with pytest.raises(ConfigError) as caught:
        parse()
    assert caught.value.what == what
    assert "touch here" in caught.value.got


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5_400),
        ("0:30", 30),
        ("1:30", 90),
        ("2:00:00", 7_200),
        ("100:00:01", 360_001),
        ("1-0", 86_400),
        ("0-2", 7_200),
        ("1-12:30", 131_400),
        ("1-2:03:04", 93_784),
        ("infinite", None),
        ("UNLIMITED", None),
        ("-1", None),
    ],
)
def test_a_time_is_parsed_in_every_form_of_sbatch(text, seconds):
    assert sbatch_options.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1-", "1-2:3:4:5", "-5", "1h", "0", "0:00", "1:-2", "1.5"])
def test_an_invalid_time_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        sbatch_options.parse_time(text)
    assert (caught.value.what, caught.value.got) == ("option --time", repr(text))


@pytest.mark.slurm
def test_the_table_has_every_option_of_the_installed_sbatch(cluster):
    """Compared with the help of sbatch: names, short forms, and whether a value follows."""
    text = subprocess.run(["sbatch", "--help"], capture_output=True, text=True).stdout
    options = re.findall(r"^\s{2,6}(?:-(\w),?\s+)?--([a-z][\w-]+)(\[?=)?", text, re.M)
    assert len(options) > 80
    for short, name, sign in options:
        if name in sbatch_table.OWN:
            continue
        assert name in sbatch_table.SBATCH, name
        assert sbatch_table.SBATCH[name] == short, name
        if sign == "[=" and name not in ("wrap", "export"):
            assert name in sbatch_table.OPTIONAL_VALUE, name
        elif sign:
            assert name in sbatch_table.WITH_VALUE | sbatch_table.OPTIONAL_VALUE, name


@pytest.mark.parametrize(
    ("sbatch", "tasks", "gpus"),
    [
        ({}, 1, 0),
        ({"ntasks-per-node": "4"}, 4, 0),
        ({"gpus-per-node": "8"}, 8, 8),
        ({"gpus-per-node": "a100:4"}, 4, 4),
        ({"gres": "gpu:2"}, 2, 2),
        ({"gres": "lustre,gpu:h100:3(S:0-1)"}, 3, 3),
        ({"gpus": "8", "nodes": "2"}, 4, 4),
        ({"gpus-per-node": "4", "ntasks-per-node": "2"}, 2, 4),
        ({"ntasks": "7"}, None, 0),
        ({"gpus-per-task": "1", "ntasks": "4"}, None, 0),
        ({"gpus-per-node": "a100"}, 1, 1),
    ],
)
def test_numbers_of_tasks_and_gpus_per_node(sbatch, tasks, gpus):
    assert (resources.count_tasks_per_node(sbatch), resources.count_gpus_per_node(sbatch)) == (tasks, gpus)


@pytest.mark.parametrize(
    ("sbatch", "expected"),
    [
        ({}, ("USR2", 300)),
        ({"time": "10"}, ("USR2", 120)),
        ({"time": "2:00:00"}, ("USR2", 300)),
        ({"time": "infinite"}, ("USR2", 300)),
        ({"signal": "USR1@60"}, ("USR1", 60)),
        ({"signal": "@77"}, ("USR2", 77)),
        ({"signal": "12", "time": "5"}, ("USR2", 60)),
        ({"signal": "R:TERM@5"}, ("TERM", 5)),
        ({"time": "0:03"}, ("USR2", 1)),
    ],
)
def test_the_warning_signal_and_its_seconds_before_the_time_limit(sbatch, expected):
    assert resources.get_warning_signal(sbatch) == expected


def test_an_evaluation_inherits_the_site_of_the_training_and_not_its_size():
    train = {
        "nodes": "4",
        "gpus-per-node": "h100:8",
        "partition": "gpu",
        "account": "a",
        "time": "2-0",
        "dependency": "afterok:1",
        "ntasks-per-node": "8",
        "cpus-per-task": "6",
        "exclusive": True,
    }
    assert resources.derive_evaluation_options(train, {"time": "30"}) == {
        "nodes": "1",
        "gpus-per-node": "h100:1",
        "partition": "gpu",
        "account": "a",
        "time": "30",
        "cpus-per-task": "6",
        "exclusive": True,
    }
    options = resources.derive_evaluation_options({"ntasks": "3"}, {"ntasks-per-node": "2"})
    assert options == {"nodes": "1", "ntasks-per-node": "2"}


@pytest.mark.parametrize(
    ("train", "overrides", "expected"),
    [
        ({"gres": "gpu:a100:4", "hold": True}, {}, {"gpus-per-node": "a100:1"}),
        ({"gres": "lustre:1,gpu:h100:3(S:0-1)"}, {}, {"gres": "lustre:1", "gpus-per-node": "h100:1"}),
        ({"gpus": "a100:8", "nodes": "2"}, {}, {"gpus-per-node": "a100:1"}),
        ({"gres": "gpu:2"}, {}, {"gpus-per-node": "1"}),
        ({"gpus-per-task": "1", "ntasks": "4"}, {}, {"gpus-per-node": "1"}),
        ({"gres": "lustre:1"}, {}, {"gres": "lustre:1"}),
        ({"gpus-per-node": "h100:8"}, {"gpus": "2"}, {"gpus": "2"}),
    ],
)
def test_an_evaluation_gets_one_gpu_of_the_type_of_the_training(train, overrides, expected):
    assert resources.derive_evaluation_options(train, overrides) == {"nodes": "1", **expected}


def test_the_dependency_on_the_training_is_added_to_the_users_own():
    assert resources.add_dependency("7", {"time": "1"}) == {"time": "1", "dependency": "afterok:7"}
    assert resources.add_dependency("7", {"dependency": "singleton"}) == {"dependency": "afterok:7,singleton"}
    with pytest.raises(ConfigError) as caught:
        resources.add_dependency("7", {"dependency": "afterok:1?afterok:2"})
    assert "--dependency" in caught.value.what and caught.value.got == repr("afterok:1?afterok:2")


@pytest.mark.parametrize(
    ("sbatch", "fix"),
    [
        ({"nodes": "1-4", "spare-nodes": "1"}, "--nodes=2"),
        ({"nodes": "2", "ntasks": "8", "spare-nodes": "1"}, "--nodes=2"),
        ({"nodes": "2", "gpus": "16", "spare-nodes": "1"}, "--gpus-per-node"),
        ({"nodes": "2", "spare-nodes": "-1"}, "--spare-nodes=1"),
    ],
)
def test_spare_nodes_need_fixed_numbers_of_nodes_and_tasks(sbatch, fix):
    assert resources.count_spare_nodes({"nodes": "2", "spare-nodes": "3"}) == 3
    with pytest.raises(ConfigError) as caught:
        resources.count_spare_nodes(sbatch)
    assert caught.value.what == "option --spare-nodes" and fix in caught.value.fix


def test_spare_nodes_are_allocated_and_run_no_tasks(tmp_path):
    script = batch_script.render(
        RunDir(tmp_path), "train", {"nodes": "2", "ntasks-per-node": "8", "spare-nodes": "1"}, Profile()
    )
    assert "#SBATCH --nodes=3" in script and "#SBATCH --no-kill" in script and "--spare" not in script
    assert re.search(r"slurm\.job\.step_nodes \S+ train 2 16\)", script)
    (line,) = [line for line in script.splitlines() if "slurm.job.step_nodes" in line]
    failed = re.sub(r"\$\(.*\)", "$(false)", line) + '; echo "$HPCSSL_STEP_NODES"'
    answer = subprocess.run(["bash", "-c", failed], capture_output=True, text=True, check=True).stdout
    assert answer.split() == ["--nodes=2", "--ntasks=16"], "without the program, the tasks run on as many nodes"
    assert re.search(r"srun .* \$HPCSSL_STEP_NODES .*slurm\.job\.task", script)
