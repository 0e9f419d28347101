"""``hpcssl-submit`` as a user meets it: what it prints, what it refuses, and what lies in the run folder."""

import os
import subprocess
import sys

import pytest

from hpcssl import door
from hpcssl.errors import ConfigError
from hpcssl.files import RunDir, read_lines
from slurm import attempts, cli, cluster, control, freeze, records, script, watch

GOLDEN = """\
# ---- train
#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --comment='it'"'"'s mine'
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
{{ echo 'hpcssl: {run}: it or its folder code is not of the user of this job, or others can write this code, \
and it is not run' >&2; exit 1; }}
module load cuda/12.4
export OMP_NUM_THREADS=1
export GLOO_SOCKET_IFNAME=ib0
export NCCL_SOCKET_IFNAME=ib0
echo ready
export PYTHONPATH={run}/code PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
trap : INT TERM USR1 USR2

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {run}/logs/%j_%t_log.out --error {run}/logs/%j_%t_log.err --kill-on-bad-exit=1 \
--export=ALL --cpu-bind=cores apptainer exec image.sif python3 -m slurm.start -u -m slurm.job {run} train


# teardown
code=$?
apptainer exec image.sif python3 -m slurm.after {run} train $code
exit $?
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
    """The command in this process, in an empty folder; its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def go(*words):
        code = door.run(cli.app, [str(w) for w in words], "hpcssl-submit")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err
    return go


@pytest.fixture
def data(digits):
    return f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"


