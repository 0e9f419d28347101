"""The command ``hpcssl-submit``: what it prints, what it refuses, and what it writes into the run folder."""

import os
import subprocess
import sys

import pytest

from hpcssl import cli_runner
from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.code_version import code_commit
from hpcssl.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, ConfigError
from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from slurm import cli, command_line
from slurm.backend import batch_script, code_snapshot, profiles
from slurm.log import attempts, job_log
from slurm.manage import control, wait
from tests.printed import numbers_in, printed_error
from tests.waiting import wait_until

EXPECTED_SCRIPT = """\
# ---- train
#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --comment='it'"'"'s mine hpcssl=TOKEN'
#SBATCH --error={run}/logs/%j_0_log.err
#SBATCH --gpus-per-node=a100:4
#SBATCH --job-name=r
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=64G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output={run}/logs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --something=new
#SBATCH --time=1-12

# setup
[ -O {run} ] && [ -O {run}/code ] && [ -z "$(find {run}/code ! -type l -perm /022 -print -quit)" ] || \
{{ echo 'hpcssl: {run}: it or its folder code belongs to another user, or others can write the code; the \
job does not run it' >&2; exit 1; }}
module load cuda/12.4
export OMP_NUM_THREADS=1
export GLOO_SOCKET_IFNAME=ib0
export NCCL_SOCKET_IFNAME=ib0
echo ready
export PYTHONPATH={run}/code PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HPCSSL_JOB_TOKEN=TOKEN
trap : INT TERM USR1 USR2
HPCSSL_STEP_WAIT=
export HPCSSL_LAUNCH=0
while true; do
export HPCSSL_LAUNCH_TIME=$(date +%s)

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {run}/logs/%j_%t_log.out --error {run}/logs/%j_%t_log.err --kill-on-bad-exit=1 \
--export=ALL --cpu-bind=cores $HPCSSL_STEP_WAIT \
apptainer exec image.sif python3 -m slurm.job.bootstrap -u -m slurm.job.task {run} train


# teardown
code=$?
apptainer exec image.sif python3 -m slurm.job.epilogue {run} train $code
code=$?
[ $code -eq 76 ] || exit $code
HPCSSL_LAUNCH=$((HPCSSL_LAUNCH + 1))
HPCSSL_STEP_WAIT=--immediate=60
done
"""

