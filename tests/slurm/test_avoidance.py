"""Nodes that an attempt blames are avoided by the next one: within bounds, recorded, and shown by ``status``."""

import subprocess
from types import SimpleNamespace

import pytest

from hpcssl.distributed.liveness import hang_report
from hpcssl.distributed.liveness.record import HeartbeatRecord
from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, scheduler
from slurm.backend.profiles import Profile
from slurm.job import avoidance, relaunch
from slurm.log import avoided_nodes, job_log
from slurm.log.attempts import Attempt, read_attempts, record_end
from slurm.manage import status

STUCK = "no progress for 60 s: rank 1 on {node} (process 7) is stuck in step 3 for 60 s"


def attempt(cause, error, number=1):
    return Attempt(number, "7", 0, 0, 5, cause, error)


def test_the_sentence_of_a_hang_names_the_node_to_blame():
    ranks = {r: HeartbeatRecord(rank=r, host=f"gpu-{r}", pid=9, step=4 - r, idle=60.0) for r in range(2)}
    sentence = hang_report.describe_hang(ranks, {}, 60.0)
    assert avoided_nodes.find_blamed_nodes(attempt("hang", sentence)) == ["gpu-1"]


@pytest.mark.parametrize(
    ("cause", "error", "nodes"),
    [
        ("node_fail", "lost n1 and n2", ["n1", "n2"]),
        ("node_fail", "its step ended with exit code 1", []),
        ("hang", "no progress for 60 s: all 2 ranks wait alike", []),
        ("killed", STUCK.format(node="n1"), []),  # a rank that was killed says nothing about its node
        (
            "error",
            "the replicas at step 5: rank 1 on n2, rank 3 on n4 with other bits than the rest in x",
            ["n2", "n4"],
        ),
        ("error", "the replicas at step 5: rank 0 on n1, rank 1 on n2 with different bits in x", []),
    ],
)
def test_what_blames_a_node(cause, error, nodes):
    assert avoided_nodes.find_blamed_nodes(attempt(cause, error)) == nodes


def test_the_error_about_a_differing_replica_names_the_node():
    import torch

    from hpcssl.errors import WorldError
    from hpcssl.train import replicas

    def gather(own_1T):
        return torch.cat([own_1T, own_1T + 1, own_1T])

    world = SimpleNamespace(size=3, all_gather=gather, all_gather_text=lambda text: ["gpu-0", "gpu-1", "gpu-2"])
    state = SimpleNamespace(world=world, step=5, replicas=lambda _: {"encoder": torch.ones(4)})
    with pytest.raises(WorldError) as caught:
        replicas.check(state, None)
    assert avoided_nodes.find_blamed_nodes(attempt("error", str(caught.value))) == ["gpu-1"]


@pytest.fixture
def run(tmp_path):
    """A run folder; ``blame(*nodes)`` records one hang per node."""
    return RunDir(tmp_path / "run")


@pytest.fixture
def blame(run):
    run.root.mkdir()
    (run.root / "logs").mkdir()

    def record(*nodes):
        for number, node in enumerate(nodes, 1):
            values = {"attempt": number, "job": "7", "restart": number - 1, "host": node}
            record_end(run, "train", values, "hang", STUCK.format(node=node))

    return record


@pytest.fixture
def nodes_of_partition(monkeypatch):
    """Set the nodes that sinfo shows: ``{kind: count}``, and states of some of them."""
    lines, calls = [], []

    def run_command(program, *words, cluster=None, timeout_s=60):
        calls.append((program, *words))
        output = "\n".join(lines) if program == "sinfo" else "\n".join(words[-1].split(","))
        return subprocess.CompletedProcess([program], 0, output if program != "sbatch" else "job 8", "")

    def set_nodes(counts, states=None):
        lines[:] = [
            f"{kind}{k}|{(states or {}).get(f'{kind}{k}', 'idle')}|main*|{len(kind)}|1000|(null)|(null)"
            for kind, count in counts.items()
            for k in range(1, count + 1)
        ]
        return calls

    monkeypatch.setattr(scheduler, "run_command", run_command)
    monkeypatch.delenv("SLURM_JOB_PARTITION", raising=False)
    return set_nodes


