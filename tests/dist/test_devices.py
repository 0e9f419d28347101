"""The device of each process, with faked GPUs: their number as a process sees it, and which of them are the same."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from hpcssl.distributed import devices
from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.distributed.launch import LaunchInfo
from hpcssl.errors import WorldError
from tests.printed import numbers_in


@pytest.fixture
def choose(monkeypatch):
    """Return a function that chooses the devices of processes on one node, which run as threads of this one.

    Its arguments: ``machine.devices``, and for each process the GPUs that it sees, as texts that name them.
    """
    visible = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(visible.gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible.gpus))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=visible.gpus[device.index])
    )

    def choose_all(option, gpus):
        store = KeyValueStore(HashStore())

        def choose_one(rank):
            visible.gpus = gpus[rank]
            info = LaunchInfo(rank=rank, local_rank=rank, size=len(gpus), address="", port=1, token="")
            try:
                device = devices.choose_device(option, rank)
                return str(devices.agree_on_device(option, device, devices.identify_gpu(device), info, store))
            except WorldError as error:
                return error

        with ThreadPoolExecutor(len(gpus)) as pool:
            return list(pool.map(choose_one, range(len(gpus))))

    return choose_all


@pytest.mark.parametrize("option", ["auto", "gpu"])
def test_each_process_gets_a_gpu_of_its_own(choose, option):
    assert choose(option, [["a", "b"], ["a", "b"]]) == ["cuda:0", "cuda:1"]
    # a cluster that binds one GPU to each task
    assert choose(option, [["a"], ["b"], ["c"]]) == ["cuda:0"] * 3
    assert choose(option, [["a"]]) == ["cuda:0"]


def test_processes_that_would_share_a_gpu_use_the_cpu_under_auto(choose, caplog):
    assert choose("auto", [["a"], ["a"]]) == ["cpu", "cpu"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # from rank 0 alone
    # all of them, since one collective cannot span both kinds
    assert choose("auto", [["a"], ["b"], ["b"]]) == ["cpu"] * 3
    assert choose("auto", [["a", "b"]] * 3) == ["cpu"] * 3


def test_processes_that_would_share_a_gpu_are_refused_under_gpu(choose):
    errors = choose("gpu", [["a"], ["b"], ["b"]])
    for error in errors:  # on every rank, so that none waits for the others
        assert isinstance(error, WorldError) and error.what == "machine.devices=gpu"
        assert numbers_in(error.got)[:2] == [1, 2] and "machine.devices=cpu" in error.fix


def test_a_gpu_that_fails_is_no_failure_of_the_network(monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    for call in (devices.identify_gpu, devices.select_gpu):
        with pytest.raises(WorldError) as caught:
            call(torch.device("cuda", 1))
        assert numbers_in(caught.value.what)[0] == 1 and "nvidia-smi" in caught.value.fix
        call(torch.device("cpu"))


def test_a_node_without_its_gpu_is_named_instead_of_a_slow_run_of_all(choose):
    for error in choose("auto", [["a"], [], ["b"]]):
        assert isinstance(error, WorldError) and numbers_in(error.got)[0] == 1 and "nvidia-smi" in error.fix


def test_machines_without_gpus_compute_on_the_cpu(choose):
    assert choose("auto", [[], []]) == ["cpu", "cpu"]
    assert choose("cpu", [["a"], ["a"]]) == ["cpu", "cpu"]
    for error in choose("gpu", [[]]):
        assert isinstance(error, WorldError) and error.what == "machine.devices=gpu"


def test_scalars_of_host_and_device_keep_their_order():
    rows = [{"lr": 0.1, "loss": torch.tensor([[2.5]], requires_grad=True)}, {"count": torch.tensor(3), "lr": 0.2}]
    stacked = devices.stack_scalars(rows, torch.device("cpu"))
    assert stacked.dtype == torch.float64 and stacked.tolist() == [0.1, 2.5, 3.0, 0.2]
    assert devices.stack_scalars([{"lr": 0.1}], torch.device("cpu")).tolist() == [0.1]
