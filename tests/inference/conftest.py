"""Weights of small networks, and a folder of photographs as people have them."""

import pytest
import torch

import hpcssl.cli
from hpcssl import config, files
from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch
from hpcssl.run_dir import RunDir
from tests.inference import photographs
from tests.printed import printed_error


@pytest.fixture(autouse=True)
def one_thread():
    """Compute with one thread: a forked process needs no thread pool of its parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _write_weights(path, arch, size, step=5):
    backbone = resnet.build(arch)
    resnet.initialize(backbone, seed=step)
    fields = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "fingerprint": "f" * 64, "method": "msf"}
    weights.save(path, backbone, arch, size=size, step=step, **fields)
    return path


@pytest.fixture(scope="session")
def write_weights():
    """``write_weights(path, arch, size, step=5)`` writes random weights and returns the path."""
    return _write_weights


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with the weights of a tiny network at steps 0 and 5."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "tiny")
    run.weights.mkdir(parents=True)
    arch = Arch(arch="resnet_tiny", stem="small")
    for step in (0, 5):
        _write_weights(run.weights_at(step), arch, 16, step)
    data = {"train": "/home/someone/train", "val": "/home/someone/val", "max_damaged": 0}
    files.atomic_write(run.config, config.to_yaml({"name": "mine", "data": data, "machine": {"devices": "cpu"}}))
    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """The folder of ``photographs.write``."""
    root = tmp_path_factory.mktemp("pictures") / "photos"
    photographs.write(root)
    return root


@pytest.fixture
def run_command(capfd):
    """``run_command(*words)`` -> (exit code, stdout, stderr, the printed error or None)."""

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            hpcssl.cli.main(list(map(str, words)))
        printed, code = capfd.readouterr(), ended.value.code
        return code, printed.out, printed.err, printed_error(printed.err) if code else None

    return call
