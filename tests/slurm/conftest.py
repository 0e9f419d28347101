"""A private SLURM, runs of the stubs, and jobs on SLURM or on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import loopback
from hpcssl import cli_runner
from hpcssl.errors import EXIT_USAGE
from slurm import cli
from tests.printed import printed_error
from tests.slurm import stubs
from tests.slurm.job_runner import JobRunner


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A private SLURM of two nodes with four CPUs each.

    Partitions: ``main`` (preemptible), ``cancel`` (preempted jobs are cancelled, without a grace time) and ``high``.
    Jobs are requeued only if they request it themselves.
    """
    if reason := loopback.explain_unavailable():
        pytest.skip(reason)
    with loopback.running_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture
def make_stub_run(tmp_path):
    """``make_stub_run(**settings)`` creates a run folder with the stubs (``stubs.SETTINGS``)."""
    return partial(stubs.create_run, tmp_path / "run")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of the scanned digits, made once per test session."""
    root = tmp_path_factory.getbasetemp() / "digits"
    if not root.exists():
        subprocess.run([sys.executable, "-m", "data_prep", "digits", str(root)], check=True, capture_output=True)
    return root


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slurm)])
def runner(request) -> JobRunner:
    """A job on this machine, and then one on SLURM."""
    return JobRunner(request.getfixturevalue("cluster") if request.param == "slurm" else None)


@pytest.fixture
def slurm_runner(cluster) -> JobRunner:
    """A job on SLURM."""
    return JobRunner(cluster)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, digits):
    """``call(*words)`` runs the command in this process on the digits: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]

    def run_command(*words):
        code = cli_runner.run(cli.app, [*words, *data], "hpcssl-submit")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run_command


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Programs in place of SLURM's (``stubs.QueueStub``)."""
    stub = stubs.QueueStub(tmp_path / "queue")
    monkeypatch.setenv("PATH", str(stub.bin), prepend=os.pathsep)
    return stub


@pytest.fixture
def refused_sweep(call, queue, tmp_path):
    """``refused_sweep(*words)`` checks that a sweep of digits_msf is refused and leaves nothing: the error."""

    def refuse(*words):
        code, out, err = call("sweep", "digits_msf", "--out", "out", *words)
        assert (code, out) == (EXIT_USAGE, "") and len(err.splitlines()) == 1
        assert not (tmp_path / "out").exists() and queue.jobs == []
        return printed_error(err)

    return refuse
