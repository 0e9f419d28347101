"""Training on a GPU: autocast, DDP over NCCL with one rank, and resume bit for bit under deterministic algorithms."""

import math

import pytest

from hpcssl.files import RunDir, read_lines

pytestmark = pytest.mark.gpu
GPU = ["machine.devices=gpu", "machine.deterministic=true", "views.query=strong", "views.target=weak"]
KILLS = [{"kill_at": 3}, {"kill_at": 7, "machine": ["machine.loader_threads=4"]}, {}]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["msf", "byol"])
def test_killed_runs_end_in_the_same_bits(play, method, precision):
    """One rank over NCCL, so that DDP and every collective are really called."""
    overrides = [*GPU, f"optim.precision={precision}", "model.norm=ghost", "model.norm_group=4", "model.shuffle=true"]
    plans = [{"name": kind, "recipe": f"digits_{method}", "overrides": overrides, "worlds": [1], "group": True,
              "attempts": attempts} for kind, attempts in (("whole", [{}]), ("killed", KILLS))]
    results = play(plans)
    (whole, folder), (killed, torn) = results["whole"], results["killed"]
    assert whole["done"] and killed["done"], whole["log"] + killed["log"]
    assert killed["digest"] == whole["digest"]
    assert read_lines(RunDir(torn).samples) == read_lines(RunDir(folder).samples)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_stay_beside_the_cpus(play, precision):
    overrides = ["views.query=strong", "views.target=weak", "model.norm=whole"]
    plans = [{"name": device, "recipe": "digits_msf", "worlds": [1], "attempts": [{}],
              "overrides": [*overrides, f"machine.devices={device}", f"optim.precision={p}"]}
             for device, p in (("gpu", precision), ("cpu", "fp32"))]
    results = play(plans)
    losses = []
    for result, folder in results.values():
        assert result["done"], result["log"]
        losses.append([line["loss"] for line in read_lines(RunDir(folder).journal)])
    first = [row[0] for row in losses]
    assert math.isclose(*first, abs_tol={"fp32": 2e-3}.get(precision, 3e-2))
    assert all(math.isfinite(x) for x in losses[0])
