"""Training on a GPU: autocast, DDP over NCCL with one rank, and bit-exact resume with deterministic algorithms."""

import math

import pytest
import torch

from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from tests.tolerances import rounding

pytestmark = pytest.mark.gpu
GPU = ["machine.devices=gpu", "machine.deterministic=true", "views.query=strong", "views.target=weak"]
KILLED = [{"kill_at": 3}, {"kill_at": 7, "machine": ["machine.loader_threads=4"]}, {}]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["msf", "byol"])
def test_a_killed_run_ends_with_the_same_bits(run_scenarios, method, precision):
    """One rank, but in a process group over NCCL, so that DDP and every collective are called."""
    overrides = [
        *GPU,
        f"optim.precision={precision}",
        "model.norm=ghost",
        "model.norm_group_size=4",
        "model.shuffle_bn=true",
    ]
    scenarios = [
        {
            "name": kind,
            "recipe": f"digits_{method}",
            "overrides": overrides,
            "worlds": [1],
            "distributed": True,
            "attempts": attempts,
        }
        for kind, attempts in (("undisturbed", [{}]), ("killed", KILLED))
    ]
    results = run_scenarios(scenarios)
    (undisturbed, folder), (killed, killed_folder) = results["undisturbed"], results["killed"]
    assert undisturbed["done"] and killed["done"], undisturbed["log"] + killed["log"]
    assert killed["digest"] == undisturbed["digest"]
    assert read_lines(RunDir(killed_folder).samples) == read_lines(RunDir(folder).samples)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_first_loss_is_close_to_that_of_the_cpu(run_scenarios, precision):
    overrides = ["views.query=strong", "views.target=weak", "model.norm=sync"]
    scenarios = [
        {
            "name": device,
            "recipe": "digits_msf",
            "worlds": [1],
            "attempts": [{}],
            "overrides": [*overrides, f"machine.devices={device}", f"optim.precision={p}"],
        }
        for device, p in (("gpu", precision), ("cpu", "fp32"))
    ]
    results = run_scenarios(scenarios)
    losses = []
    for result, folder in results.values():
        assert result["done"], result["log"]
        losses.append([line["loss"] for line in read_lines(RunDir(folder).journal)])
    first = [row[0] for row in losses]
    # The bound of test_bf16_stays_close_to_fp32 in tests/equations/test_scripts.py. Convolutions in fp32 may use TF32,
    # which has the precision of fp16.
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    assert math.isclose(*first, abs_tol=rounding(dtype, 40, scale=4 / (16 * 64) ** 0.5))
    assert all(math.isfinite(x) for x in losses[0])