def test_dry_run_prints_what_sbatch_would_get_and_writes_nothing(call, data, tmp_path):
    (tmp_path / "site.yaml").write_text(PROFILE)
    code, out, err = call("digits_msf", "--run", "r", "-N2", "--gpus-per-node", "a100:4", "--cluster", "./site.yaml",
                          *data, "-A", "vision", "--comment", "it's mine", "--sbatch", "--something=new",
                          "--time=1-12", "--dry-run", "--evals=knn", "--eval-sbatch", "knn:--time=30", "--eval-every=2",
                          "optim.lr=0.05")
    assert (code, err) == (0, "")
    train, _, knn = out.partition("# ---- knn\n")
    knn, _, beside = knn.partition("# ---- knn@STEP\n")
    assert "#SBATCH --nice=10000\n" in beside and "--dependency" not in beside
    assert train.strip() == GOLDEN.format(run=tmp_path / "r").strip()
    for line in ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=a100:1", "--account=vision", "--mem=64G",
                 "--dependency=afterok:JOBID", "--kill-on-invalid-dep=yes", "--requeue", "--time=30",
                 "--job-name=r-knn", "--signal=USR2@300"):
        assert f"#SBATCH {line}\n" in knn
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("words", "code", "said"), [
    (["digits_mfs", "--run", "r", "--local"], 2, "did you mean 'digits_msf'"),
    (["digits_msf", "--local"], 2, "--run"),
    (["digits_msf", "optim.lr=0.1", "digits_byol", "--run", "r"], 2, "one recipe"),
    (["--run", "r", "optim.lr=0.1"], 2, "RECIPE: got none"),
    (["digits_msf", "--run", "r", "--local", "optim.rl=1"], 2, "did you mean 'lr'"),
    (["digits_msf", "--run", "r", "--local", "--ntasks-per-node", "7"], 1, "a number of processes such as 1, 2, 4, 8"),
    (["digits_msf", "--run", "r", "--dry-run", "-N3", "--ntasks-per-node", "5"], 1, "15 processes: got a global batch"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knm"], 2, "did you mean 'knn'"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn,knn"], 2, "each evaluation once"),
    (["digits_msf", "--run", "r", "--local", "--evals", "linear,linear:protocol=msf_center"], 2, "mean the same"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn:taw=1"], 2, "did you mean 'tau'"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn:tau=warm"], 2, "tau"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn:k=0"], 2, "k=[1,20]"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn:k"], 2, "NAME:key=value"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn:k=[1"], 2, "in pairs"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn@3"], 2, "names of evaluations"),
    (["digits_msf", "--run", "r", "--local", "--evals", "linear:val=nowhere"], 1, "no such folder"),
    (["digits_msf", "--run", "r", "--local", "--evals", "knn", "--eval-sbatch=--dependency=afterok:1?afterok:2"], 2,
     "commas instead"),
    (["digits_msf", "--run", "r", "--local", "data.train=nowhere"], 1, "no such folder"),
    (["digits_msf", "--run", "r", "--local", "--nodes=2"], 2, "leave out --local"),
    (["digits_msf", "--run", "r", "--local", "--ntasks-per-node=two"], 2, "--ntasks-per-node=4"),
    (["digits_msf", "--run", "r", "--cluster", "infinybands"], 2, "did you mean 'infiniband'"),
    (["digits_msf", "--run", "r%j", "--local"], 2, "another folder name"),
    (["digits_msf", "--run", "r", "--eval-sbatch", "time=3", "--local"], 2, "--name=value"),
    (["digits_msf", "--run", "r", "--evals=knn", "--eval-sbatch", "lin:--time=3", "--local"], 2, "options for lin"),
    (["status", "nowhere"], 2, "no such folder"),
    (["preempt", "."], 2, "no run in it"),
])
def test_mistakes_are_one_sentence_before_anything_is_submitted(call, data, tmp_path, words, code, said):
    if not any(w.startswith("data.") for w in words) and words[0] not in cli.VERBS:
        words = [*words, *data]
    got = call(*words)
    assert got[0] == code
    assert said in got[2]
    assert len(got[2].strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_without_slurm_its_mend_is_named(call, data, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("digits_msf", "--run", "r", *data)
    assert code == 1
    assert "add --local" in err


def test_evaluations_need_shards_to_score_on(call, data):
    code, _, err = call("digits_msf", "--run", "r", "--local", data[0], "--evals=knn")
    assert code == 2
    assert "data.val" in err


@pytest.mark.parametrize(("text", "said"), [
    ("partion: gpu", "did you mean 'partition'"), ("sbatch: {output: x}", "logs RUN"),
    ("environment: {A B: x}", "a variable's name"), ("setup: ['x ${HOME}']", "interpolation"), ("- a", "a list"),
    ("account: [1", "cluster profile")])
def test_a_bad_profile_is_refused(tmp_path, text, said):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        cluster.find(str(path))
    assert "recipe" not in caught.value.what


def test_packaged_profiles_load_and_own_ones_win(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert {"apptainer", "generic", "infiniband"} <= set(cluster.names())
    for name in cluster.names():
        script.text(RunDir(tmp_path / "r"), "train", cluster.find(name).options(), cluster.find(name))
    own = tmp_path / "hpcssl" / "clusters" / "generic.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("partition: mine")
    assert cluster.find("generic").options() == {"partition": "mine"}


def test_text_of_a_user_stays_text_in_the_script(tmp_path):
    """bash must see words with quotes, blanks, dollars and semicolons as they were typed."""
    run = RunDir(tmp_path / "a b; touch $HOME 'x'")
    run.code.mkdir(parents=True)
    profile = cluster.Profile(environment={"NOTE": "it's $(touch pwned); \"q\""}, python="printf")
    lines = script.text(run, "train", {"comment": "$(touch pwned)"}, profile).splitlines()
    shell = "\n".join(line for line in lines if not line.startswith("srun ")).replace("-m slurm.after", r"%s\\n")
    done = subprocess.run(["bash", "-c", shell.replace("exit $?", 'printf "%s\\n" "$NOTE" "$PYTHONPATH"')],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-2:] == [profile.environment["NOTE"], str(run.code)]
    assert str(run.root) in done.stdout.splitlines()
    assert not (tmp_path / "pwned").exists()


def test_the_frozen_code_is_whole_and_wins(tmp_path):
    run = RunDir(tmp_path / "run")
    stamp = freeze.freeze(run)
    assert (run.code / "COMMIT").read_text().strip() == stamp == freeze.commit()
    assert (run.code / "slurm" / "clusters" / "generic.yaml").exists()
    assert (run.code / "hpcssl" / "recipes" / "digits_msf.yaml").exists()
    assert not list(run.code.rglob("*.pyc"))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "__init__.py").write_text("raise ImportError('the current folder was imported')")
    probe = "from slurm import freeze; from hpcssl.files import RunDir; import sys; freeze.verify(RunDir(sys.argv[1]))"
    environ = os.environ | {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", probe, str(run.root)], check=True, env=environ, cwd=tmp_path)
    wrong = subprocess.run([sys.executable, "-c", probe, str(tmp_path / "other")], env=environ, cwd=tmp_path,
                           capture_output=True, text=True)
    assert "SubmitError" in wrong.stderr
    freeze.freeze(run)
    assert sorted(p.name for p in run.root.iterdir()) == ["code"]


def test_status_never_imports_torch(stand_in):
    run = stand_in()
    probe = ("import sys; from slurm import cli; from hpcssl import door\n"
             "code = door.run(cli.app, ['status', sys.argv[1]], 'hpcssl-submit')\n"
             "assert 'torch' not in sys.modules; sys.exit(code)")
    run.config.write_text("schedule: {steps: 7, epochs: 0}\n")
    records.note(run, "submit", "local-1", what="train", kind="local", options={})
    done = subprocess.run([sys.executable, "-c", probe, str(run.root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run.root}\tjob=local-1\tstate=PENDING\tattempt=0\tstep=0/7")


@pytest.mark.timeout(300)
def test_a_real_training_preempted_once_equals_one_that_was_not(call, data, until, tmp_path):
    """The real trainer on two processes, with a chained evaluation, by the commands alone."""
    recipe = ["digits_msf", "--local", "--ntasks-per-node=2", "--parsable", *data, "optim.batch=32", "bank.size=128",
              "schedule.steps=30", "machine.log_steps=1", "machine.checkpoint_steps=8"]
    code, out, err = call(*recipe, "--run=one", "--evals", "knn", "--partition=gpu")
    assert code == 0
    assert out.startswith("local-")
    assert len(out.splitlines()) == 1
    assert "--partition=gpu mean nothing without SLURM" in err
    run, other = RunDir(tmp_path / "one"), RunDir(tmp_path / "other")
    assert call(*recipe, "--run=one", "--evals", "knn")[:2] == (0, out)
    code, _, err = call(*recipe, "--run=one", "machine.log_steps=2")
    assert code == 1
    assert out.strip() in err
    assert "machine.log_steps" in err
    until(lambda: attempts.reached(run) >= 5, "step 5", 120)
    control.preempt(run)
    assert watch.wait(run, lambda text: None) == 0
    assert [a.cause for a in attempts.history(run)] == ["preempted", "done"]
    assert [row["step"] for row in read_lines(run.eval_rows("knn"))] == [0, 30]
    assert [line["step"] for line in read_lines(run.journal)] == list(range(1, 31))

    code, _, err = call(*recipe, "--run=other", "--wait")
    assert code == 0
    assert "step 30 of 30" in err
    from hpcssl.train.checkpoint import digest_of

    assert digest_of(run) == digest_of(other)
    code, out, err = call(*recipe, "--run=other")
    assert (code, out) == (0, "")
    assert "is finished" in err
    code, _, err = call(*recipe, "--run=other", "optim.lr=0.3")
    assert code == 1
    assert "optim.lr" in err
