"""``hpcssl-submit doctor`` names what is broken, with its fix, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcssl.errors import ConfigError
from slurm.backend import profiles
from slurm.backend.profiles import Profile
from slurm.backend.scheduler import JobState
from slurm.doctor import capacity, cli, command, job, login, nodes, probe_tools
from slurm.doctor.findings import BROKEN, OK, SKIPPED, WARNING
from slurm.doctor.job import JobResult

VERSIONS = {"python": "3.12.1", "torch": "2.11.0", "hpcssl": "0.2.0"}
OF_NODE = {
    "start": {"python": "3.12.1", "host": "vm", "cores": 2},
    "folder": {"same": True, "free": 60e9},
    "clock": {"ahead_s": -0.02},
    "disk": {"spaces": {"/tmp": 60e9, "/dev/shm": 20e9}},
    "shared": {"missing": []},
    "versions": {**VERSIONS, "torch": "2.11.0+cu130", "cuda": "13.0", "nccl": "2.27", "driver": "580.1", "gpus": 2},
    "decode": {"images_per_s": 300.0, "cores": 2, "native_fault": ""},
    "gpu_copies": {"rates": {"0-1": 40.0}},
    "all_reduce": {"device": "cuda", "correct": True, "gb_per_s": 2.0},
    "signals": {"after": {"SIGUSR1": 16.1, "SIGUSR2": 27.9}, "refused": ""},
}
LINK = {"local": "10.0.0.1", "offset": 0.001, "error": 0.002, "interface": ["eth0"], "also": ["eth0"]}


def healthy_records():
    """What two healthy nodes report, as ``{(check, node): record}``."""
    records = {}
    for rank, node in enumerate(("n1", "n2")):
        for check, values in OF_NODE.items():
            records[check, node] = {"node": node, "rank": rank, "time": 100.0, "seen": 100.3, **values}
        peer = {"n1": "n2", "n2": "n1"}[node]
        records["network", node] = {**LINK, "peer": peer, "address": "10.0.0.2", "rendezvous": ""}
    records["lock", "n2"] = {"while_held": "held", "after": "free"}
    records["rename", "n2"] = {"torn": "", "newest": True}
    records["requeue", "n1"] = {"refused": ""}
    base = {"rank": 0, "time": 100.0, "seen": 100.3}
    return {(c, node): {**base, "check": c, "node": node, **record} for (c, node), record in records.items()}


def judge(records, **changes):
    """The findings about a job that has reported these records."""
    options = {"nodes": "2", "gpus-per-node": "2"}
    request = command.DoctorRequest(folder=Path(), sbatch=options, profile=Profile())
    values = {"job": "7", "state": JobState("COMPLETED"), "started": True, "requeue_s": 4.0, **changes}
    return command.judge(JobResult(records=list(records.values()), **values), request, options, VERSIONS)


def list_problems(findings):
    return {finding.check: finding.level for finding in findings if finding.level in (WARNING, BROKEN)}


def test_a_healthy_cluster_has_no_problem_and_every_check_was_made():
    findings = judge(healthy_records())
    assert list_problems(findings) == {} and SKIPPED not in {finding.level for finding in findings}


NO_ANSWER = {"failure": "timed out"}
BROKEN_NODES = [  # the record that is changed on n2 (or removed), and the one problem that follows
    ("folder", {"same": False, "failure": "No such file or directory: /x"}, "folder on nodes", "--folder"),
    ("folder", {"same": False}, "folder on nodes", "--folder"),
    ("shared", {"missing": [0]}, "folder on nodes", "shared file system"),
    ("lock", {"while_held": "free"}, "locks between nodes", "flock"),
    ("lock", {"while_held": "No locks available"}, "locks between nodes", "flock"),
    ("rename", {"torn": "4096 bytes of several versions"}, "renames between nodes", "atomic"),
    ("rename", {"newest": False}, "renames between nodes", "atomic"),
    ("clock", {"ahead_s": 40.0}, "clock", "chronyd"),
    ("clock", {"seen": 60.0}, "clock", "chronyd"),
    ("network", {"offset": 30.0}, "clock", "chronyd"),
    ("network", {"rendezvous": "Connection refused"}, "ports between nodes", "10000-29999"),
    ("network", NO_ANSWER, "ports between nodes", "10000-29999"),
    ("scontrol", {"failure": "no slurm.conf"}, "scontrol on nodes", "slurm.conf"),
    ("disk", {"spaces": {"/tmp": 60e9, "/dev/shm": 64e6}}, "disk of nodes", "TMPDIR"),
    ("disk", {"spaces": {"/scratch/7": "No such file or directory"}}, "disk of nodes", "TMPDIR"),
    ("versions", {"torch": "2.10.0"}, "software on nodes", "environment"),
    ("versions", {"driver": "570.2"}, "software on nodes", "environment"),
    ("versions", {"gpus": 0}, "GPUs", "nvidia-smi"),
    ("all_reduce", {"correct": False}, "all-reduce", "--exclude=n2"),
    ("signals", {"after": {"SIGUSR2": 20.0}}, "signals", "scancel"),
    ("signals", {"after": {"SIGUSR1": 20.0}}, "warning signal", "--signal"),
]


@pytest.mark.parametrize(("check", "values", "problem", "fix"), BROKEN_NODES)
def test_a_broken_node_is_named_with_the_fix_and_nothing_else_is(check, values, problem, fix):
    records = healthy_records()
    template = records.get((check, "n2"), {"check": check, "node": "n2", "rank": 1, "time": 100.0, "seen": 100.3})
    records[check, "n2"] = template | values
    findings = judge(records)
    assert list(list_problems(findings)) == [problem]
    (finding,) = [f for f in findings if f.check == problem and f.level in (WARNING, BROKEN)]
    assert "n2" in finding.got and finding.expected and fix in finding.fix


def without(records, *checks):
    return {key: record for key, record in records.items() if key[0] not in checks}


def test_torch_that_cannot_be_imported_is_one_problem():
    records = without(healthy_records(), "versions", "decode", "all_reduce", "gpu_copies")
    failure = {"check": "compute", "rank": 0, "time": 100.0, "seen": 100.3, "failure": "no torch", "together": True}
    records |= {("compute", node): {**failure, "node": node} for node in ("n1", "n2")}
    assert list_problems(judge(records)) == {"software on nodes": BROKEN}


def test_an_all_reduce_that_hangs_is_one_problem():
    records = without(healthy_records(), "all_reduce")
    failure = {"check": "compute", "rank": 0, "time": 100.0, "seen": 100.3, "failure": "timeout", "together": True}
    records |= {("compute", node): {**failure, "node": node} for node in ("n1", "n2")}
    assert list_problems(judge(records)) == {"all-reduce": BROKEN}


def test_a_refused_requeue_is_a_warning_because_another_job_continues_a_run():
    records = healthy_records()
    records["requeue", "n1"]["refused"] = "Requested operation is presently disabled"
    findings = judge(records, requeue_s=None)
    assert list_problems(findings) == {"requeue": WARNING}
    assert "JobRequeue=1" in next(f.fix for f in findings if f.check == "requeue")


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"started": False, "state": JobState("PENDING", "Resources")}, "--wait-minutes"),
        ({"state": JobState("FAILED", exit_code=181)}, "--folder"),
        ({"state": JobState("FAILED", exit_code=1), "log": "execve(): python: No such file"}, "python:"),
    ],
)
def test_a_job_that_reports_nothing_is_the_only_problem(changes, fix):
    findings = judge({}, **changes)
    assert list_problems(findings) == {"job": BROKEN} and fix in findings[-1].fix


def test_a_fast_interface_is_proposed_only_if_all_nodes_were_reached_by_it():
    records = healthy_records()
    result = JobResult(records=list(records.values()))
    assert nodes.find_interface(result) is None
    records["network", "n1"]["also"] = ["eth0", "ib0"]
    assert nodes.find_interface(result) is None
    records["network", "n2"]["also"] = ["eth0", "ib0"]
    assert nodes.find_interface(result) == "ib0"
    records["network", "n2"]["interface"] = records["network", "n1"]["interface"] = ["ib0"]
    assert nodes.find_interface(result) is None


def test_the_profile_holds_the_options_that_were_used_and_can_be_loaded(tmp_path):
    sbatch = {"nodes": "2", "partition": "gpu", "account": "a1", "gpus-per-node": "4", "exclusive": True, "time": "9"}
    given = Profile(modules=["cuda/12"], environment={"A": "1"})
    request = command.DoctorRequest(folder=tmp_path, sbatch=sbatch, profile=given)
    path = tmp_path / "mine.yaml"
    path.write_text(command.render_profile(request, JobResult(records=list(healthy_records().values()))))
    profile = profiles.load_profile(str(path))
    assert (profile.partition, profile.account, profile.modules) == ("gpu", "a1", ["cuda/12"])
    assert profile.to_sbatch_options() == {
        "gpus-per-node": "4",
        "exclusive": True,
        "partition": "gpu",
        "account": "a1",
    }
    assert command.render_profile(request, JobResult()) == ""


def test_decoding_is_compared_with_what_a_run_reached():
    result = JobResult(records=list(healthy_records().values()))
    assert list_problems(capacity.judge_decoding(result, capacity.Need("run", 256, 1000.0))) == {}
    (finding,) = capacity.judge_decoding(result, capacity.Need("run", 256, 2000.0))
    assert finding.level == WARNING and "--cpus-per-task" in finding.fix


def test_the_decoder_of_the_nodes_is_named():
    records = healthy_records()
    (finding,) = capacity.judge_decoding(JobResult(records=list(records.values())), None)
    assert "native decoder" in finding.got and "plain" not in finding.got
    records["decode", "n2"]["native_fault"] = "not built"
    (finding,) = capacity.judge_decoding(JobResult(records=list(records.values())), None)
    assert finding.level == OK and "plain decoder (native: n2: not built)" in finding.got
    records["decode", "n1"]["native_fault"] = "not built"
    (finding,) = capacity.judge_decoding(JobResult(records=list(records.values())), None)
    assert "plain decoder (native: not built)" in finding.got


# ---- the login node, with programs in place of SLURM's

CONFIG = "Configuration data as of x\n" + "\n".join(
    f"{name:24}= {value}"
    for name, value in {
        "AuthType": "auth/munge",
        "ClusterName": "c",
        "JobRequeue": "1",
        "KillWait": "30 sec",
        "PreemptType": "preempt/partition_prio",
        "SLURM_VERSION": "22.05.8",
    }.items()
)
PARTITION = "PartitionName=main Default=YES State=UP TotalNodes=4 MaxTime=UNLIMITED PreemptMode=REQUEUE GraceTime=60"


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    """Working programs on a PATH of their own; ``login_node(name, body)`` replaces one, or removes it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name, body):
        if body is None:
            (folder / name).unlink()
            return
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)

    for name in login.COMMANDS:
        write(name, "echo slurm 22.05.8")
    (folder / "config").write_text(CONFIG)
    (folder / "partitions").write_text(PARTITION + "\n")
    write("scontrol", f'case "$*" in *partition*) cat {folder}/partitions;; *) cat {folder}/config;; esac')
    write("munge", "echo MUNGE")
    write("unmunge", "cat")
    for name in ("bash", "cat"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    write.folder = folder
    return write


@pytest.fixture
def check_login(tmp_path, monkeypatch):
    """The report of the doctor with a job that reports what healthy nodes do."""

    def check(**sbatch):
        records = without(healthy_records(), "versions")
        result = JobResult("7", list(records.values()), JobState("COMPLETED"), True, requeue_s=4.0)
        monkeypatch.setattr(job, "run", lambda *_: result)
        request = command.DoctorRequest(folder=tmp_path, sbatch={"nodes": "2", **sbatch}, profile=Profile())
        return command.run(request, write=str, show=str)

    return check


def test_a_healthy_login_node_has_no_problem(login_node, check_login):
    report = check_login()
    assert list_problems(report.findings) == {} and not report.is_broken


@pytest.mark.parametrize(
    ("name", "body", "problem", "fix"),
    [
        ("srun", None, "SLURM commands", "module"),
        ("munge", "echo 'Did you start munged?' >&2; exit 6", "munge", "munged"),
        ("unmunge", "echo 'Expired credential' >&2; exit 15", "munge", "clock"),
        ("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1", "controller", "slurmctld"),
        ("partitions", PARTITION.replace("UP", "DOWN"), "partition", "-p"),
        ("partitions", PARTITION.replace("=YES", "=NO"), "partition", "-p"),
        ("partitions", PARTITION.replace("TotalNodes=4", "TotalNodes=1"), "partition", "nodes"),
        ("partitions", PARTITION.replace("GraceTime=60", "GraceTime=0"), "preemption", "GraceTime"),
    ],
)
def test_a_broken_login_node_is_named_with_the_fix_and_nothing_else_is(
    login_node, check_login, name, body, problem, fix
):
    if name == "partitions":
        (login_node.folder / name).write_text(body + "\n")
    else:
        login_node(name, body)
    report = check_login()
    assert list(list_problems(report.findings)) == [problem]
    finding = next(f for f in report.findings if f.check == problem)
    assert finding.got and finding.expected and fix in finding.fix
    assert report.is_broken == (finding.level == BROKEN)


def test_munge_that_is_not_installed_is_a_problem_only_if_slurm_does_not_answer(login_node, check_login):
    login_node("munge", None)
    assert list_problems(check_login().findings) == {}
    login_node("scontrol", "exit 1")
    assert list_problems(check_login().findings) == {"munge": BROKEN}


def test_munge_is_asked_at_the_socket_of_the_cluster(login_node, check_login):
    (login_node.folder / "config").write_text(CONFIG + "\nAuthInfo                = socket=/x/socket\n")
    login_node("munge", '[ "$2 $3" = "-S /x/socket" ] || exit 1; echo MUNGE')
    assert list_problems(check_login().findings) == {}


def test_settings_that_hpcssl_copes_with_are_notes(login_node, check_login):
    text = CONFIG.replace("30 sec", "5 sec").replace("JobRequeue              = 1", "JobRequeue              = 0")
    (login_node.folder / "config").write_text(text)
    report = check_login()
    assert list_problems(report.findings) == {}
    assert {f.check for f in report.findings if f.level == "note"} >= {"requeue by default", "time to save"}


@pytest.mark.parametrize("broken", ["locks", "folder", "space"])
def test_a_broken_file_system_is_named(login_node, check_login, tmp_path, monkeypatch, broken):
    def refuse(*_):
        raise OSError(122, "Disk quota exceeded")

    if broken == "locks":
        monkeypatch.setattr(login, "try_lock", lambda path: "free")
    elif broken == "folder":
        monkeypatch.setattr(login.os, "replace", refuse)
    else:
        monkeypatch.setattr(login, "free_bytes", lambda folder: 5e8)
    report = check_login()
    assert list(list_problems(report.findings)) == ["folder" if broken == "space" else broken]
    assert report.is_broken == (broken != "space")
    assert list(tmp_path.glob(".hpcssl-doctor*")) == []


# ---- the probe and the job


def test_the_probe_runs_without_any_package_and_reports_a_folder_that_is_not_there(tmp_path):
    words = [sys.executable, "-I", "-S", "-c", job.read_probe(), str(tmp_path / "absent"), "token", "20000"]
    done = subprocess.run(words, capture_output=True, text=True, env={"SLURMD_NODENAME": "n7"})
    assert done.returncode == 0, done.stderr
    result = JobResult()
    (tmp_path / "log").write_text(done.stdout)
    job._read_output(tmp_path / "log", result)
    assert [(r["check"], r["node"]) for r in result.records] == [("start", "n7"), ("folder", "n7")]
    assert list_problems(nodes.judge_folder(result)) == {"folder on nodes": BROKEN}


def test_a_lock_of_another_process_is_seen(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    assert probe_tools.try_lock(str(path)) == "free"
    code = "import fcntl, sys, time\nf = open(sys.argv[1])\nfcntl.flock(f, 2)\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert probe_tools.try_lock(str(path)) == "held"
        holder.kill()


def test_options_of_sbatch_and_of_the_doctor_are_separated():
    parts = cli.split_command_line(["-p", "gpu", "--folder", "/x", "--json", "digits_msf", "--wait-minutes=3"])
    assert parts.own == ["--folder", "/x", "--json", "--wait-minutes=3", "digits_msf"]
    assert parts.sbatch == {"nodes": "2", "partition": "gpu"}
    assert cli.split_command_line(["-N3"]).sbatch == {"nodes": "3"}
    with pytest.raises(ConfigError):
        cli.split_command_line(["--array=1-4"])


def test_the_batch_script_quotes_what_a_user_gives():
    script = job.render_script(Path("/a b"), "0" * 16, {"nodes": "3", "account": "x; y"}, Profile(srun=["--mpi=none"]))
    assert "#SBATCH --account='x; y'" in script and "'/a b/code'" in script
    assert "--nodes=3 --ntasks=3 --mpi=none" in script and "#SBATCH --requeue\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


QUEUE = """case "$0 $*" in
*sbatch*) echo "$1" > {folder}/submitted; echo 'Submitted batch job 7';;
*scancel*) echo "$1" >> {folder}/cancelled; rm -f {folder}/submitted;;
*scontrol*) [ -e {folder}/submitted ] || {{ echo 'Invalid job id specified' >&2; exit 1; }}
  echo 'JobId=7 JobName=x UserId=root(0) JobState=PENDING Reason=Resources Restarts=0 Comment= StdErr=/x';;
esac"""


@pytest.fixture
def waiting_queue(tmp_path, monkeypatch):
    """A SLURM that accepts one job and never starts it; the folder with what it was asked."""
    folder = tmp_path / "queue"
    folder.mkdir()
    for name in ("sbatch", "scancel", "scontrol", "squeue"):
        (folder / name).write_text("#!/bin/bash\n" + QUEUE.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_job_that_never_starts_is_cancelled_and_leaves_nothing(waiting_queue, tmp_path):
    messages = []
    result = job.run(tmp_path, {"nodes": "2"}, Profile(), 0.0, messages.append)
    assert not result.started and result.state.reason == "Resources"
    assert (waiting_queue / "cancelled").read_text() == "7\n"
    assert list(tmp_path.glob(".hpcssl-doctor*")) == []
    assert any("Resources" in message for message in messages)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_cancels_its_job_and_leaves_nothing(waiting_queue, tmp_path, number):
    code = (
        "import sys; from pathlib import Path\n"
        "from slurm.doctor import job; from slurm.backend.profiles import Profile\n"
        "job.run(Path(sys.argv[1]), {'nodes': '2'}, Profile(), 60.0, lambda text: print(text, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    process.send_signal(number)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert (waiting_queue / "cancelled").read_text() == "7\n"
    assert list(tmp_path.glob(".hpcssl-doctor*")) == []


# ---- a real SLURM


def run_doctor(folder, *words, **environment):
    """Run the command; its exit code and its report."""
    command_line = [sys.executable, "-m", "slurm", "doctor", "--folder", str(folder), "--json", *words]
    done = subprocess.run(command_line, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    problems = {f["check"]: f["level"] for f in report["findings"] if f["level"] in (WARNING, BROKEN)}
    return done.returncode, problems, report


@pytest.mark.slurm
def test_the_doctor_finds_no_problem_on_a_healthy_cluster(cluster, tmp_path):
    code, problems, report = run_doctor(tmp_path)
    assert (code, problems) == (0, {}), report
    levels = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert levels["requeue"] == levels["signals"] == levels["all-reduce"] == levels["clock"] == "ok"
    assert list(tmp_path.iterdir()) == [] and cluster("squeue", "-h") == ""


BREAK = {  # what Python does on n2 before it runs the probe
    "clock": "import time\nnow = time.time\ntime.time = lambda: now() - 100",
    "ports between nodes": (
        "import socket\ndef refuse(*_, **__): raise TimeoutError('timed out')\nsocket.create_connection = refuse"
    ),
    "folder on nodes": (
        "import builtins, sys\nplain = open\ndef hide(path, *words, **more):\n"
        "    if str(path).endswith('/login'): raise FileNotFoundError(2, 'No such file or directory', path)\n"
        "    return plain(path, *words, **more)\nsetattr(sys.modules['built' + 'ins'], 'open', hide)"
    ),
}


@pytest.mark.slurm
@pytest.mark.full
@pytest.mark.parametrize("problem", BREAK)
def test_a_node_of_a_real_cluster_that_is_broken_is_named(cluster, tmp_path, problem):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BREAK[problem])
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[ "$SLURMD_NODENAME" = n2 ] && export PYTHONPATH={tmp_path}/site:$PYTHONPATH\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "p.yaml").write_text(f"python: {python}\n")
    (tmp_path / "runs").mkdir()
    code, problems, report = run_doctor(tmp_path / "runs", "--cluster", str(tmp_path / "p.yaml"))
    assert code == 1 and problems == {problem: BROKEN}, report
    assert "n2" in next(f["got"] for f in report["findings"] if f["check"] == problem)


@pytest.mark.slurm
@pytest.mark.full
def test_a_cluster_that_refuses_the_requeue_is_named(cluster, tmp_path):
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\nsed -i "/^#SBATCH --requeue/d" "$1"\nexec {real} "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "runs").mkdir()
    code, problems, report = run_doctor(tmp_path / "runs", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (code, problems) == (0, {"requeue": WARNING}), report


@pytest.mark.slurm
def test_a_queue_without_free_nodes_is_a_clear_message(cluster, tmp_path):
    blocker = cluster("sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 300").strip()
    try:
        cluster.wait_until(lambda: cluster.field(blocker, "JobState") == "RUNNING", "running job")
        began = time.monotonic()
        code, problems, _ = run_doctor(tmp_path, "--wait-minutes", "0.02")
        assert (code, problems) == (1, {"job": BROKEN}) and time.monotonic() - began < 60
        assert cluster("squeue", "-h", "-o", "%i").split() == [blocker]
    finally:
        cluster("scancel", blocker)


def test_a_job_of_which_slurm_says_nothing_more_is_given_up(tmp_path, monkeypatch):
    """SLURM reports that the job runs, and answers no more."""
    now, states = [0.0], iter([JobState("RUNNING")])
    monkeypatch.setattr(job.scheduler, "query_job_or_unknown", lambda *_: next(states, JobState("UNKNOWN")))
    monkeypatch.setattr(job.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(job.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    result = JobResult(job="7")
    job._follow(tmp_path, result, None, 300.0, lambda _: None)
    assert result.started and job.REQUEUE_WAIT_S <= now[0] < job.REQUEUE_WAIT_S + 5