PROFILE = """
account: nobody
sbatch: {mem: 64G}
modules: [cuda/12.4]
environment: {OMP_NUM_THREADS: 1}
interface: ib0
container: apptainer exec image.sif
python: python3
srun: [--cpu-bind=cores]
setup: [echo ready]
"""


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """``call(*words)`` runs the command in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run_command(*words):
        code = cli_runner.run(cli.app, [str(word) for word in words], "hpcssl-submit")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run_command


@pytest.fixture
def data(digits):
    return f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"


def test_a_dry_run_prints_the_batch_scripts_and_writes_nothing(call, data, tmp_path):
    (tmp_path / "site.yaml").write_text(PROFILE)
    typed = (
        "digits_msf --run r -N2 --gpus-per-node a100:4 --cluster ./site.yaml -A vision --sbatch --something=new "
        "--time=1-12 --dry-run --evals=knn --eval-sbatch knn:--time=30 --eval-every=2 optim.lr=0.05"
    )
    code, out, err = call(*typed.split(), "--comment", "it's mine", *data)
    assert (code, err) == (EXIT_DONE, "")
    train, _, knn = out.partition("# ---- knn\n")
    knn, _, concurrent = knn.partition("# ---- knn@STEP\n")
    assert "#SBATCH --nice=10000\n" in concurrent and "--dependency" not in concurrent
    assert train.strip() == EXPECTED_SCRIPT.format(run=tmp_path / "r").strip()
    for option in (
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=a100:1",
        "--account=vision",
        "--mem=64G",
        "--dependency=afterok:JOBID",
        "--kill-on-invalid-dep=yes",
        "--requeue",
        "--time=30",
        "--job-name=r-knn",
        "--signal=USR2@300",
    ):
        assert f"#SBATCH {option}\n" in knn
    assert not (tmp_path / "r").exists()


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "what", "got", "fix"),
    [
        ("digits_mfs --run r --local", "recipe 'digits_mfs'", "", "'digits_msf'"),
        ("digits_msf optim.lr=0.1 digits_byol --run r", "RECIPE", "digits_msf and digits_byol", ""),
        ("--run r optim.lr=0.1", "RECIPE", "no recipe", "digits_msf"),
        ("digits_msf --run r --local optim.rl=1", "recipe digits_msf, key optim.rl", "'rl'", "'lr'"),
        ("digits_msf --run r --local --evals knm", "option --evals", "'knm'", "'knn'"),
        ("digits_msf --run r --local --evals knn,knn", "option --evals", "knn and knn", ""),
        (
            "digits_msf --run r --local --evals linear,linear:protocol=msf_center",
            "option --evals",
            "linear and linear:protocol=msf_center",
            "",
        ),
        (
            "digits_msf --run r --local --evals knn:temperatur=1",
            "options of knn, key temperatur",
            "'temperatur'",
            "'temperature'",
        ),
        ("digits_msf --run r --local --evals knn:tau=1", "options of knn, key tau", "", "temperature=1"),
        ("digits_msf --run r --local --evals knn:temperature=warm", "options of knn, key temperature", "'warm'", ""),
        ("digits_msf --run r --local --evals knn:k=0", "evals.knn.k", "[0]", "k=[1,20]"),
        ("digits_msf --run r --local --evals knn:k", "option --evals", "'knn:k'", "NAME:key=value"),
        ("digits_msf --run r --local --evals knn:k=[1", "option --evals", "'knn:k=[1'", "NAME:key=value"),
        ("digits_msf --run r --local --evals knn@3", "option --evals", "'knn@3'", "'knn'"),
        (
            "digits_msf --run r --local --evals knn --eval-sbatch=--dependency=afterok:1?afterok:2",
            "option --eval-sbatch --dependency",
            "'afterok:1?afterok:2'",
            "",
        ),
        ("digits_msf --run r --local --nodes=2", "option --nodes", "2", "--ntasks-per-node"),
        ("digits_msf --run r --local --ntasks-per-node=two", "option --ntasks-per-node", "two", "--ntasks-per-node=4"),
        ("digits_msf --run r --cluster infinybands", "option --cluster", "'infinybands'", "'infiniband'"),
        ("digits_msf --run r%j --local", "option --run", "'r%j'", ""),
        ("digits_msf --run r\\j --local", "option --run", "'r\\\\j'", ""),
        (f"digits_msf --run {'r' * 260} --local", "option --run", "260", "shorter"),
        (f"digits_msf --run {'r/' * 2000}r --local", "option --run", "", "shorter"),
        ("digits_msf --run r --eval-sbatch time=3 --local", "option --eval-sbatch", "'time=3'", "--name=value"),
        ("digits_msf --run r --evals=knn --eval-sbatch lin:--time=3 --local", "option --eval-sbatch", "lin", "knn"),
        ("status nowhere", "run folder {folder}/nowhere", "", ""),
        ("preempt .", "run folder .", "", ""),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_submitted(call, data, tmp_path, typed, what, got, fix):
    words = typed.split()
    code, out, err = call(*words, *(data if words[0] not in command_line.VERBS else ()))
    assert (code, out) == (EXIT_USAGE, "")
    assert len(err.splitlines()) == 1
    error = printed_error(err)
    assert error.what == what.format(folder=tmp_path)
    assert got in error.got and fix in error.fix
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("size", "processes"), [("--local --ntasks-per-node 7", 7), ("-N3 --ntasks-per-node 5", 15)])
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(call, data, tmp_path, size, processes):
    code, _, err = call("digits_msf", "--run", "r", "--dry-run", *size.split(), *data)
    assert code == EXIT_FAILED and len(err.splitlines()) == 1
    error = printed_error(err)
    assert numbers_in(error.what) == [processes] and numbers_in(error.got) == [128]
    assert numbers_in(error.expected) == [1, 2, 4, 8, 16, 32]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "uses_data"), [(["data.train=nowhere"], False), (["--evals", "linear:val=nowhere"], True)]
)
def test_a_shard_folder_that_does_not_exist_is_refused(call, data, tmp_path, words, uses_data):
    code, _, err = call("digits_msf", "--run", "r", "--local", *words, *(data if uses_data else ()))
    assert code == EXIT_FAILED and len(err.splitlines()) == 1
    assert printed_error(err).what == f"shard folder {tmp_path / 'nowhere'}"
    assert not (tmp_path / "r").exists()


def test_a_submission_without_a_run_folder_is_refused(call, data):
    code, _, err = call("digits_msf", "--local", *data)
    assert code == EXIT_USAGE
    assert "'--run'" in err and len(err.splitlines()) == 1


def test_without_slurm_the_fix_names_local(call, data, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("digits_msf", "--run", "r", *data)
    assert code == EXIT_FAILED
    assert printed_error(err).what == "SLURM" and "--local" in printed_error(err).fix


def test_evaluations_without_validation_shards_are_refused(call, data):
    code, _, err = call("digits_msf", "--run", "r", "--local", data[0], "--evals=knn")
    assert code == EXIT_USAGE
    assert printed_error(err).what == "data.val"


@pytest.mark.parametrize(
    ("text", "what", "got", "fix"),
    [
        ("partion: gpu", "key partion", "'partion'", "'partition'"),
        ("sbatch: {output: x}", "option --output", "--output=x", "logs RUN"),
        ("environment: {A B: x}", "environment", "'A B'", ""),
        ("setup: ['x ${HOME}']", "setup", "${HOME}", ""),
        ("- a", "", "a list", ""),
        ("account: [1", "cluster profile", "", ""),
    ],
)
def test_an_invalid_cluster_profile_is_refused(tmp_path, text, what, got, fix):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        profiles.load_profile(str(path))
    assert what in caught.value.what and "recipe" not in caught.value.what
    assert got in caught.value.got and fix in caught.value.fix


# -- profiles, the batch script, the code snapshot ------------------------------------------------------------------


def test_packaged_profiles_are_valid_and_the_users_own_replace_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert {"apptainer", "generic", "infiniband"} <= set(profiles.list_profiles())
    for name in profiles.list_profiles():
        profile = profiles.load_profile(name)
        batch_script.render(RunDir(tmp_path / "r"), "train", profile.to_sbatch_options(), profile)
    own = tmp_path / "hpcssl" / "clusters" / "generic.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("partition: mine")
    assert profiles.load_profile("generic").to_sbatch_options() == {"partition": "mine"}


def test_text_of_a_user_is_not_evaluated_by_the_shell(tmp_path):
    """Words with quotes, blanks, dollars and semicolons reach the programs of the batch script as they were typed."""
    run = RunDir(tmp_path / "a b; touch $HOME 'x'")
    run.code.mkdir(parents=True)
    profile = profiles.Profile(environment={"NOTE": 'it\'s $(touch evaluated); "q"'}, python="printf")
    lines = batch_script.render(run, "train", {"comment": "$(touch evaluated)"}, profile).splitlines()
    script = "\n".join(line for line in lines if not line.startswith("srun "))
    script = script.replace("-m slurm.job.epilogue", r"%s\\n")
    script = script.replace("[ $code -eq 76 ] || exit $code", 'printf "%s\\n" "$NOTE" "$PYTHONPATH"; exit')
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] == [profile.environment["NOTE"], str(run.code)]
    assert str(run.root) in done.stdout.splitlines()
    assert not (tmp_path / "evaluated").exists()


VERIFY_SNAPSHOT = """
import sys
from hpcssl.run_dir import RunDir
from slurm.backend import code_snapshot
code_snapshot.verify_snapshot(RunDir(sys.argv[1]))
"""


def test_the_code_snapshot_is_complete_and_is_imported_instead_of_other_copies(tmp_path):
    run = RunDir(tmp_path / "run")
    commit = code_snapshot.create_snapshot(run)
    assert (run.code / "COMMIT").read_text().strip() == commit == code_commit()
    assert (run.code / "slurm" / "clusters" / "generic.yaml").exists()
    assert (run.code / "hpcssl" / "recipes" / "digits_msf.yaml").exists()
    assert not list(run.code.rglob("*.pyc"))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "__init__.py").write_text("raise ImportError('the current folder was imported')")
    command = [sys.executable, "-c", VERIFY_SNAPSHOT]
    environ = os.environ | {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"}
    subprocess.run([*command, str(run.root)], check=True, env=environ, cwd=tmp_path)
    other_run = [*command, str(tmp_path / "other")]
    refused = subprocess.run(other_run, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert "SubmitError" in refused.stderr
    code_snapshot.create_snapshot(run)
    assert sorted(path.name for path in run.root.iterdir()) == ["code"]


STATUS_WITHOUT_TORCH = """
import sys
from slurm import cli
from hpcssl import cli_runner
code = cli_runner.run(cli.app, ["status", sys.argv[1]], "hpcssl-submit")
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_status_does_not_import_torch(make_stub_run):
    run = make_stub_run()
    run.config.write_text("schedule: {steps: 7, epochs: 0}\n")
    job_log.record_event(run, "submit", "local-1", what="train", kind="local", options={})
    command = [sys.executable, "-c", STATUS_WITHOUT_TORCH, str(run.root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run.root}\tjob=local-1\tstate=PENDING\tattempt=0\tstep=0/7")


# -- the real training ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_a_local_training_that_was_preempted_equals_one_that_was_not(call, data, tmp_path):
    """The real trainer on two processes, with an evaluation of its last weights, by the commands alone."""
    size = ["--local", "--ntasks-per-node=2", "--parsable"]
    overrides = ["optim.batch=32", "bank.size=128", "schedule.steps=120", "machine.log_steps=1"]
    command = ["digits_msf", *size, *data, *overrides, "machine.checkpoint_steps=8"]
    code, out, err = call(*command, "--run=preempted", "--evals", "knn", "--partition=gpu")
    assert code == EXIT_DONE
    job = out.strip()
    assert job.startswith("local-") and out == f"{job}\n"
    assert "--partition=gpu" in err, "an option without effect is reported"
    run, undisturbed = RunDir(tmp_path / "preempted"), RunDir(tmp_path / "undisturbed")
    assert call(*command, "--run=preempted", "--evals", "knn")[:2] == (EXIT_DONE, out)
    code, _, err = call(*command, "--run=preempted", "machine.log_steps=2")
    assert code == EXIT_FAILED
    assert job in printed_error(err).got and "machine.log_steps" in printed_error(err).got
    wait_until(lambda: attempts.last_known_step(run) >= 5, "step 5", pause=0.05)
    control.preempt(run)
    assert wait.wait_for_jobs(run, lambda text: None) == 0
    assert [a.cause for a in attempts.read_attempts(run)] == ["preempted", "done"]
    assert [row["step"] for row in read_lines(run.eval_rows("knn"))] == [0, 120]
    assert [line["step"] for line in read_lines(run.journal)] == list(range(1, 121))

    code, _, err = call(*command, "--run=undisturbed", "--wait")
    assert code == EXIT_DONE
    assert any(numbers_in(line)[:2] == [120, 120] for line in err.splitlines()), "progress up to the last step"
    assert checkpoint_digest(run) == checkpoint_digest(undisturbed)
    code, out, err = call(*command, "--run=undisturbed")
    assert (code, out) == (EXIT_DONE, "")
    assert f"run {undisturbed.root} " in err and "local-" not in err, "the run is finished, and has no job in the queue"
    code, _, err = call(*command, "--run=undisturbed", "optim.lr=0.3")
    assert code == EXIT_FAILED
    assert "optim.lr" in printed_error(err).got