@pytest.mark.parametrize(
    ("blamed", "counts", "options", "chosen"),
    [
        (["n1"], {"n": 2}, {"nodes": "1"}, ["n1"]),
        (["n1"], {"n": 2}, {"nodes": "2"}, []),  # the job needs every node
        (["n1"], {"n": 2, "nn": 9}, {"nodes": "2"}, []),  # nodes of another kind cannot replace it
        (["n1"], {"n": 3}, {"nodes": "2", "spare-nodes": "1"}, []),
        (["n1"], {"n": 4}, {"nodes": "2", "nodelist": "n1"}, []),
        (["n1"], {"n": 4}, {"nodes": "2", "exclude": "n3"}, ["n1"]),
        (["n1"], {"n": 4}, {"nodes": "2", "exclude": "n2,n3"}, []),
        (["n1"], {}, {"nodes": "1"}, []),  # SLURM does not answer
        (["n1", "n2", "n3"], {"n": 20}, {"nodes": "2"}, ["n3", "n2"]),  # a tenth, the latest first
        ([f"n{k}" for k in range(1, 12)], {"n": 200}, {"nodes": "2"}, [f"n{k}" for k in range(11, 3, -1)]),
    ],
)
def test_only_as_many_nodes_are_avoided_as_others_can_replace(
    run, blame, nodes_of_partition, blamed, counts, options, chosen
):
    blame(*blamed)
    nodes_of_partition(counts)
    assert list(avoidance.choose_nodes(run, "train", options)) == chosen


def test_a_usable_node_is_not_avoided_where_the_others_are_down(run, blame, nodes_of_partition):
    blame("n1")
    nodes_of_partition({"n": 3}, {"n2": "down*", "n3": "drained"})
    assert avoidance.choose_nodes(run, "train", {"nodes": "1"}) == {}


def test_a_new_job_excludes_them_besides_the_nodes_of_the_user(run, blame, nodes_of_partition):
    blame("n1")
    nodes_of_partition({"n": 4})
    options = {"nodes": "2", "exclude": "n4"}
    avoided = avoidance.find_nodes(run, "train", options=options)
    batch_script.submit(run, "train", options, Profile(), avoided=avoided)
    (script,) = run.logs.glob("*_submission.sh")
    assert "#SBATCH --exclude=n4,n1\n" in script.read_text()
    assert job_log.latest_jobs(run)["train"].options == options  # they do not add up from job to job
    assert "n1: hang in attempt 1" in status.avoided_nodes.describe(run)


def test_a_granted_requeue_excludes_them_and_a_refused_one_does_not(run, blame, nodes_of_partition, monkeypatch):
    blame("n1")
    job_log.record_event(run, "submit", "7", what="train", kind="slurm", options={"nodes": "1"})
    calls = nodes_of_partition({"n": 3})
    monkeypatch.setattr(scheduler, "request_requeue", lambda job: "refused")
    assert avoidance.requeue_and_exclude(run, "train", "7") == "refused"
    assert not [call for call in calls if call[0] == "scontrol"] and avoided_nodes.describe(run) == ""
    monkeypatch.setattr(scheduler, "request_requeue", lambda job: None)
    assert avoidance.requeue_and_exclude(run, "train", "7") is None
    assert [call for call in calls if call[0] == "scontrol"] == [("scontrol", "update", "jobid=7", "ExcNodeList=n1")]
    assert job_log.read_events(run, "avoid", "7")[0]["nodes"] == ["n1"]


def test_a_hang_is_not_repeated_in_an_allocation_whose_node_can_be_replaced(run, blame, nodes_of_partition):
    blame("n1")
    state = scheduler.JobState("RUNNING", remaining_s=10_000)
    nodes_of_partition({"n": 1})
    job_log.record_event(run, "submit", "7", what="train", kind="slurm", options={"nodes": "1"})
    hang = attempt("hang", STUCK.format(node="n1"))
    assert relaunch.explain_refusal(run, "train", hang, state) is None
    nodes_of_partition({"n": 2})
    assert "n1" in relaunch.explain_refusal(run, "train", hang, state)


@pytest.mark.parametrize(
    ("launch", "steps", "named"),
    [(0, "7.0", ""), (1, "7.batch\n7.extern", ""), (1, "7.batch\n7.0\n7.12", "7.0 and 7.12")],
)
def test_a_launch_that_found_its_nodes_held_names_the_step(monkeypatch, launch, steps, named):
    def run_command(*words):
        assert words[-2:] == ("--jobs", "7")
        return subprocess.CompletedProcess(words, 0, steps, "")

    monkeypatch.setattr(scheduler, "run_command", run_command)
    reason = relaunch.explain_failed_launch({"job": "7", "launch": launch})
    assert named in reason and bool(reason) == bool(named)


@pytest.mark.slurm
def test_the_attempt_after_a_hang_runs_on_another_node(cluster, slurm_runner, make_stub_run):
    stuck = STUCK.format(node="NODE")
    run = make_stub_run(steps=6, crash_at=3, crash_attempts=1, crash_cause="hang", crash_message=stuck)
    slurm_runner.submit(run, nodes="1")
    assert slurm_runner.wait_for_end() == "COMPLETED"
    first, second = read_attempts(run)
    assert (first.cause, second.cause) == ("hang", "done")
    assert {first.host, second.host} == {"n1", "n2"}
    (event,) = job_log.read_events(run, "avoid", slurm_runner.job)
    assert event["nodes"] == [first.host] and cluster.field(slurm_runner.job, "ExcNodeList") == first.host
